"""Function synthesis: a description in English, a short Python function, hidden unit tests.

Each family is a description, an expression and a reference behaviour; constants, function name and argument name vary.
The expected values of the tests come from the reference behaviour on fixed arguments, not from the solution. The split
depends on what the function computes (family and constants), so training contains no held-out function under any name.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Callable
from typing import Any

from diffusion_lm_tasks.splits import Example, deal

SIZES = {"train": 12_000, "validation": 300, "test": 300}

NAMES = ["solve", "compute", "apply", "convert", "process", "run", "check", "find", "get", "make", "change", "update"]
_ARGUMENTS = {"number": ("x", "n"), "list": ("values", "items"), "string": ("text", "word")}
_NUMBERS = (0, 1, 2, 3, 5, 8, 10, 12, 17, 30, 64, -4)
_LISTS: tuple[list[int], ...] = ([3, 1, 2], [], [5, 12, 7, 20, 8, 15], [4, 4, 9, 10, 6, 30], [-2, 0, 2, 18, 11, 14])
_STRINGS = ("banana", "", "hello world", "a-b-c", "Mississippi river", "python code", "end")
_LETTERS = "abcdehilmnoprst"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of functions that differ in their constants.

    Attributes:
      kind: type of the argument: "number", "list" or "string".
      description: what the function returns; `{a}` is the argument, `{j}` and `{k}` the constants.
      expression: the reference solution, with the same placeholders.
      behaviour: `(argument, j, k) -> value`, written independently of the expression.
      j, k: possible values of the constants; None if the family does not use one.
    """

    kind: str
    description: str
    expression: str
    behaviour: Callable[[Any, Any, Any], Any]
    k: tuple[Any, ...] = tuple(range(2, 20))
    j: tuple[Any, ...] = (None,)


_SMALL = tuple(range(1, 7))
_LETTER = tuple(_LETTERS)


def _sorted_descending(values: list[int]) -> list[int]:
    return [-v for v in sorted(-v for v in values)]


FAMILIES: tuple[Family, ...] = (
    Family("number", "{a} plus {k}", "{a} + {k}", lambda a, j, k: sum((a, k))),
    Family("number", "{a} minus {k}", "{a} - {k}", lambda a, j, k: a + -k),
    Family("number", "{k} minus {a}", "{k} - {a}", lambda a, j, k: -a + k),
    Family("number", "{a} times {k}", "{a} * {k}", lambda a, j, k: sum([a] * k)),
    Family("number", "the quotient of {a} by {k}", "{a} // {k}", lambda a, j, k: divmod(a, k)[0]),
    Family("number", "the remainder of {a} by {k}", "{a} % {k}", lambda a, j, k: divmod(a, k)[1]),
    Family("number", "{a} to the power {k}", "{a} ** {k}", lambda a, j, k: pow(a, k), k=_SMALL),
    Family("number", "whether {a} is greater than {k}", "{a} > {k}", lambda a, j, k: not a <= k),
    Family("number", "whether {a} is less than {k}", "{a} < {k}", lambda a, j, k: not a >= k),
    Family("number", "whether {a} is a multiple of {k}", "{a} % {k} == 0", lambda a, j, k: a // k * k == a),
    Family("number", "the larger of {a} and {k}", "max({a}, {k})", lambda a, j, k: a if a > k else k),
    Family("number", "the smaller of {a} and {k}", "min({a}, {k})", lambda a, j, k: a if a < k else k),
    Family(
        "number", "{a} times {j} plus {k}", "{a} * {j} + {k}", lambda a, j, k: sum([a] * j) + k, j=tuple(range(2, 20))
    ),
    Family(
        "number", "{a} times {j} minus {k}", "{a} * {j} - {k}", lambda a, j, k: sum([a] * j) - k, j=tuple(range(2, 20))
    ),
    Family("list", "each number plus {k}", "[v + {k} for v in {a}]", lambda a, j, k: list(map(k.__add__, a))),
    Family("list", "each number times {k}", "[v * {k} for v in {a}]", lambda a, j, k: list(map(k.__mul__, a))),
    Family(
        "list", "the numbers greater than {k}", "[v for v in {a} if v > {k}]", lambda a, j, k: [*filter(k.__lt__, a)]
    ),
    Family("list", "the numbers less than {k}", "[v for v in {a} if v < {k}]", lambda a, j, k: [*filter(k.__gt__, a)]),
    Family(
        "list",
        "the multiples of {k}",
        "[v for v in {a} if v % {k} == 0]",
        lambda a, j, k: [v for v in a if v // k * k == v],
        k=tuple(range(2, 12)),
    ),
    Family(
        "list",
        "{j} times each number greater than {k}",
        "[v * {j} for v in {a} if v > {k}]",
        lambda a, j, k: [v * j for v in a if not v <= k],
        j=tuple(range(2, 12)),
    ),
    Family(
        "list",
        "the sum of the numbers greater than {k}",
        "sum(v for v in {a} if v > {k})",
        lambda a, j, k: sum([v for v in a if not v <= k]),
    ),
    Family("list", "the number of times {k} occurs", "{a}.count({k})", lambda a, j, k: len([v for v in a if v == k])),
    Family("list", "whether {k} occurs", "{k} in {a}", lambda a, j, k: any(v == k for v in a)),
    Family(
        "list",
        "the first {k} numbers",
        "{a}[:{k}]",
        lambda a, j, k: [v for _, v in zip(range(k), a, strict=False)],
        k=_SMALL,
    ),
    Family("list", "the last {k} numbers", "{a}[-{k}:]", lambda a, j, k: a[max(len(a) - k, 0) :], k=_SMALL),
    Family(
        "list",
        "the {k} largest numbers in descending order",
        "sorted({a}, reverse=True)[:{k}]",
        lambda a, j, k: _sorted_descending(a)[:k],
        k=_SMALL,
    ),
    Family("list", "the sum of all numbers plus {k}", "sum({a}) + {k}", lambda a, j, k: sum([*a, k])),
    Family("string", "the string repeated {k} times", "{a} * {k}", lambda a, j, k: "".join([a] * k)),
    Family("string", "the first {k} characters", "{a}[:{k}]", lambda a, j, k: "".join([*a][:k]), k=_SMALL),
    Family("string", "the last {k} characters", "{a}[-{k}:]", lambda a, j, k: a[max(len(a) - k, 0) :], k=_SMALL),
    Family(
        "string", "the first {k} characters in upper case", "{a}[:{k}].upper()", lambda a, j, k: a.upper()[:k], k=_SMALL
    ),
    Family("string", "the number of letters '{k}'", "{a}.count('{k}')", lambda a, j, k: [*a].count(k), k=_LETTER),
    Family("string", "whether it starts with '{k}'", "{a}.startswith('{k}')", lambda a, j, k: a[:1] == k, k=_LETTER),
    Family("string", "whether it ends with '{k}'", "{a}.endswith('{k}')", lambda a, j, k: a[-1:] == k, k=_LETTER),
    Family(
        "string",
        "the string with '{j}' replaced by '{k}'",
        "{a}.replace('{j}', '{k}')",
        lambda a, j, k: "".join(k if c == j else c for c in a),
        k=_LETTER,
        j=_LETTER,
    ),
    Family(
        "string",
        "the string without '{k}'",
        "{a}.replace('{k}', '')",
        lambda a, j, k: "".join(c for c in a if c != k),
        k=_LETTER,
    ),
)

_EXAMPLES: dict[str, tuple[Any, ...]] = {"number": _NUMBERS, "list": _LISTS, "string": _STRINGS}


def tests_of(family: Family, name: str, j: int | str | None, k: int | str | None) -> list[str]:
    """Returns the hidden asserts, which check type and value for every example argument of the family's kind.

    Arguments include numbers and lists around `k`, so that `>` and `>=` differ.
    """
    arguments = list(_EXAMPLES[family.kind])
    if isinstance(k, int):
        arguments += {"number": [k, k + 1], "list": [[k, k + 1, k - 1, 2 * k]], "string": ["x" * k]}[family.kind]
    elif k is not None:
        arguments += [k, f"x{k}", f"{k}x", f"{k}{j}{k}"]
    # Unlike `==`, `repr` distinguishes True from 1 and 2 from 2.0.
    return [f"assert repr({name}({a!r})) == {repr(family.behaviour(a, j, k))!r}" for a in arguments]


def make(rng: random.Random) -> Example:
    """Draws one problem."""
    number = rng.randrange(len(FAMILIES))
    family = FAMILIES[number]
    name, argument = rng.choice(NAMES), rng.choice(_ARGUMENTS[family.kind])
    j, k = rng.choice(family.j), rng.choice(family.k)
    fields = {"a": argument, "j": j, "k": k}
    return Example(
        inputs=f"Write a function {name}({argument}) that returns {family.description.format(**fields)}.",
        targets=f"def {name}({argument}):\n    return {family.expression.format(**fields)}",
        key=f"{number}/{j}/{k}",
        reference=json.dumps({"setup": "", "tests": tests_of(family, name, j, k)}),
    )


@functools.cache
def examples() -> dict[str, tuple[Example, ...]]:
    """Returns the examples by split; a function (family and constants) occurs in one split only."""
    return deal(make, SIZES, "embedded_code")
