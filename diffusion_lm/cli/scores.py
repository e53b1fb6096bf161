"""Writes the results of `evaluate --estimator`, `--suite` and `--judge` to files, together with their configuration."""

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
"""Subdirectory of a run directory for scores, one file per configuration."""


def refuse_another(path: str | None, chosen: Sequence[Scored], opened: OpenRun) -> None:
    """Raises `ConfigError` if the file of `--json` exists and holds scores of another configuration."""
    if path in (None, "-") or not as_path(path).exists():
        return
    existing = read_json(path)
    results = existing.get("evaluations", {}) if isinstance(existing, dict) else {"": {}}
    new = {one.name: json.loads(json_text(_configuration(one, opened))) for one in chosen}
    old = {name: result.get("configuration") for name, result in results.items()}
    difference = first_difference(old, new, "evaluations")
    require(
        difference is None,
        f"{path} holds scores of another configuration: {difference}",
        where="--json",
        fix="Pass another file, or delete this one.",
    )


def record(evaluation: Scored, opened: OpenRun, result: Mapping[str, object]) -> dict[str, Any]:
    """Writes the result of one evaluation to WORKDIR/scores; returns its configuration and the path of the file.

    The file name contains a hash of the configuration, so results of another configuration are never overwritten.
    """
    configuration = _configuration(evaluation, opened)
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, allow_nan=False).encode()).hexdigest()[:10]
    method = type(evaluation.estimator if isinstance(evaluation, ScoringEvaluation) else evaluation.sampler).__name__
    name = f"{evaluation.name.split('/', 1)[-1].replace('/', '.')}.{method}.{digest}.json"
    path = opened.folder / FOLDER / name
    content = {"workdir": str(opened.folder), "name": evaluation.name, **result, "configuration": configuration}
    write_text(path, json_text(plain(content), indent=1) + "\n")
    return {"configuration": configuration, "file": str(path)}


def _configuration(evaluation: Scored, opened: OpenRun) -> dict[str, Any]:
    return {"step": opened.step, **evaluation.identity}
