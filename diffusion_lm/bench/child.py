"""The child process of `children.our_child`: unpickles a benchmark and serves requests until stdin is closed."""

import base64
import json
import os
import pickle
import sys
from typing import Any

from diffusion_lm.bench.benchmark import Benchmark, Facts
from diffusion_lm.core.errors import ConfigError


def main() -> None:
    """Answers one JSON request per line of stdin on stdout."""
    # Redirect descriptor 1 to stderr, so that output of libraries does not mix with the answers.
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


def _answer(side: Benchmark, question: Facts) -> dict[str, Any]:
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
