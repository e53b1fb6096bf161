"""Resolves names in gin files to modules, classes and parameters; errors suggest similar names."""

import inspect
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from diffusion_lm.core.errors import ConfigError, near_names


class ParseContext(Protocol):
    """What this module uses of gin's `ParseContext` (gin has no type annotations)."""

    imports: Sequence["ImportStatement"]
    _dynamic_registration: bool

    def process_import(self, statement: "ImportStatement") -> None:
        """Imports the module of a statement."""

    def get_configurable(self, selector: str) -> Any:
        """Returns gin's registry entry of a class or function, or None."""

    def _resolve_selector(self, selector: str) -> tuple[Sequence[str], Sequence[Any]]: ...


class ImportStatement(Protocol):
    """What this module uses of gin's `ImportStatement`."""

    module: str

    def bound_name(self) -> str:
        """Returns the name that the statement defines in the file."""


def import_module(context: ParseContext, statement: ImportStatement) -> types.ModuleType | None:
    """Lets gin process an import statement; returns the module, or None for gin's own `__gin__` statements.

    Raises:
      ConfigError: the module does not exist, or it needs a package that is not installed.
    """
    try:
        context.process_import(statement)
    except ModuleNotFoundError as error:
        if error.name and not statement.module.startswith(error.name):
            raise ConfigError(
                f"{statement.module} needs the package {error.name}, which is not installed",
                fix=f"Install it: pip install {error.name.partition('.')[0]}.",
            ) from error
        raise ConfigError(
            f"no module named {statement.module}{_near_modules(statement.module)}",
            fix="Correct the import; `from package import module` must name a module, not a class.",
        ) from error
    return sys.modules.get(statement.module)


def _near_modules(module: str) -> str:
    package, _, name = module.rpartition(".")
    parent = sys.modules.get(package)
    if parent is None or not hasattr(parent, "__path__"):
        return ""
    return near_names(name, [found.name for found in pkgutil.iter_modules(parent.__path__)])


def configurable(
    context: ParseContext, selector: str, modules: Iterable[types.ModuleType], parameter: str = ""
) -> tuple[str, Any]:
    """Returns gin's full selector and gin's registry entry of a class or function.

    Args:
      context: gin's parse context, with the imports of the file.
      selector: `module.Class`; with `modules` also `Class` alone.
      modules: modules in which to look up a short name; empty inside a gin file, where gin's own rule applies.
      parameter: if the name matches several classes, only those with this parameter are considered.

    Raises:
      ConfigError: the name does not exist, is ambiguous, or is not a class or function.
    """
    modules = tuple(modules)
    if modules:
        selector = _expand(selector, modules, parameter)
    try:
        _, values = context._resolve_selector(selector) if context._dynamic_registration else ((), ())
        if values and not callable(values[-1]):
            raise ConfigError(
                f"{selector} is a {type(values[-1]).__name__}, not a class or function",
                fix=f"Name a class in it: {', '.join(public_names(values[-1])[:5])}.",
            )
        found = context.get_configurable(selector)
    except NameError as error:
        head = selector.partition(".")[0]
        known = [statement.bound_name() for statement in context.imports if not statement.module.startswith("__gin__")]
        raise ConfigError(
            f"{head!r} of {selector} is not imported in this file{near_names(head, known)}",
            fix="Add `from package import module` at the top and write module.Class.",
        ) from error
    except AttributeError as error:
        raise _unknown_attribute(context, selector) from error
    if found is None:
        raise ConfigError(
            f"no class or function named {selector}",
            fix="Begin the file with `from __gin__ import dynamic_registration`, then import the module.",
        )
    return selector, found


def check_parameter(target: Callable[..., object], parameter: str) -> None:
    """Raises `ConfigError` unless the class or function `target` has this parameter."""
    parameters = inspect.signature(target).parameters
    if parameter in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    raise ConfigError(
        f"{target.__name__} has no parameter {parameter!r}{near_names(parameter, parameters)}",
        fix=f"Its parameters are {', '.join(parameters)}.",
    )


def public_names(module: types.ModuleType | type) -> list[str]:
    """Returns the public classes and functions of a module; those that it imports come last."""
    found = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    own = [name for name, value in found.items() if value.__module__ == module.__name__]
    return own + [name for name in found if name not in own]


def _unknown_attribute(context: ParseContext, selector: str) -> ConfigError:
    parts = selector.split(".")
    for length in range(1, len(parts)):
        try:
            _, values = context._resolve_selector(".".join(parts[: length + 1]))
        except AttributeError:
            _, values = context._resolve_selector(".".join(parts[:length]))
            owner, name = values[-1], parts[length]
            known = public_names(owner) if isinstance(owner, types.ModuleType) else dir(owner)
            return ConfigError(
                f"{'.'.join(parts[:length])} has no {name!r}{near_names(name, known)}",
                fix=f"It has {', '.join(known[:6])}." if isinstance(owner, types.ModuleType) else "Correct the name.",
            )
    return ConfigError(f"no class or function named {selector}", fix="Correct the name.")


def _expand(selector: str, modules: tuple[types.ModuleType, ...], parameter: str) -> str:
    """Returns the full name of a short one such as `TrainRun` or `run.TrainRun`, searched in `modules`."""
    # Keyed by object identity, because a class is also an attribute of every module that imports it.
    found: dict[int, str] = {}
    accepting: set[int] = set()
    parts = selector.split(".")
    for split in range(len(parts)):
        prefix, attributes = ".".join(parts[:split]), parts[split:]
        for module in modules:
            if prefix and module.__name__ != prefix and not module.__name__.endswith(f".{prefix}"):
                continue
            value: Any = module
            for name in attributes:
                value = getattr(value, name, None)
            if callable(value):
                is_home = getattr(value, "__module__", None) == module.__name__
                if is_home or id(value) not in found:
                    found[id(value)] = ".".join([module.__name__, *attributes])
                if parameter in inspect.signature(value).parameters:
                    accepting.add(id(value))
    candidates = {number: name for number, name in found.items() if number in accepting} if accepting else found
    names = list(candidates.values())
    if len(names) > 1:
        raise ConfigError(f"{selector} is ambiguous: {' or '.join(sorted(names))}", fix="Add the module name.")
    if not names:
        known = {name for module in modules for name in public_names(module)}
        raise ConfigError(
            f"the gin files import no class or function named {selector}{near_names(selector, known)}",
            fix="Correct the name, or include a gin file that imports it.",
        )
    return names[0]
