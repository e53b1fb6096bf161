"""Readers that validate the references and predictions of metrics and convert them to one form.

A reference is the output of a task's postprocessor: any JSON value. Each metric has one reader (`Metric.read`), which
accepts the forms that occur in data sets and raises `WrongValue` for all others. `Metric` adds the names of the example
and of the metric to the message.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.evaluation.metrics_answers import last_number
from diffusion_lm.evaluation.metrics_reasoning import final_answer

Reader = Callable[[object], Any]
"""Converts a reference of any form to the form that the rows of its metric take."""


class WrongValue(ValueError):
    """A reference or a prediction has the wrong form.

    Attributes:
      what: the error; continues a sentence that starts with the name of the example.
      fix: how to fix it.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def _plain(value: object) -> Any:
    """Converts arrays and NumPy scalars to Python values, bytes to text, and tuples to lists."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def text(reference: object) -> str:
    """Returns the text of a reference with exactly one text, for BLEU and ROUGE."""
    value = _plain(reference)
    if isinstance(value, list) and len(value) == 1:
        value = _plain(value[0])
    if not isinstance(value, str):
        raise WrongValue(f"has reference {_shown(value)}: must be one text", "Use a single text as reference.")
    return value


_ANSWERS = 'Use a text, a list of texts, or {"answers": [...]}.'


def possible_answers(reference: object) -> list[str]:
    """Returns the answers of a reference; the list is empty for an unanswerable question.

    Forms: a text; a list of texts; `{"answers": ...}` with either; Hugging Face's `{"text": [...], "answer_start":
    [...]}`; the official file's `[{"text": ..., "answer_start": ...}, ...]`.
    """
    value = _plain(reference)
    for key in ("answers", "text"):
        if isinstance(value, Mapping) and key in value:
            value = _plain(value[key])
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        value = [
            _plain(item["text"]) if isinstance(item, Mapping) and "text" in item else _plain(item) for item in value
        ]
        if all(isinstance(item, str) for item in value):
            return value
    raise WrongValue(f"has reference {_shown(reference)}: not a list of answers", _ANSWERS)


def answers(reference: object) -> list[str]:
    """Returns the answers of a reference with at least one answer."""
    found = possible_answers(reference)
    if not found:
        raise WrongValue("has no answer in its reference", "Add an answer, or remove the example.")
    return found


def numbers(reference: object) -> list[str]:
    """Returns the answers of a reference as texts that each contain a number; answers may also be numbers."""

    def as_text(value: object) -> object:
        value = _plain(value)
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    value = _plain(reference)
    if isinstance(value, Mapping) and "answers" in value:
        value = _plain(value["answers"])
    found = answers([as_text(item) for item in value] if isinstance(value, list) else as_text(value))
    for answer in found:
        if last_number(answer) is None:
            raise WrongValue(f"has reference {_shown(answer)}: must contain a number", "Add the number.")
    return found


def chain_answer(reference: object) -> str:
    """Returns the answer of `{"answer": text or number}`, or the text after the last `####` of a chain of thought."""
    value = _plain(reference)
    found = _plain(value.get("answer")) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        found = final_answer(value)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise WrongValue(
            f"has reference {_shown(value)}: no answer found", 'Use {"answer": "18"}, or a text with "#### 18".'
        )
    return str(found)


def countdown(reference: object) -> Mapping[str, Any]:
    """Returns a reference of the form `{"numbers": [int, ...], "goal": int}`."""
    value = _plain(reference)
    given = _plain(value.get("numbers")) if isinstance(value, Mapping) else None
    goal = _plain(value.get("goal")) if isinstance(value, Mapping) else None
    valid = isinstance(given, list) and bool(given) and all(_is_int(_plain(item)) for item in [*given, goal])
    if not valid:
        raise WrongValue(
            f"has reference {_shown(value)}: must have integers under 'numbers' and 'goal'",
            'Use {"numbers": [integers], "goal": integer}.',
        )
    return {"numbers": [_plain(item) for item in given], "goal": goal}  # type: ignore[union-attr]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_PROBLEM = 'Use {"setup": "...", "tests": ["assert ...", ...]}.'


def problem(reference: object) -> Mapping[str, Any]:
    """Returns `{"setup", "tests", "before", "after"}`, where `tests` is a list; a single text is one test.

    The reference may be JSON text. A problem without a test is an error, because every sample would pass.
    """
    value = _plain(reference)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise WrongValue(f"has reference {_shown(value)}: not valid JSON", _PROBLEM) from error
    if not isinstance(value, Mapping) or "tests" not in value:
        raise WrongValue(f"has reference {_shown(value)}: 'tests' is missing", _PROBLEM)
    tests = _plain(value["tests"])
    tests = [tests] if isinstance(tests, str) else tests
    tests = [_plain(test) for test in tests] if isinstance(tests, list) else tests
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise WrongValue(f"has tests {_shown(value['tests'])}: must be a list of texts", _PROBLEM)
    if not any(_has_statement(test) for test in tests):
        raise WrongValue("has no test", "Add a test, or remove the example.")
    around = {name: _plain(value.get(name, "")) for name in ("setup", "before", "after")}
    for name, part in around.items():
        if not isinstance(part, str):
            raise WrongValue(f"has {name}={_shown(part)}: must be a text", _PROBLEM)
    return {**around, "tests": tests}


def _has_statement(test: str) -> bool:
    """Returns whether a test has a line that is neither empty nor a comment."""
    return any(line.strip() and not line.strip().startswith("#") for line in test.splitlines())


def prediction(value: object) -> str:
    """Returns the text of a prediction."""
    value = _plain(value)
    if not isinstance(value, str):
        raise WrongValue(f"has prediction {_shown(value)}: must be a text", "Use a text as prediction.")
    return value


def samples(value: object) -> list[str]:
    """Returns the samples of a prediction; a single text is one sample."""
    value = _plain(value)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(_plain(one), str) for one in value):
        raise WrongValue(f"has samples {_shown(value)}: must be a list of texts", "Use a list of texts.")
    return [_plain(one) for one in value]
