"""gin files in, objects out: with `gin_reader.py` the only module that imports gin.

gin 0.5.0 rejects an unknown class or parameter, in a message of many lines; it accepts a misspelt macro, a wrong type
and a binding that nothing reads. `load` reads the files itself (`gin_reader.py`), so that it knows where each binding
stands, and adds what is missing:

* Every class, parameter, module and macro that is named must exist, in every file; the error names the near ones.
* Every value must fit the annotation of its parameter (`type_checks.py`), macros followed to their value.
* What was said must matter. In a file given with `--gin_file`, a macro must be referred to by some binding, and a
  parameter must belong to an object that is built. A binding given on the command line must moreover be read, and not
  be shadowed by a more specific scope. *Included* files are presets, which offer more than one root takes: there only
  the first two rules hold.

gin keeps its state in its module, so there is one configuration at a time: `load` forgets the previous one.
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
    """A configuration that was read and checked, and from which objects can be built.

    Attributes:
      bindings: every binding in the order in which they were read, replaced ones included.
      files: the files that were read.
    """

    bindings: tuple[Binding, ...]
    files: tuple[Path, ...]

    @property
    def current(self) -> Current:
        """The bindings that hold: for each key the one that was read last."""
        return {binding.key: binding for binding in self.bindings}

    def binds(self, target: type) -> bool:
        """Returns whether some binding is for `target`, which is how a gin file says what it configures."""
        return any(binding.target is target for binding in self.bindings)

    def defines(self, macro: str) -> bool:
        """Returns whether some file or flag defines a macro."""
        return (macro, "", "") in self.current

    def build(self, target: type[T]) -> T:
        """Returns the configured object of class `target`, after checking that every binding mattered.

        Raises:
          ConfigError: nothing configures `target`, a required parameter is not bound, the object rejects its values,
            or a binding has no effect.
        """
        if not self.binds(target):
            raise ConfigError(
                f"the gin files do not configure a {target.__name__}",
                where=", ".join(str(path) for path in self.files[:3]),
                fix="Give one that does with --gin_file, e.g. from gin/recipes/.",
            )
        return self._build(lambda: gin.get_configurable(target)())

    def build_macro(self, name: str) -> Any:
        """Returns the value of a macro, its references built; checks and errors as in `build`."""
        if not self.defines(name):
            raise ConfigError(
                f"the gin files do not define the macro {name}",
                where=", ".join(str(path) for path in self.files[:3]),
                fix="Give a file that does.",
            )

        def evaluate() -> Any:
            with gin.config_scope(name.split("/")):
                return gin.get_configurable(gin_config.macro)()

        return self._build(evaluate)

    def _build(self, make: Callable[[], T]) -> T:
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
        """Returns what `build` used, defaults included, as the text of one gin file that includes no other."""
        return gin.operative_config_str(max_line_length=120)

    def _with_source(self, where: str) -> str:
        """Adds to `Class.parameter` the places that bound it."""
        sources = [one.where for one in self.current.values() if not one.is_macro and one.name.endswith(where)]
        return f"{where}, set at {' and '.join(sources)}" if where and sources else where


def load(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_path: Sequence[str] = (),
    *,
    macros: Sequence[str] = (),
) -> Config:
    """Reads gin files, then bindings that override them, and checks all that can be checked without building.

    Args:
      gin_files: names of gin files (`find_gin_file` says where they are looked for), later ones override earlier ones.
      bindings: `NAME=VALUE` for a macro, or `Class.parameter=VALUE`, `scope/Class.parameter=VALUE`,
        `module.Class.parameter=VALUE`; needs no import: every module that some file imports is known.
      search_path: folders to look in, between the current folder and the packaged one.
      macros: macros that will be built by name, e.g. the `SAMPLER` of a sampler's file; nothing need refer to them.

    Raises:
      ConfigError: with file and line, as the module's docstring lists.
    """
    if not gin_files:
        raise ConfigError("no gin file is given", fix="Add --gin_file, e.g. --gin_file gin/recipes/quickstart.gin.")
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
    """Returns the sentence for a call that lacks arguments, or None for a `TypeError` of another kind."""
    found = re.search(r"(\w+)\.__init__\(\) missing \d+ required [\w-]+ arguments?: (.*)", str(error).splitlines()[0])
    if not found:
        return None
    names = re.findall(r"'(\w+)'", found[2])
    return ConfigError(
        f"{found[1]} needs {', '.join(names)}, which no gin file gives",
        where=f"{found[1]}.{names[0]}",
        fix=f"Bind it in a gin file, or with --gin.{found[1]}.{names[0]}=VALUE.",
    )
