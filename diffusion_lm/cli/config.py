"""Loads gin files, checks them and builds the configured objects. Only this module and `gin_reader.py` import gin.

gin 0.5.0 rejects an unknown class or parameter, with a message of many lines. It accepts a misspelt macro, a value of
the wrong type and an unused binding. `load` parses the files itself (`gin_reader.py`), so it knows file and line of
each binding, and adds these checks:

* Every class, parameter, module and macro must exist, in every file. The error suggests similar names.
* Every value, with macros replaced, must match the type annotation of its parameter (`type_checks.py`).
* Every binding must have an effect. In a file of `--gin_file`, each macro must be used by some binding, and each
  parameter must belong to an object that is built. A binding on the command line must also be read, and must not be
  overridden by a more specific scope. *Included* files are presets that may define more than one configuration needs,
  so only the first two rules apply to them.

gin's state is global, so only one configuration exists at a time: `load` clears the previous one.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gin
from gin import config as gin_config

from diffusion_lm.cli import binding_checks
from diffusion_lm.cli.bindings import Binding, Current
from diffusion_lm.cli.gin_reader import MACRO, GinReader
from diffusion_lm.core.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Config:
    """A loaded and checked configuration that builds objects.

    Attributes:
      bindings: all bindings in the order they were read, including those that later ones replaced.
      files: the files that were read.
    """

    bindings: tuple[Binding, ...]
    files: tuple[Path, ...]

    @property
    def current(self) -> Current:
        """The effective bindings: for each key the one that was read last."""
        return {binding.key: binding for binding in self.bindings}

    def binds(self, target: type) -> bool:
        """Returns whether any binding sets a parameter of `target`."""
        return any(binding.target is target for binding in self.bindings)

    def defines(self, macro: str) -> bool:
        """Returns whether a file or flag defines this macro."""
        return (macro, "", "") in self.current

    def build(self, target: type[T]) -> T:
        """Builds the configured object of class `target` and checks that every binding had an effect.

        Raises:
          ConfigError: no binding sets a parameter of `target`, a required parameter is not bound, the object rejects
            its values, or a binding has no effect.
        """
        if not self.binds(target):
            raise ConfigError(
                f"the gin files do not configure a {target.__name__}",
                where=", ".join(str(path) for path in self.files[:3]),
                fix="Pass a file that does with --gin_file, e.g. from gin/recipes/.",
            )
        return self._build(lambda: gin.get_configurable(target)())

    def build_macro(self, name: str) -> Any:
        """Builds the value of a macro and returns it; checks and errors as in `build`."""
        if not self.defines(name):
            raise ConfigError(
                f"the gin files do not define the macro {name}",
                where=", ".join(str(path) for path in self.files[:3]),
                fix="Pass a file that does.",
            )

        def evaluate() -> Any:
            with gin.config_scope(name.split("/")):
                return gin.get_configurable(gin_config.macro)()

        return self._build(evaluate)

    def _build(self, make: Callable[[], T]) -> T:
        # gin records here every parameter that it supplies, which shows afterwards which bindings were used.
        gin_config._OPERATIVE_CONFIG.clear()
        try:
            built = make()
        except ConfigError as error:
            raise ConfigError(error.what, where=self._with_source(error.where), fix=error.fix) from error
        except TypeError as error:
            raise _missing_parameters(error) or error from error.__cause__
        operative = gin_config._OPERATIVE_CONFIG
        used = {key: set(values) for key, values in operative.items() if key[1] != MACRO}
        binding_checks.check_effect(self.current, used, {scope for scope, selector in operative if selector == MACRO})
        return built

    def resolved(self) -> str:
        """Returns all values that `build` used, including defaults, as one gin file without includes."""
        return gin.operative_config_str(max_line_length=120)

    def _with_source(self, where: str) -> str:
        """Appends to `Class.parameter` the places where it was bound."""
        sources = [one.where for one in self.current.values() if not one.is_macro and one.name.endswith(where)]
        return f"{where}, set at {' and '.join(sources)}" if where and sources else where


def load(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_path: Sequence[str] = (),
    *,
    macros: Sequence[str] = (),
) -> Config:
    """Reads gin files and then bindings that override them, and runs all checks that do not need to build objects.

    Args:
      gin_files: names of gin files, searched as `find_gin_file` describes; later files override earlier ones.
      bindings: `NAME=VALUE` for a macro, or `Class.parameter=VALUE`, `scope/Class.parameter=VALUE`,
        `module.Class.parameter=VALUE`. Classes need no import; all modules that any file imports are searched.
      search_path: directories to search after the current directory and before the packaged files.
      macros: macros that the caller builds by name, e.g. the `SAMPLER` of a sampler file; no binding needs to use them.

    Raises:
      ConfigError: a check of the module docstring failed; the message names file and line.
    """
    if not gin_files:
        raise ConfigError("no gin file given", fix="Add --gin_file, e.g. --gin_file gin/recipes/quickstart.gin.")
    gin.clear_config()
    reader = GinReader(tuple(search_path))
    for name in gin_files:
        reader.read_file(name, "given file", where="--gin_file")
    for text in bindings:
        reader.read_flag(text)
    config = Config(tuple(reader.bindings), tuple(dict.fromkeys(reader.files)))
    binding_checks.check_macros(config.bindings, config.current, roots=macros)
    binding_checks.check_types(config.current)
    return config


def _missing_parameters(error: TypeError) -> ConfigError | None:
    """Converts the `TypeError` of a call with missing arguments; returns None for any other `TypeError`."""
    found = re.search(r"(\w+)\.__init__\(\) missing \d+ required [\w-]+ arguments?: (.*)", str(error).splitlines()[0])
    if not found:
        return None
    names = re.findall(r"'(\w+)'", found[2])
    return ConfigError(
        f"{found[1]} requires {', '.join(names)}, which no gin file sets",
        where=f"{found[1]}.{names[0]}",
        fix=f"Bind it in a gin file, or with --gin.{found[1]}.{names[0]}=VALUE.",
    )
