"""Reads the references of metrics: each reader takes the forms that data sets have and refuses every other.

A reference is what a task's postprocessor returned, any JSON value. A metric names its reader (`Metric.read`), so rows
are computed from one form only. A reader raises `WrongValue`; `Metric` adds the example and the metric to the sentence.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.evaluation.metrics_answers import last_number
from diffusion_lm.evaluation.metrics_reasoning import final_answer

Reader = Callable[[Any], Any]


class WrongValue(ValueError):
    """A reference or a prediction of the wrong kind.

    Attributes:
      what: ends a sentence that begins with the example.
      fix: what to write instead.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def _plain(value: Any) -> Any:
    """Returns arrays and numpy scalars as Python values, bytes as text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def text(reference: Any) -> str:
    """Returns the one text of a reference: BLEU and ROUGE compare with one."""
    value = _plain(reference)
    if isinstance(value, list) and len(value) == 1:
        value = _plain(value[0])
    if not isinstance(value, str):
        raise WrongValue(f"has the reference {_shown(value)}, which is not one text", "Give one text.")
    return value


_ANSWERS = 'Give one text, a list of texts, or {"answers": [...]}.'


def possible_answers(reference: Any) -> list[str]:
    """Returns the answers of a reference, none for an unanswerable question.

    Forms: one text; several; `{"answers": ...}` of these; Hugging Face's `{"text": [...], "answer_start": [...]}`;
    the official file's `[{"text": ..., "answer_start": ...}, ...]`.
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
    raise WrongValue(f"has the reference {_shown(reference)}, which holds no answers", _ANSWERS)


def answers(reference: Any) -> list[str]:
    """Returns the answers of a reference, at least one."""
    found = possible_answers(reference)
    if not found:
        raise WrongValue("has no answer in its reference", "Give at least one, or leave the example out.")
    return found


def numbers(reference: Any) -> list[str]:
    """Returns the answers of a reference as texts with a number in each; answers may be numbers themselves."""

    def spelled(value: Any) -> Any:
        value = _plain(value)
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    value = _plain(reference)
    if isinstance(value, Mapping) and "answers" in value:
        value = _plain(value["answers"])
    found = answers([spelled(item) for item in value] if isinstance(value, list) else spelled(value))
    for answer in found:
        if last_number(answer) is None:
            raise WrongValue(f"has the reference {_shown(answer)}, which has no number", "Give the number.")
    return found


def chain_answer(reference: Any) -> str:
    """Returns the answer of `{"answer": text or number}`, or what follows the last `####` of a chain."""
    value = _plain(reference)
    found = _plain(value.get("answer")) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        found = final_answer(value)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise WrongValue(
            f"has the reference {_shown(value)}, which holds no answer", 'Give {"answer": "18"}, or a text with "####".'
        )
    return str(found)


def countdown(reference: Any) -> Mapping[str, Any]:
    """Returns `{"numbers": [int, ...], "goal": int}`."""
    value = _plain(reference)
    given = _plain(value.get("numbers")) if isinstance(value, Mapping) else None
    goal = _plain(value.get("goal")) if isinstance(value, Mapping) else None
    whole = isinstance(given, list) and bool(given) and all(_is_int(_plain(item)) for item in [*given, goal])
    if not whole:
        raise WrongValue(f"has the reference {_shown(value)}", 'Give {"numbers": [integers], "goal": integer}.')
    return {"numbers": [_plain(item) for item in given], "goal": goal}  # type: ignore[union-attr]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_PROBLEM = 'Give {"setup": "...", "tests": ["assert ...", ...]}.'


def problem(reference: Any) -> Mapping[str, Any]:
    """Returns `{"setup", "tests", "before", "after"}`, `tests` a list; tests that are one text are one test.

    A problem without a test would be solved by every sample, so it is refused. JSON text is read.
    """
    value = _plain(reference)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise WrongValue(f"has the reference {_shown(value)}, which is not JSON", _PROBLEM) from error
    if not isinstance(value, Mapping) or "tests" not in value:
        raise WrongValue(f"has the reference {_shown(value)}, which names no tests", _PROBLEM)
    tests = _plain(value["tests"])
    tests = [tests] if isinstance(tests, str) else tests
    tests = [_plain(test) for test in tests] if isinstance(tests, list) else tests
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise WrongValue(f"has the tests {_shown(value['tests'])}, which are not texts", _PROBLEM)
    if not any(_does_something(test) for test in tests):
        raise WrongValue("has no test", "Give at least one, or leave the example out.")
    around = {name: _plain(value.get(name, "")) for name in ("setup", "before", "after")}
    for name, part in around.items():
        if not isinstance(part, str):
            raise WrongValue(f"has {name} = {_shown(part)}, which is not a text", _PROBLEM)
    return {**around, "tests": tests}


def _does_something(test: str) -> bool:
    """Whether a test has a line that is neither empty nor a comment."""
    return any(line.strip() and not line.strip().startswith("#") for line in test.splitlines())


def prediction(value: Any) -> str:
    """Returns the text of a prediction."""
    value = _plain(value)
    if not isinstance(value, str):
        raise WrongValue(f"has the prediction {_shown(value)}, which is not a text", "Give one text.")
    return value


def samples(value: Any) -> list[str]:
    """Returns the samples of a prediction; one text is one sample."""
    value = _plain(value)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(_plain(one), str) for one in value):
        raise WrongValue(f"has the samples {_shown(value)}, which are not texts", "Give a list of texts.")
    return [_plain(one) for one in value]
