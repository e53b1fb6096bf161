"""Writes gin files safely; all gin files written by this package come from here.

A gin file is a program: its imports and references run code when it is read. Untrusted values, names and paths (from a
downloaded config.json, the name of a directory) must therefore never be inserted as text. This writer checks values by
type, renders them with `repr`, and parses each one back before writing it.
"""

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Self

from diffusion_lm.core.errors import ConfigError

PACKAGE = "diffusion_lm"
"""Written files import only modules of this package."""

_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_DOTTED = re.compile(rf"{_IDENTIFIER}(?:\.{_IDENTIFIER})*")
_KEY = re.compile(rf"(?:{_IDENTIFIER}/)*{_IDENTIFIER}(?:\.{_IDENTIFIER})*")


@dataclasses.dataclass(frozen=True)
class Built:
    """A reference to a new object of a class, `@module.Class()`.

    Attributes:
      name: dotted name, which begins with a module that the file imports.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class MacroName:
    """A reference to a macro, `%NAME`.

    Attributes:
      name: name of the macro.
    """

    name: str


Value = None | bool | int | float | str | Sequence["Value"] | Mapping[str, "Value"] | Built | MacroName


class GinText:
    """The text of one gin file, built statement by statement.

    Methods that add a statement return the object itself. They raise `ConfigError` if a name is not an identifier or a
    value is not plain data.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._modules: set[str] = set()

    def comment(self, text: str) -> Self:
        """Adds a one-line comment; line breaks and other unprintable characters are escaped."""
        self._lines.append(f"# {one_line(text)}")
        return self

    def blank(self) -> Self:
        """Adds an empty line."""
        self._lines.append("")
        return self

    def imports(self, *modules: str) -> Self:
        """Adds imports of modules of this package, such as "diffusion_lm.nn.rope"."""
        if not self._modules:
            self._lines += ["from __gin__ import dynamic_registration", ""]
        for module in modules:
            _check(module, _DOTTED, "a module")
            package, _, name = module.rpartition(".")
            if package.partition(".")[0] != PACKAGE:
                raise _refused(module, f"only modules of {PACKAGE} may be imported")
            self._lines.append(f"from {package} import {name}")
            self._modules.add(name)
        return self

    def include(self, file: str) -> Self:
        """Adds the include of a gin file, without a scope."""
        # gin_reader.py reads "FILE as SCOPE" as an include under a scope.
        if " as " in file:
            raise _refused(file, "the name of an included file must not contain ' as '")
        self._lines.append(f"include {literal(file)}")
        return self

    def bind(self, name: str, value: Value) -> Self:
        """Adds `NAME = VALUE`, for a macro or for `module.Class.parameter`."""
        _check(name, _KEY, "a macro or a parameter")
        self._check_module(name)
        self._lines.append(f"{name} = {self._rendered(value)}")
        return self

    def block(self, name: str, values: Mapping[str, Value]) -> Self:
        """Adds a block with parameters of one class."""
        _check(name, _DOTTED, "a class")
        self._check_module(name)
        self._lines.append(f"{name}:")
        for parameter, value in values.items():
            _check(parameter, re.compile(_IDENTIFIER), "a parameter")
            self._lines.append(f"  {parameter} = {self._rendered(value)}")
        return self

    def text(self) -> str:
        """Returns the text of the file."""
        return "\n".join(self._lines) + "\n"

    def _rendered(self, value: Value) -> str:
        if isinstance(value, Built):
            _check(value.name, _DOTTED, "a class")
            self._check_module(value.name)
            return f"@{value.name}()"
        if isinstance(value, MacroName):
            _check(value.name, re.compile(_IDENTIFIER), "a macro")
            return f"%{value.name}"
        return literal(value)

    def _check_module(self, name: str) -> None:
        """Raises `ConfigError` if a dotted name begins with a module that the file does not import."""
        module, dot, _ = name.rpartition("/")[2].partition(".")
        if dot and module not in self._modules:
            raise _refused(name, f"the file does not import {module}")


def literal(value: Value) -> str:
    """Returns plain data as a one-line gin literal.

    Args:
      value: None, a bool, int, float or str, or a tuple, list or dict of them. Subclasses such as NumPy scalars are
        rejected, because their `repr` is not a literal.

    Raises:
      ConfigError: the value is of another type, or its literal is parsed to another value (NaN, infinity).
    """
    _check_plain(value)
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same or "\n" in text or "\r" in text:
        raise _refused(value, "parsing its literal gives another value")
    return text


def one_line(text: str) -> str:
    """Returns `text` with all unprintable characters escaped, including line breaks."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _check_plain(value: object) -> None:
    if type(value) in (tuple, list):
        for item in value:  # type: ignore[attr-defined]
            _check_plain(item)
    elif type(value) is dict:
        for key, item in value.items():
            _check_plain(key)
            _check_plain(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise _refused(value, f"a {type(value).__name__} is not plain data")


def _check(name: str, pattern: re.Pattern[str], what: str) -> None:
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise _refused(name, f"not a valid name of {what}")


def _refused(value: object, why: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ConfigError(
        f"{shown} cannot be written to a gin file: {why}", fix="Correct the file or directory that it comes from."
    )
