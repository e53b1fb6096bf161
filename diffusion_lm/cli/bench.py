"""Benchmarks training, decoding, the input pipeline or startup. KIND is one of:

  train    the training step of a run on random tokens of its shapes; needs no data and no run directory
  decode   samplers on an untrained network with random prompts; always decodes the full target length
  data     the input pipeline of a run
  startup  import, --help, and a first training step with an empty and with a filled compilation cache

Each round measures every entry once, in alternation; the output shows the median and quartiles over rounds. With
--against torch, train and decode are compared with Hugging Face transformers on PyTorch, with the same weights and
tokens and each side in its own process. Without --gin_file the shapes are those of gin/bench/KIND.gin (startup uses
gin/bench/train.gin)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lm.cli import bench_tables, output
from diffusion_lm.cli.arguments import add_gin, load_config
from diffusion_lm.core.errors import ConfigError

if TYPE_CHECKING:
    from diffusion_lm.architectures.base import Architecture
    from diffusion_lm.evaluation.speed import SpeedArm, SpeedStudy

KINDS = ("train", "decode", "data", "startup")
ROUNDS = {"train": 7, "decode": 7, "data": 5, "startup": 3}
"""Default number of rounds per kind."""

_FLAGS = {
    "steps": ("train", "data"),
    "batch_size": ("train", "decode", "data"),
    "against": ("train", "decode"),
    "torch_python": ("train", "decode"),
    "sampler": ("decode",),
    "prompt_length": ("decode",),
    "target_length": ("decode",),
}
"""Flags that only some kinds accept, with these kinds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    add_gin(parser)
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds to measure (default: train and decode 7, data 5, startup 3)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps or batches per round (default: 5; data: 20)")
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="rows or prompts per batch (default: from the configuration)"
    )
    parser.add_argument(
        "--sampler",
        action="append",
        default=[],
        metavar="FILE",
        help="decode: gin file that defines SAMPLER; may be repeated (default: the samplers of the SpeedStudy)",
    )
    parser.add_argument("--prompt_length", type=int, metavar="N", help="decode: tokens per prompt (default: 32)")
    parser.add_argument("--target_length", type=int, metavar="N", help="decode: tokens to generate (default: 64)")
    parser.add_argument("--against", choices=("torch",), help="train, decode: compare with transformers on PyTorch")
    parser.add_argument(
        "--torch_python", metavar="PATH", help="Python interpreter with torch and transformers (default: this one)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; returns the printed figures and the seconds of every round."""
    _check_flags(arguments)
    kind = arguments.kind
    if not arguments.gin_file:
        arguments.gin_file = [f"gin/bench/{'train' if kind == 'startup' else kind}.gin"]
    rounds = ROUNDS[kind] if arguments.rounds is None else arguments.rounds
    load = bench_tables.load_average()
    result = {"train": _train, "decode": _decode, "data": _data, "startup": _startup}[kind](arguments, rounds)
    result = {"kind": kind, "gin_files": arguments.gin_file, "rounds": rounds, **result}
    result["load_average"] = {"before": load, "after": bench_tables.load_average()}
    bench_tables.show_conditions(result)
    return result


def _train(arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    from diffusion_lm.bench.against import measure_alone, train_against_torch
    from diffusion_lm.bench.train import TrainBenchmark, resized
    from diffusion_lm.parallel import multihost
    from diffusion_lm.training.run import TrainRun

    if not arguments.against:
        multihost.initialize()
    configured = resized(load_config(arguments).build(TrainRun), arguments.batch_size)
    output.progress(f"train    {configured.batch_size} rows x {configured.data.row_length}, {rounds} rounds")
    side = TrainBenchmark(configured, 5 if arguments.steps is None else arguments.steps)
    if arguments.against:
        return bench_tables.train(train_against_torch(side, rounds, arguments.torch_python))
    found = measure_alone(side, rounds)
    return bench_tables.train(found) if multihost.is_primary() else {"facts": found["facts"]}


def _decode(arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    from diffusion_lm.bench.against import decode_against_torch, measure_alone
    from diffusion_lm.bench.decode import DecodeBenchmark

    study = _study(arguments)
    results = []
    for length in study.lengths:
        output.progress(f"decode   {length} tokens, {study.batch_size} prompts")
        side = DecodeBenchmark(study, length)
        found = (
            decode_against_torch(side, rounds, arguments.torch_python)
            if arguments.against
            else measure_alone(side, rounds)
        )
        results.append(bench_tables.decode(found, study.batch_size, study.prompt_length, length))
    return {"lengths": results}


def _data(arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    from diffusion_lm.bench.against import measure_alone
    from diffusion_lm.bench.pipeline import PipelineBenchmark
    from diffusion_lm.bench.train import resized
    from diffusion_lm.cli.materialise import ensure
    from diffusion_lm.training.run import TrainRun

    configured = resized(load_config(arguments).build(TrainRun), arguments.batch_size)
    ensure(configured.data, arguments)
    side = PipelineBenchmark(configured, 20 if arguments.steps is None else arguments.steps)
    return bench_tables.data(measure_alone(side, rounds))


def _startup(arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    from diffusion_lm.bench.startup import measure_startup

    load_config(arguments)  # reports configuration errors here and not in the child process
    flags = [flag for name in arguments.gin_file for flag in ("--gin_file", name)]
    flags += [flag for name in arguments.gin_search_path for flag in ("--gin_search_path", name)]
    flags += [flag for name in arguments.module for flag in ("--module", name)]
    flags += [f"--gin.{binding}" for binding in arguments.gin]
    return bench_tables.startup(measure_startup(["bench", "train", *flags, "--rounds", "0"], rounds))


def _study(arguments: argparse.Namespace) -> "SpeedStudy":
    """Returns the configured `SpeedStudy` with the values of the flags; samplers of `--sampler` replace its arms."""
    import dataclasses

    from diffusion_lm.evaluation.speed import SpeedStudy
    from diffusion_lm.training.run import TrainRun

    loaded = load_config(arguments, macros=["MODEL"])
    flags: dict[str, Any] = {"batch_size": arguments.batch_size, "prompt_length": arguments.prompt_length}
    flags["lengths"] = None if arguments.target_length is None else (arguments.target_length,)
    overrides = {name: value for name, value in flags.items() if value is not None}
    if loaded.binds(SpeedStudy):
        study = loaded.build(SpeedStudy)
        if arguments.sampler:
            overrides["arms"] = _arms(arguments, study.arms[0].architecture)
        return dataclasses.replace(study, **overrides)
    if not arguments.sampler:
        raise ConfigError(
            "the gin files do not configure a SpeedStudy, and no --sampler is given",
            where=", ".join(str(path) for path in loaded.files[:3]),
            fix="Add --sampler, e.g. --sampler gin/samplers/greedy.gin.",
        )
    network = loaded.build(TrainRun).model if loaded.binds(TrainRun) else loaded.build_macro("MODEL")
    return SpeedStudy(**({"arms": _arms(arguments, network), "lengths": (64,)} | overrides))


def _arms(arguments: argparse.Namespace, network: "Architecture") -> "tuple[SpeedArm, ...]":
    """Returns one arm per `--sampler`, labelled with the name of its file and changed to decode the full length."""
    from diffusion_lm.cli import config
    from diffusion_lm.cli.search_path import split_search_path
    from diffusion_lm.evaluation.speed import SpeedArm
    from diffusion_lm.noise.contract import NO_NOISE

    stems = [Path(name).stem for name in arguments.sampler]
    arms = []
    for name, stem in zip(arguments.sampler, stems, strict=True):
        loaded = config.load([name], [], split_search_path(arguments.gin_search_path), macros=["SAMPLER"])
        sampler = loaded.build_macro("SAMPLER")
        label = stem if stems.count(stem) == 1 else name
        arms.append(SpeedArm(label, "ar" if sampler.contract.noise == NO_NOISE else "diffusion", network, sampler))
    labels = [arm.label for arm in arms]
    if len(set(labels)) < len(labels):
        raise ConfigError("the same sampler file is given twice", where="--sampler", fix="Pass each file once.")
    return tuple(arms)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for flags that this kind does not accept, and for numbers that are too small."""
    kind = arguments.kind
    for name, kinds in _FLAGS.items():
        if getattr(arguments, name) not in (None, []) and kind not in kinds:
            raise ConfigError(f"bench {kind} does not accept --{name}", where=f"--{name}", fix="Remove it.")
    if arguments.torch_python and not arguments.against:
        raise ConfigError(
            "the interpreter is only used with --against torch", where="--torch_python", fix="Add --against torch."
        )
    # `bench train --rounds 0` times only compilation and the first step.
    minimum = {"rounds": 0 if kind == "train" and not arguments.against else 1}
    for name in ("rounds", "steps", "batch_size", "prompt_length", "target_length"):
        value, lower = getattr(arguments, name), minimum.get(name, 1)
        if value is not None and value < lower:
            raise ConfigError(f"{name}={value}: must be >= {lower}", where=f"--{name}", fix="Pass a larger number.")
