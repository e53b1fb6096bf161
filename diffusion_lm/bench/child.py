"""The child's end of `children.our_child`: unpacks a side and answers for it until nobody asks."""

import base64
import json
import os
import pickle
import sys
from typing import Any

from diffusion_lm.bench.sides import Side
from diffusion_lm.core.errors import ConfigError


def main() -> None:
    """Answers questions from stdin; what libraries print goes to stderr, so that only answers go up."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["do"] == "greet":
                side = pickle.loads(base64.b64decode(question["side"]))
                answer: dict[str, Any] = {"labels": list(side.labels)}
            else:
                answer = _answer(side, question)
        except ConfigError as error:
            answer = {"error": error.what, "where": error.where, "fix": error.fix}
        answers.write(json.dumps(answer, allow_nan=False) + "\n")


def _answer(side: Side, question: dict[str, Any]) -> dict[str, Any]:
    match question["do"]:
        case "prepare":
            return dict(side.prepare(question["export"]))
        case "measure":
            return {"seconds": side.measure(question["label"], question["number"])}
        case "finish":
            return dict(side.finish())
    raise AssertionError(question)


if __name__ == "__main__":
    main()
