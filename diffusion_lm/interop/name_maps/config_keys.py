"""The keys of config.json that a family reads: name, type of the value, and what the value means for other families."""

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class ValueType:
    """The type that a value of config.json must have.

    Attributes:
      accepts: whether a value has the type.
      description: the type in words, for errors.
    """

    accepts: Callable[[object], bool]
    description: str


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """One key of config.json that a family reads.

    Attributes:
      name: the key.
      type: of its value; None if the code that reads it checks the value.
      is_neutral: whether a value changes nothing in networks of families that do not read the key. Those families
        refuse other values. None for keys that mean nothing to other families (a size, for example), which report
        them as unread.
    """

    name: str
    type: ValueType | None = None
    is_neutral: Callable[[object], bool] | None = None


def config_keys(
    type: ValueType | None, *names: str, is_neutral: Callable[[object], bool] | None = None
) -> tuple[ConfigKey, ...]:
    """Returns keys that have the same type and the same neutral values."""
    return tuple(ConfigKey(name, type, is_neutral) for name in names)


def _is_int(value: object) -> bool:
    # A bool is an int in Python, and not a number in JSON.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list_of(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


def _at_least_one(value: object) -> bool:
    return isinstance(value, int) and _is_int(value) and value > 0


def _above_zero(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and value > 0


def _is_string(value: object) -> bool:
    return isinstance(value, str)


COUNT = ValueType(_at_least_one, "a whole number above 0")
# The tensors of every layer are listed, so a damaged number of layers must not fill the memory.
LAYERS = ValueType(
    lambda value: _at_least_one(value) and isinstance(value, int) and value <= 10_000,
    "a whole number from 1 to 10,000",
)
INTEGER = ValueType(_is_int, "a whole number")
POSITIVE = ValueType(_above_zero, "a number above 0")
NUMBER = ValueType(_is_number, "a number")
BOOL = ValueType(lambda value: isinstance(value, bool), "true or false")
STRING = ValueType(_is_string, "a string")
STRINGS = ValueType(lambda value: _is_list_of(value, _is_string), "a list of strings")
OBJECT = ValueType(lambda value: isinstance(value, dict), "an object")
TOKEN_IDS = ValueType(lambda value: _is_int(value) or _is_list_of(value, _is_int), "a token id or a list of token ids")


def off(value: object) -> bool:
    """Neutral values of a switch."""
    return value is False


def never(value: object) -> bool:
    """Neutral values of a key that always changes the network; only null is accepted."""
    return False


def one(value: object) -> bool:
    """Neutral values of a factor."""
    return type(value) in (int, float) and value == 1
