"""Checks bound values against the type annotations of their parameters. gin itself accepts any value.

The check is static: it reads the values in the gin files before any object is built, so errors can name file and line.
"""

import collections.abc
import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from diffusion_lm.cli.bindings import Reference, Unknown

_SCALARS = {int: "an int", float: "a float", bool: "a bool (True or False)", str: "a string", type(None): "None"}
_SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


TypeForm = Any
"""A type annotation at run time: a class, a union, a generic alias, `Any`, ..."""


def parameter_hints(target: Callable[..., object] | None) -> dict[str, TypeForm]:
    """Returns the resolved type annotations of a class or function, or an empty dict if they cannot be resolved."""
    owner = target
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        owner = target.__init__
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: object, hint: TypeForm) -> bool:
    """Returns whether a parameter annotated with `hint` accepts `value`.

    An int is accepted as a float, a list as a tuple, and a string as a path. Annotations that this check does not
    support accept every value.
    """
    origin: TypeForm = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any or isinstance(value, Unknown) or isinstance(hint, typing.TypeVar | str):
        return True
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if isinstance(value, Reference):
        return _reference_fits(value, origin or hint)
    if origin is Literal:
        # Compare types too, because True == 1 in Python.
        return any(type(value) is type(option) and value == option for option in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str):
        return type(value) is hint  # not isinstance: a bool is an int in Python
    if (origin or hint) in _SEQUENCES:
        return _sequence_fits(value, arguments, fixed=(origin or hint) is tuple)
    if (origin or hint) in (dict, collections.abc.Mapping):
        pairs = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and (
            not arguments or all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in pairs)
        )
    if (origin or hint) is collections.abc.Callable:
        return False
    if inspect.isclass(hint) and issubclass(hint, os.PathLike):
        return isinstance(value, str)
    if inspect.isclass(hint):
        return not isinstance(value, bool | int | float | str | list | tuple | dict | None) or _is_instance(value, hint)
    return True


def is_protocol(hint: object) -> bool:
    """Returns whether an annotation is a `typing.Protocol`."""
    return bool(getattr(hint, "_is_protocol", False))


def describe(hint: TypeForm) -> str:
    """Describes an annotation for error messages: `an int`, `one of 'none', 'full'`, `a tuple of int`."""
    origin: TypeForm = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in arguments))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if (origin or hint) in _SEQUENCES:
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"a tuple of {' and '.join(dict.fromkeys(_short(one) for one in inner))}" if inner else "a tuple"
    name = _short(hint)
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _short(hint: TypeForm) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_short(option) for option in typing.get_args(hint))
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def _is_instance(value: object, hint: type) -> bool:
    return not is_protocol(hint) and isinstance(value, hint)


def _sequence_fits(value: object, arguments: tuple[Any, ...], *, fixed: bool) -> bool:
    if not isinstance(value, list | tuple):
        return False
    if not arguments:
        return True
    if fixed and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    return all(fits(item, arguments[0]) for item in value)


def _reference_fits(reference: Reference, hint: TypeForm) -> bool:
    if not reference.called:
        is_callback = hint is collections.abc.Callable or hint is type or not inspect.isclass(hint)
        return is_callback or (is_protocol(hint) and "__call__" in vars(hint))
    if not inspect.isclass(reference.target):
        return True
    if is_protocol(hint):
        return not missing_members(reference.target, hint)
    if hint in _SEQUENCES or hint in _SCALARS or hint in (Literal, dict, collections.abc.Mapping):
        return False
    return not inspect.isclass(hint) or issubclass(reference.target, hint)


def missing_members(target: Callable[..., object], protocol: type) -> list[str]:
    """Returns the public members of a protocol that a class neither defines nor declares as a field."""
    required: dict[str, None] = {}
    for base in protocol.__mro__:
        if is_protocol(base) and base is not typing.Protocol:
            # A class that is not a dataclass may set its attributes in __init__, so only methods are checked there.
            fields = inspect.get_annotations(base) if dataclasses.is_dataclass(target) else ()
            required.update(dict.fromkeys([*fields, *vars(base)]))
    declared = {name for base in getattr(target, "__mro__", ()) for name in inspect.get_annotations(base)}
    return [
        name for name in required if not name.startswith("_") and name not in declared and not hasattr(target, name)
    ]
