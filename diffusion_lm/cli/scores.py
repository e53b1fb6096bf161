"""Files that keep the numbers of `evaluate --estimator`, `--suite` and `--judge`, each with its configuration."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_lm.cli.output import plain
from diffusion_lm.cli.run_folder import OpenRun
from diffusion_lm.core.errors import require
from diffusion_lm.core.files import as_path, json_text, read_json, write_text
from diffusion_lm.evaluation.generation import GenerationEvaluation
from diffusion_lm.evaluation.generative import GenerativeEvaluation
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation
from diffusion_lm.training.card import first_difference

Scored = ScoringEvaluation | GenerationEvaluation | GenerativeEvaluation

FOLDER = "scores"
"""Where a run folder keeps scores, one file a configuration."""


def refuse_another(path: str | None, chosen: Sequence[Scored], opened: OpenRun) -> None:
    """Raises `ConfigError` where `--json` names a file that holds scores of another configuration."""
    if path in (None, "-") or not as_path(path).exists():
        return
    there = read_json(path)
    found = there.get("evaluations", {}) if isinstance(there, dict) else {"": {}}
    here = {one.name: json.loads(json_text(_configuration(one, opened))) for one in chosen}
    before = {name: result.get("configuration") for name, result in found.items()}
    difference = first_difference(before, here, "evaluations")
    require(
        difference is None,
        f"{path} holds scores of another configuration: {difference}",
        where="--json",
        fix="Name another file, or remove that one.",
    )


def record(evaluation: Scored, opened: OpenRun, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes one evaluation's numbers to WORKDIR/scores; returns its configuration and the file.

    The file's name holds a hash of the configuration, so no other configuration's file is ever replaced.
    """
    configuration = _configuration(evaluation, opened)
    mark = hashlib.sha256(json.dumps(configuration, sort_keys=True, allow_nan=False).encode()).hexdigest()[:10]
    by = type(evaluation.estimator if isinstance(evaluation, ScoringEvaluation) else evaluation.sampler).__name__
    name = f"{evaluation.name.split('/', 1)[-1].replace('/', '.')}.{by}.{mark}.json"
    path = opened.folder / FOLDER / name
    kept = {"workdir": str(opened.folder), "name": evaluation.name, **result, "configuration": configuration}
    write_text(path, json_text(plain(kept), indent=1) + "\n")
    return {"configuration": configuration, "file": str(path)}


def _configuration(evaluation: Scored, opened: OpenRun) -> dict[str, Any]:
    return {"step": opened.step, **evaluation.identity}
