"""The bindings of gin files as plain data, one per statement. Only `gin_reader.py` deals with gin's own types."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

Origin = Literal["command line", "given file", "included file"]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference `@target`, or `@target()` with `called`, inside a bound value."""

    target: Callable[..., object]
    called: bool


@dataclasses.dataclass(frozen=True)
class Macro:
    """A macro reference `%name` inside a bound value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Required:
    """`%gin.REQUIRED`: a macro that the user must define."""


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A value that is only known once it is built, such as the result of a function."""


@dataclasses.dataclass(frozen=True)
class Binding:
    """One statement `scope/Class.parameter = value`, or `scope/MACRO = value`.

    Attributes:
      scope: the scope, or for a macro its name, including scopes.
      selector: gin's full name of the class or function; empty for macros.
      parameter: the parameter's name; empty for macros.
      value: the bound value; references and macros are `Reference` and `Macro` objects.
      target: the class or function; None for macros.
      where: `file:line`, or the command-line flag.
      origin: whether a flag, a file of `--gin_file` or an included file made the binding.
    """

    scope: str
    selector: str
    parameter: str
    value: object
    target: Callable[..., object] | None
    where: str
    origin: Origin

    @property
    def is_macro(self) -> bool:
        """Whether this defines a macro."""
        return not self.selector

    @property
    def class_name(self) -> str:
        """The last part of the selector."""
        return self.selector.rsplit(".", 1)[-1]

    @property
    def name(self) -> str:
        """The binding as users write it, without module names: `ar/TrainRun.steps` or `TRAIN_STEPS`."""
        if self.is_macro:
            return self.scope
        name = f"{self.class_name}.{self.parameter}"
        return f"{self.scope}/{name}" if self.scope else name

    @property
    def key(self) -> tuple[str, str, str]:
        """The identity of the parameter; a later binding with the same key replaces an earlier one."""
        return self.scope, self.selector, self.parameter


Current = Mapping[tuple[str, str, str], Binding]
"""The effective binding of each key."""


def leaves(value: object) -> Iterator[object]:
    """Yields the leaves of a bound value, descending into dicts, lists and tuples."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def macros_in(value: object) -> list[str]:
    """Returns the names of the macros that a bound value refers to."""
    return [leaf.name for leaf in leaves(value) if isinstance(leaf, Macro)]


def follow(value: object, current: Current) -> tuple[Any, list[Binding]]:
    """Replaces macros by their values; returns the value and the bindings of these macros, outermost last."""
    if isinstance(value, Macro):
        source = current[value.name, "", ""]
        followed, deeper = follow(source.value, current)
        return followed, [*deeper, source]
    if isinstance(value, list | tuple):
        pairs = [follow(one, current) for one in value]
        return type(value)(one for one, _ in pairs), [source for _, sources in pairs for source in sources]
    if isinstance(value, Mapping):
        pairs = [follow(one, current) for one in value.values()]
        return dict(zip(value, (one for one, _ in pairs), strict=True)), [one for _, found in pairs for one in found]
    return value, []


def shown(value: object) -> str:
    """Formats a bound value as it would be written in a gin file."""
    if isinstance(value, Reference):
        return f"@{value.target.__name__}{'()' if value.called else ''}"
    if isinstance(value, Macro):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)
