"""Countdown: reach a goal by arithmetic from given numbers, each used once (Stream of Search, arXiv 2404.03683).

    inputs  86,28,13,31,96                                four numbers, then the goal
    targets 86+28=114,31-13=18,114-18=96                  three steps; a step may use results of earlier ones

The goal is the result of random steps over four random numbers, so every problem has a solution. Numbers are 1 to 99
and goals 10 to 100. All results are positive integers of at most 9,999.
"""

import functools
import json
import random

from diffusion_lm_tasks.splits import Example, deal

SIZES = {"train": 500_000, "validation": 1_000, "test": 1_000}
"""Number of examples per split; the number of training problems is that of arXiv 2404.03683."""

NUMBERS = 4
_LARGEST = 9_999


def make(draw: random.Random) -> Example:
    """Draws a problem with its solution; the set of its numbers determines the split."""
    while True:
        numbers = [draw.randint(1, 99) for _ in range(NUMBERS)]
        steps, pool = [], list(numbers)
        while len(pool) > 1:
            first, second = draw.sample(range(len(pool)), 2)
            step = _step(pool[first], pool[second], draw.choice("+-*/"))
            if step is None:
                break
            text, result = step
            steps.append(text)
            pool = [value for place, value in enumerate(pool) if place not in (first, second)] + [result]
        if len(pool) == 1 and 10 <= pool[0] <= 100:
            return Example(
                inputs=",".join(map(str, [*numbers, pool[0]])),
                targets=",".join(steps),
                key=",".join(map(str, sorted(numbers))),
                reference=json.dumps({"numbers": numbers, "goal": pool[0]}),
            )


def _step(a: int, b: int, operator: str) -> tuple[str, int] | None:
    """Returns a step as text and its result; None if the result is not a positive integer or too large."""
    if operator == "/" and a % b:
        return None
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
    return (f"{a}{operator}{b}={result}", result) if 0 < result <= _LARGEST else None


@functools.cache
def examples() -> dict[str, tuple[Example, ...]]:
    """Returns the examples by split; no set of four numbers is in two of them."""
    return deal(make, SIZES, seed="countdown4", attempts=4 * sum(SIZES.values()))
