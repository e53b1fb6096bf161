"""Compares a run or a speed study with Hugging Face transformers on PyTorch: same weights, tokens and shapes.

Our side initialises the network and writes it as a checkpoint, which the PyTorch side loads. Both sides must have the
same number of parameters. If both compute the same function, the difference of their first results is reported.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.bench.batches import conditioning_length, synthetic_batch
from diffusion_lm.bench.benchmark import Benchmark, Facts
from diffusion_lm.bench.children import ChildBenchmark, our_child, torch_child
from diffusion_lm.bench.decode import DecodeBenchmark
from diffusion_lm.bench.train import BATCHES, TrainBenchmark
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import write_json
from diffusion_lm.evaluation.speed import random_prompt
from diffusion_lm.evaluation.timing import alternate
from diffusion_lm.interop.save import family_for
from diffusion_lm.nn.transformer import TransformerSpec


def run_rounds(sides: Sequence[Benchmark], rounds: int) -> dict[str, list[float]]:
    """Times all labels of all sides in alternation; returns the seconds of each round by label.

    A warm-up round comes first and is discarded.
    """
    entries = [(side, label) for side in sides for label in side.labels]
    calls = [lambda number, side=side, label=label: side.measure(label, number) for side, label in entries]
    warm = 1 if rounds else 0
    seconds = alternate(calls, rounds + warm)
    return {label: times[warm:] for (_, label), times in zip(entries, seconds, strict=True)}


def measure_alone(side: Benchmark, rounds: int) -> dict[str, Any]:
    """Prepares and times one benchmark in this process.

    Returns:
      `{"facts": facts of the benchmark, "seconds": {label: [seconds of each round]}}`.
    """
    facts = dict(side.prepare())
    seconds = run_rounds([side], rounds)
    return {"facts": facts | dict(side.finish()), "seconds": seconds}


def train_against_torch(side: TrainBenchmark, rounds: int, python: str | None = None) -> dict[str, Any]:
    """Times a training step of a run and of transformers, each in a child process.

    Returns:
      `{"facts", "torch": facts of the PyTorch side, "seconds": {label: [seconds of each round]}, "checks"}`.

    Raises:
      ConfigError: torch is not installed, transformers has no such network, or the numbers of parameters differ.
    """
    run = side.run
    _check_comparable(run.model.spec, run.data.encoder_length)
    optimizer: Any = run.optimizer
    request = {
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
    found = _measure_both(side, "train", request, rounds, python)
    ours, theirs = found["facts"], found["torch"]
    _check_parameters(run.model.spec, ours["parameters"], theirs["parameters"])
    found["checks"] = {"parameters": theirs["parameters"]}
    needs = run.objective.needs()
    # Only next-token prediction computes the same loss on both sides.
    if needs.visibility == "causal" and needs.passes == 1 and not needs.mask_token:
        found["checks"]["first_loss_difference"] = abs(ours["first_loss"] - theirs["first_loss"])
    return found


def decode_against_torch(side: DecodeBenchmark, rounds: int, python: str | None = None) -> dict[str, Any]:
    """Times every arm of a study and `generate` of transformers with a KV cache; see `train_against_torch`."""
    study = side.study
    networks = {arm.architecture for arm in study.arms}
    require(
        len(networks) == 1,
        f"the arms of the study have {len(networks)} different networks",
        where="--against torch",
        fix="Use arms with the same network.",
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


def same_tokens(arm: Facts, theirs: Sequence[Sequence[int]]) -> float | None:
    """Returns the fraction of equal tokens of a greedy arm and of the PyTorch side (i32[B,W] each).

    The arm must not emit EOS or PAD, so that it decodes the full length. Rows where the PyTorch side emits one of these
    are excluded, because the sequences differ from there on for that reason. (Forbidding the tokens there too would
    slow the PyTorch side down.) Returns None if all rows are excluded.
    """
    ours, others = np.asarray(arm["window"]), np.asarray(theirs)
    comparable = ~np.isin(others, arm["forbidden"]).any(axis=1)
    return float(np.mean((ours == others)[comparable])) if comparable.any() else None


def _measure_both(
    side: TrainBenchmark | DecodeBenchmark, task: str, request: Facts, rounds: int, python: str | None
) -> dict[str, Any]:
    with ExitStack() as stack:
        # Start the PyTorch side first: a missing torch is then reported before our side compiles.
        theirs: ChildBenchmark = stack.enter_context(torch_child(python, task))
        ours: ChildBenchmark = stack.enter_context(our_child(side))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diffusion_lm_bench_")))
        facts = dict(ours.prepare(str(folder / "model")))
        request = {**request, "model": str(folder / "model"), "platform": facts.pop("platform")}
        write_json(folder / "request.json", request)
        other = {**theirs.facts, **theirs.prepare(str(folder / "request.json"))}
        seconds = run_rounds([theirs, ours], rounds)
        facts |= ours.finish()
        other |= theirs.finish()
    return {"facts": facts, "torch": other, "seconds": seconds}


def _check_comparable(spec: TransformerSpec, encoder_length: int | None) -> None:
    require(
        encoder_length is None,
        "networks with an encoder cannot be compared",
        where="--against torch",
        fix="Use a decoder-only network.",
    )
    require(
        spec.dtype == "float32" and spec.param_dtype == "float32",
        f"dtype={spec.dtype!r}, param_dtype={spec.param_dtype!r}: both must be 'float32' for the comparison",
        where="TransformerSpec.dtype",
        fix="Add --gin.TransformerSpec.dtype=float32.",
    )
    try:
        family_for(spec, None)
    except ConfigError as error:
        raise ConfigError(
            "transformers has no model of this shape",
            where="--against torch",
            fix="Use a shape that it has; export --layout FAMILY reports the fields in which a network differs.",
        ) from error


def _check_parameters(spec: TransformerSpec, ours: int, theirs: int) -> None:
    """Raises `ConfigError` unless both sides have the same number of parameters, without our vocabulary padding."""
    tables = 1 if spec.tied_embeddings else 2
    padding = (spec.padded_vocab_size - spec.vocab_size) * spec.model_dim * tables
    require(
        ours - padding == theirs,
        f"the network has {ours - padding:,} parameters, but the one of transformers has {theirs:,}",
        where="--against torch",
        fix="Use a network of a family that transformers has (diffusion-lm list families).",
    )
