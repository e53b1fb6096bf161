"""Checks that gin lacks: undefined and unused macros, values of the wrong type, bindings without effect."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.cli import type_checks
from diffusion_lm.cli.bindings import Binding, Current, Macro, Reference, Required, follow, macros_in, shown
from diffusion_lm.core.errors import ConfigError, near_names

Used = Mapping[tuple[str, str], set[str]]
"""For each (scope, selector) that was called: the parameters that gin supplied or left at their defaults."""


def check_macros(bindings: Sequence[Binding], current: Current, *, roots: Sequence[str] = ()) -> None:
    """Checks that every macro has a value, and that every macro of a flag or `--gin_file` file is used.

    Args:
      bindings: all bindings in the order they were read, including replaced ones.
      current: the effective bindings.
      roots: macros that the caller builds by name and that no binding needs to use.

    Raises:
      ConfigError: a macro is undefined, unused or defined in terms of itself.
    """
    defined = {binding.scope: binding for binding in current.values() if binding.is_macro}
    referred = {*roots, *(name for binding in bindings for name in macros_in(binding.value))}
    for name, binding in defined.items():
        # Included files are presets; their macros may be unused.
        if name not in referred and binding.origin != "included file":
            raise ConfigError(
                f"no binding uses the macro {name}{near_names(name, referred)}",
                where=binding.where,
                fix="Correct the name or remove the line.",
            )
    for binding in current.values():
        for name in macros_in(binding.value):
            if name in defined and not isinstance(defined[name].value, Required):
                continue
            problem = "has no value" if name in defined else f"is not defined{near_names(name, defined)}"
            raise ConfigError(
                f"macro {name} {problem}",
                where=binding.where,
                fix=f"Set it with --gin.{name}=VALUE or in a gin file.",
            )
    for name, binding in defined.items():
        _check_cycle(name, binding, defined)


def check_types(current: Current) -> None:
    """Raises `ConfigError` if a value, with macros replaced, does not match the type of its parameter."""
    for binding in current.values():
        if binding.is_macro:
            continue
        hint = type_checks.parameter_hints(binding.target).get(binding.parameter, Any)
        value, sources = follow(binding.value, current)
        if isinstance(value, Required):
            raise ConfigError(f"{binding.name} is required and has no value", where=binding.where, fix="Bind it.")
        if type_checks.fits(value, hint):
            continue
        through = f" (from {' and '.join(f'{source.name}, {source.where}' for source in sources)})" if sources else ""
        raise ConfigError(
            f"{binding.name} = {shown(value)}{through}: must be {type_checks.describe(hint)}",
            where=binding.where,
            fix=_type_fix(value, hint),
        )


def check_effect(current: Current, used: Used, used_macros: set[str]) -> None:
    """Raises `ConfigError` for a binding that had no effect on the built object (rules: `config.py`)."""
    for binding in current.values():
        if binding.is_macro:
            # A macro of a file may be used by a binding that is overridden; `check_macros` covers unused names.
            if binding.origin == "command line" and binding.scope not in used_macros:
                raise ConfigError(
                    f"{binding.name} has no effect: no object that is built uses it",
                    where=binding.where,
                    fix="Remove it, or bind the parameter directly with --gin.Class.parameter=VALUE.",
                )
        elif binding.origin != "included file":
            _check_parameter_effect(binding, current, used)


def _check_parameter_effect(binding: Binding, current: Current, used: Used) -> None:
    scopes = [
        scope
        for (scope, selector), parameters in used.items()
        if selector == binding.selector and binding.parameter in parameters and _within(scope, binding.scope)
    ]
    if not scopes:
        in_scope = f" in scope {binding.scope!r}" if binding.scope else ""
        raise ConfigError(
            f"{binding.name} has no effect: no {binding.class_name} is built{in_scope}",
            where=binding.where,
            fix="Remove it, or reference the class from an object that is built.",
        )
    # In each scope only the most specific binding counts. A flag that never wins would be silently ignored.
    winners = [_winner(scope, binding, current) for scope in scopes]
    if binding.origin == "command line" and binding not in winners:
        raise ConfigError(
            f"{binding.name} has no effect: {winners[0].name} is more specific and overrides it ({winners[0].where})",
            where=binding.where,
            fix=f"Write --gin.{winners[0].name}=VALUE.",
        )


def _within(scope: str, outer: str) -> bool:
    """Returns whether `scope` is `outer` or nested in it; the empty scope contains all scopes."""
    return not outer or scope == outer or scope.startswith(f"{outer}/")


def _winner(scope: str, binding: Binding, current: Current) -> Binding:
    """Returns the binding that gin uses for this parameter in `scope`: the one with the longest prefix of `scope`."""
    parts = scope.split("/") if scope else []
    prefixes = ["/".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next(current[key] for prefix in prefixes if (key := (prefix, *binding.key[1:])) in current)


def _check_cycle(name: str, binding: Binding, defined: Mapping[str, Binding]) -> None:
    visited, pending = {name}, macros_in(binding.value)
    while pending:
        current = pending.pop()
        if current in visited:
            raise ConfigError(
                f"macro {name} is defined in terms of itself", where=binding.where, fix="Give it a value."
            )
        visited.add(current)
        pending += macros_in(defined[current].value)


def _type_fix(value: object, hint: type_checks.TypeForm) -> str:
    if isinstance(value, Reference):
        called = dataclasses.replace(value, called=True)
        if not value.called and type_checks.fits(called, hint):
            return f"Write {shown(called)}, with parentheses, to pass an instance."
        missing = type_checks.missing_members(value.target, hint) if type_checks.is_protocol(hint) else []
        return f"{value.target.__name__} has no {', '.join(missing[:3])}." if missing else "Bind another object."
    if isinstance(value, float) and value.is_integer() and type_checks.fits(int(value), hint):
        return f"Write {int(value)}."
    if isinstance(value, str) and value.title() in ("True", "False") and type_checks.fits(True, hint):
        return f"Write {value.title()} without quotes."
    if isinstance(value, str) and re.fullmatch(r"-?\d[\d.]*(e-?\d+)?", value) and type_checks.fits(float(value), hint):
        return f"Write {value} without quotes."
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value) and type_checks.fits(int(value), hint):
        return f"Write {value} without quotes."
    if not isinstance(value, list | tuple | Macro) and type_checks.fits((value,), hint):
        return f"Write ({shown(value)},)."
    return "Correct the value."
