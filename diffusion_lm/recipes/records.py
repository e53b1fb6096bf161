"""Names for the JSON objects that the report reads. `report.write` lists their fields."""

from collections.abc import Mapping
from typing import Any

JsonObject = Mapping[str, Any]
"""A JSON object whose fields are checked where they are read."""

Results = JsonObject
"""The content of `results.json`."""

ArmCard = JsonObject
"""An element of `results["arms"]`: label, family, parameters, training tokens and stages of an arm."""

StageCard = JsonObject
"""An element of the `stages` of an `ArmCard`."""

TaskCard = JsonObject
"""An element of `results["tasks"]`: label and metric of a task."""

Cell = JsonObject
"""`results["cells"][arm][task]`: score, interval and conditions of an arm on a task."""

Bound = JsonObject
"""`results["bounds"][arm][task]`: the values of `likelihood.evaluate_bound`."""

Evaluation = JsonObject
"""The content of `evaluations/ARM/TASK.json`: statistics, predictions, bound and costs of an arm on a task."""

Speed = JsonObject
"""The content of `speed.json`: device and rows of `evaluation.speed.measure`."""

SpeedRow = JsonObject
"""An element of `speed["rows"]`: one decoder at one output length."""

LogRow = JsonObject
"""A row of `metrics.jsonl`."""

Sample = JsonObject
"""An example with the completions of all arms (`results.shown_samples`)."""

Playback = JsonObject
"""The denoising steps of one example (`playback.record_playback`)."""
