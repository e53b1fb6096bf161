"""A run or a speed study against Hugging Face transformers on PyTorch: the same weights, tokens and shapes in turns.

Our side initialises the network and writes it as a checkpoint; the other side reads that. So both count the same
parameters, which is checked, and where both compute the same thing their first results agree, which is reported.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.bench.batches import conditioning_length, synthetic_batch
from diffusion_lm.bench.children import ChildSide, our_child, torch_child
from diffusion_lm.bench.decode import DecodeSide
from diffusion_lm.bench.sides import Side
from diffusion_lm.bench.train import BATCHES, TrainSide
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import write_json
from diffusion_lm.evaluation.speed import random_prompt
from diffusion_lm.evaluation.timing import alternate
from diffusion_lm.interop.save import family_for
from diffusion_lm.nn.transformer import TransformerSpec


def run_rounds(sides: Sequence[Side], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each round of every label of every side, in turns; a first round is not counted."""
    entries = [(side, label) for side in sides for label in side.labels]
    calls = [lambda number, side=side, label=label: side.measure(label, number) for side, label in entries]
    warm = 1 if rounds else 0
    seconds = alternate(calls, rounds + warm)
    return {label: times[warm:] for (_, label), times in zip(entries, seconds, strict=True)}


def measure_alone(side: Side, rounds: int) -> dict[str, Any]:
    """Prepares and times one side in this process.

    Returns:
      `{"facts": what it says of itself, "seconds": {label: [seconds of each round]}}`.
    """
    facts = dict(side.prepare())
    seconds = run_rounds([side], rounds)
    return {"facts": facts | dict(side.finish()), "seconds": seconds}


def train_against_torch(side: TrainSide, rounds: int, python: str | None = None) -> dict[str, Any]:
    """Times a training step and that of transformers, each in a child.

    Returns:
      `{"facts", "torch": the other side's facts, "seconds": {label: ...}, "checks"}`.

    Raises:
      ConfigError: torch is missing, or transformers has no such network, or counts other parameters.
    """
    run = side.run
    _check_comparable(run.model.spec, run.data.encoder_length)
    optimizer: Any = run.optimizer
    wanted = {
        "tokens": [synthetic_batch(run, number).tokens.tolist() for number in range(BATCHES)],
        "conditioning": conditioning_length(run),
        "steps": side.steps,
        "optimizer": {
            "lr": float(optimizer.schedule.value(0, max(run.steps, 1))),
            "betas": [getattr(optimizer, "b1", 0.9), getattr(optimizer, "b2", 0.98)],
            "eps": getattr(optimizer, "eps", 1e-8),
            "weight_decay": getattr(optimizer, "weight_decay", 0.01),
            "clip_norm": getattr(optimizer, "clip_norm", 1.0),
        },
    }
    found = _measure_both(side, "train", wanted, rounds, python)
    ours, theirs = found["facts"], found["torch"]
    _check_parameters(run.model.spec, ours["parameters"], theirs["parameters"])
    found["checks"] = {"parameters": theirs["parameters"]}
    needs = run.objective.needs()
    if needs.visibility == "causal" and needs.passes == 1 and not needs.mask_token:
        found["checks"]["first_loss_difference"] = abs(ours["first_loss"] - theirs["first_loss"])
    return found


def decode_against_torch(side: DecodeSide, rounds: int, python: str | None = None) -> dict[str, Any]:
    """Times every arm of a study and transformers' cached `generate`; returns and raises as `train_against_torch`."""
    study = side.study
    networks = {arm.architecture for arm in study.arms}
    require(
        len(networks) == 1,
        f"the study's arms have {len(networks)} networks",
        where="--against torch",
        fix="Give arms of one network.",
    )
    network = study.arms[0].architecture
    _check_comparable(network.spec, 1 if network.needs_encoder else None)
    prompt = random_prompt(network, study.batch_size, study.prompt_length, side.length)
    tokens = np.asarray(prompt.tokens)[:, : study.prompt_length].tolist()
    found = _measure_both(side, "decode", {"tokens": tokens, "new_tokens": side.length}, rounds, python)
    theirs = found["torch"]
    arms = found["facts"]["arms"]
    _check_parameters(network.spec, next(iter(arms.values()))["parameters"], theirs["parameters"])
    agreement = {label: same_tokens(arm, theirs["window"]) for label, arm in arms.items() if arm["greedy"]}
    found["checks"] = {"parameters": theirs["parameters"], "same_tokens": agreement}
    return found


def same_tokens(arm: Mapping[str, Any], theirs: Sequence[Sequence[int]]) -> float | None:
    """Returns the share of equal tokens of a greedy arm and of the other side, i32[B,W] both.

    Rows in which the other side emits what the arm may not (PAD or EOS, so that it fills the window) are left out: they
    part there for a reason. None where no other is left. To make the other side avoid them would slow it down.
    """
    ours, others = np.asarray(arm["window"]), np.asarray(theirs)
    comparable = ~np.isin(others, arm["forbidden"]).any(axis=1)
    return float(np.mean((ours == others)[comparable])) if comparable.any() else None


def _measure_both(
    side: TrainSide | DecodeSide, task: str, wanted: Mapping[str, Any], rounds: int, python: str | None
) -> dict[str, Any]:
    with ExitStack() as stack:
        theirs: ChildSide = stack.enter_context(torch_child(python, task))
        ours: ChildSide = stack.enter_context(our_child(side))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diffusion_lm_bench_")))
        facts = dict(ours.prepare(str(folder / "model")))
        question = {**wanted, "model": str(folder / "model"), "platform": facts.pop("platform")}
        write_json(folder / "wanted.json", question)
        other = {**theirs.facts, **theirs.prepare(str(folder / "wanted.json"))}
        seconds = run_rounds([theirs, ours], rounds)
        facts |= ours.finish()
        other |= theirs.finish()
    return {"facts": facts, "torch": other, "seconds": seconds}


def _check_comparable(spec: TransformerSpec, encoder_length: int | None) -> None:
    require(
        encoder_length is None,
        "only networks without an encoder are compared",
        where="--against torch",
        fix="Give a decoder-only network.",
    )
    require(
        spec.dtype == "float32" and spec.param_dtype == "float32",
        f"the network computes in {spec.dtype}, and both sides are compared in float32",
        where="TransformerSpec.dtype",
        fix="Add --gin.TransformerSpec.dtype=float32.",
    )
    try:
        family_for(spec, None)
    except ConfigError as error:
        raise ConfigError(
            "no family of transformers has networks of this shape",
            where="--against torch",
            fix="Compare one that it has; export --layout FAMILY says in which fields a run's network differs.",
        ) from error


def _check_parameters(spec: TransformerSpec, ours: int, theirs: int) -> None:
    """Raises `ConfigError` unless both sides have as many parameters, rows that pad our vocabulary apart."""
    tables = 1 if spec.tied_embeddings else 2
    padding = (spec.padded_vocab_size - spec.vocab_size) * spec.model_dim * tables
    require(
        ours - padding == theirs,
        f"our network has {ours - padding:,} parameters and that of transformers {theirs:,}",
        where="--against torch",
        fix="Compare a network of a family that transformers has (diffusion-lm list families).",
    )
