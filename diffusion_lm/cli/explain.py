"""Prints a configuration without running it and without its data: all settings, the stages and arms of a comparison,
parameters, shapes, shardings, FLOPs, and the memory that training needs per device."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusion_lm.cli import output
from diffusion_lm.cli.arguments import add_gin, build_root, load_config

if TYPE_CHECKING:
    from diffusion_lm.architectures.base import Architecture
    from diffusion_lm.planning.estimates import Estimate, Layout
    from diffusion_lm.recipes.comparison import Arm, Comparison
    from diffusion_lm.training.run import TrainRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="number of devices (default: the smallest number that the mesh allows)",
    )
    parser.add_argument("--no_config", action="store_true", help="do not print the settings")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb; returns everything that it printed as data."""
    from diffusion_lm.cli.cut_report import cut_sentences, lossy_sentences
    from diffusion_lm.planning.estimates import estimate
    from diffusion_lm.recipes.comparison import Comparison
    from diffusion_lm.training.run import TrainRun

    loaded = load_config(arguments, macros=["MODEL"])
    if not (loaded.binds(Comparison) or loaded.binds(TrainRun)) and loaded.defines("MODEL"):
        return _explain_model(loaded.build_macro("MODEL"), arguments.devices)
    root = build_root(loaded)
    if not arguments.no_config:
        output.say(loaded.resolved())
    result: dict[str, Any] = {"config": loaded.resolved()}
    if isinstance(root, Comparison):
        result["comparison"] = _explain_comparison(root)
        runs = distinct_runs(root)
    else:
        runs = {"run": root}
    costs = {name: estimate(one, arguments.devices) for name, one in runs.items()}
    # Runs may differ in batch size or optimizer only; print each network with its sharding once.
    shown: list[Any] = []
    for name, one in runs.items():
        model = (one.model, one.mesh, one.rules)
        if model not in shown:
            _print_model(one.model, costs[name].layout, getattr(one.optimizer, "weight_decay", 0.0) > 0)
            shown.append(model)
    if len(runs) == 1:
        _print_step(*next(iter(runs.items())), next(iter(costs.values())))
    else:
        _print_steps(runs, costs)
    result["cuts"] = cut_sentences(root)
    if result["cuts"]:
        output.heading("truncated to the configured lengths (materialised data only)")
        for sentence in result["cuts"]:
            output.say(f"  {sentence}")
    result["unwritten"] = lossy_sentences(root)
    if result["unwritten"]:
        output.heading("characters that the vocabulary cannot encode (materialised data only)")
        for sentence in result["unwritten"]:
            output.say(f"  {sentence}")
    result["runs"] = {name: _data(one, costs[name]) for name, one in runs.items()}
    return result


def _explain_comparison(comparison: "Comparison") -> dict[str, Any]:
    users: dict[str, list[str]] = {}
    for arm in comparison.arms:
        for task in comparison.tasks:
            for stage in arm.stage_for(task.name).path:
                if arm.name not in users.setdefault(stage.name, []):
                    users[stage.name].append(arm.name)
    stages: list[dict[str, Any]] = []
    for stage in comparison.stages:
        initial = stage.initial if isinstance(stage.initial, str | None) else stage.initial.name
        stages.append(
            {
                "name": stage.name,
                "initial": initial,
                "objective": type(stage.run.objective).__name__,
                "steps": stage.run.steps,
                "tokens": stage.train_tokens,
                "flops": _stage_flops(stage.run),
                "selection": _selection(stage.run),
                "arms": users[stage.name],
            }
        )
    output.heading(f"{comparison.title or comparison.name}: stages, each trained once")
    output.table(
        ["stage", "objective", "steps", "tokens", "FLOPs", "arms"],
        [
            [
                "  " * depth + stage["name"],
                stage["objective"],
                f"{stage['steps']:,}",
                _short(stage["tokens"]),
                output.flops(stage["flops"], unit=""),
                len(stage["arms"]),
            ]
            for depth, stage in _tree(stages, None)
        ],
        right=[2, 3, 4, 5],
        fold=[],
    )
    output.say("  An indented stage starts from the parameters of its parent. arms: number of arms that use the stage.")
    for selection in dict.fromkeys(stage["selection"] for stage in stages if stage["selection"]):
        names = ", ".join(stage["name"] for stage in stages if stage["selection"] == selection)
        output.say(f"  Later stages use the best checkpoint ({selection}) of {names}.")
    arms = [_arm(comparison, arm) for arm in comparison.arms]
    output.heading("arms")
    output.table(
        ["arm", "stages", "sampler", "tokens", "FLOPs"],
        [
            [
                arm["name"],
                " > ".join(arm["stages"]),
                ", ".join(arm["samplers"]),
                _short(arm["tokens"]),
                output.flops(arm["flops"], unit=""),
            ]
            for arm in arms
        ],
        right=[3, 4],
        fold=[1],
    )
    tasks = [
        {"name": task.name, "metric": task.metric, "examples": task.limit, "samples": task.samples}
        for task in comparison.tasks
    ]
    output.heading("tasks")
    output.table(
        ["task", "metric", "examples", "samples"],
        [(t["name"], t["metric"], "all" if t["examples"] is None else t["examples"], t["samples"]) for t in tasks],
        right=[2, 3],
    )
    once = sum(stage["flops"] for stage in stages)
    apart = sum(arm["flops"] for arm in arms)
    output.say(f"\n  all stages: {output.flops(once)}; without shared stages: {output.flops(apart)}")
    return {"name": comparison.name, "stages": stages, "arms": arms, "tasks": tasks, "flops": once}


def _selection(run: "TrainRun") -> str | None:
    """Describes how a run selects its best checkpoint: metric, data and interval; None if it uses the last one."""
    best = run.checkpoint.best
    if best is None:
        return None
    evaluation = best.evaluation(run.evaluations)
    sources = getattr(getattr(getattr(evaluation, "task", evaluation), "data", None), "sources", ())
    data = "".join(f" on {source.task}/{source.split}" for source in sources)
    return f"{best.mode}imum of {best.metric}{data}, every {evaluation.every:,} steps"


def _tree(stages: list[dict[str, Any]], parent: str | None, depth: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (depth, stage) depth first; a stage that starts from the path of a checkpoint is a root."""
    names = {stage["name"] for stage in stages}
    for stage in stages:
        if (stage["initial"] if stage["initial"] in names else None) == parent:
            yield depth, stage
            yield from _tree(stages, stage["name"], depth + 1)


def _arm(comparison: "Comparison", arm: "Arm") -> dict[str, Any]:
    path = {}
    for task in comparison.tasks:
        path.update({stage.name: stage for stage in arm.stage_for(task.name).path})
    return {
        "name": arm.name,
        "label": arm.label,
        "family": arm.family,
        "stages": list(path),
        "samplers": list(dict.fromkeys(type(arm.sampler_for(task.name)).__name__ for task in comparison.tasks)),
        "steps": sum(stage.run.steps for stage in path.values()),
        "tokens": sum(stage.train_tokens for stage in path.values()),
        "flops": sum(_stage_flops(stage.run) for stage in path.values()),
    }


def _stage_flops(run: "TrainRun") -> float:
    from diffusion_lm.planning.estimates import train_flops_per_step

    return train_flops_per_step(run) * run.steps


def distinct_runs(comparison: "Comparison") -> "dict[str, TrainRun]":
    """Returns one run per set of stages with equal cost, named after the first of these stages that trains."""
    found: dict[object, tuple[str, TrainRun]] = {}
    # Stages with zero steps come last, so that a stage that trains names the group.
    for stage in sorted(comparison.stages, key=lambda stage: stage.run.steps == 0):
        run = stage.run
        # The learning rate schedule does not change the cost, so it must not distinguish runs.
        optimizer: Any = run.optimizer
        optimizer = dataclasses.replace(optimizer, schedule=comparison.stages[0].run.optimizer.schedule)
        lengths = (run.data.row_length, run.data.encoder_length)
        costs = (run.objective, optimizer, run.batch_size, run.microbatches, lengths)
        kind = (run.model, *costs, run.mesh, run.rules)
        found.setdefault(kind, (stage.name, run))
    return dict(found.values())


def _explain_model(model: "Architecture", devices: int | None) -> dict[str, Any]:
    """Prints a network without a run, as the presets of gin/models/ define it."""
    from diffusion_lm.parallel.mesh import MeshSpec
    from diffusion_lm.parallel.rules import LogicalRules
    from diffusion_lm.planning.estimates import layout

    placed = layout(model, MeshSpec(), LogicalRules(), devices)
    _print_model(model, placed, with_decay=False)
    return {"model": model, **output.plain(placed)}


def _where(placed: "Layout") -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in placed.mesh.items())
    return f"{placed.devices} device{'s' if placed.devices > 1 else ''} ({mesh})"


def _print_model(model: "Architecture", placed: "Layout", with_decay: bool) -> None:
    name = type(model).__name__
    output.heading(f"{name}: arrays on {_where(placed)}")
    rows = [
        [
            row.name,
            "x".join(map(str, row.shape)),
            ", ".join(axis or "-" for axis in row.axes),
            row.spec,
            output.size(row.bytes_per_device),
            *(["yes" if placed.decays[row.name] else "no"] if with_decay else []),
        ]
        for row in placed.rows
    ]
    columns = ["array", "shape", "logical axes", "sharding", "per device", *(["decay"] if with_decay else [])]
    output.table(columns, rows, right=[4], fold=[2])
    for fallback in dict.fromkeys(text for row in placed.rows for text in row.fallbacks):
        output.say(f"  note: {fallback}")
    output.heading(f"{name}: parameters")
    parts = [(part, output.count(number)) for part, number in placed.parameters.items()]
    trained = [("trained", _share(placed))] if placed.frozen else []
    output.facts([*parts, ("total", output.count(placed.total_parameters)), *trained])


def _share(placed: "Layout") -> str:
    share = placed.trained_parameters / placed.total_parameters
    return f"{output.count(placed.trained_parameters)}, {100 * share:.2f} % of the total; the rest is frozen"


def _print_step(name: str, run: "TrainRun", cost: "Estimate") -> None:
    tokens = f"{run.batch_size} rows x {run.data.row_length} = {cost.tokens_per_step:,} tokens"
    if cost.encoder_tokens_per_step:
        tokens += f", and {cost.encoder_tokens_per_step:,} encoder tokens"
    output.heading(f"{name}: one step of {type(run.objective).__name__} with {type(run.optimizer).__name__}")
    memory = cost.memory
    output.facts(
        [
            ("batch", tokens + (f", in {run.microbatches} microbatches" if run.microbatches > 1 else "")),
            ("forward passes", cost.passes),
            ("FLOPs per token", f"{output.flops(cost.forward_flops_per_token)} forward"),
            ("", f"{output.flops(cost.train_flops_per_token)} forward and backward, all passes"),
            ("FLOPs per step", output.flops(cost.flops_per_step)),
            ("whole run", f"{run.steps:,} steps, {output.flops(cost.flops_per_step * run.steps)}"),
            *([("selects", f"its best checkpoint: {_selection(run)}")] if _selection(run) else []),
            ("memory", f"per device, on {_where(cost.layout)}"),
            ("  parameters", output.size(memory.parameters)),
            *([("  moving average", output.size(memory.ema))] if memory.ema else []),
            ("  optimizer", output.size(memory.optimizer)),
            ("  gradients", output.size(memory.gradients)),
            ("  activations", f"{output.size(memory.activations)} (estimate, remat = {run.model.spec.remat!r})"),
            ("  total", f"{output.size(memory.total)} (estimate)"),
        ]
    )


def _print_steps(runs: "dict[str, TrainRun]", costs: "dict[str, Estimate]") -> None:
    """Prints the stages that differ in cost, one per line."""
    rows = []
    for name, run in runs.items():
        cost, memory = costs[name], costs[name].memory
        state = memory.parameters + memory.ema + memory.optimizer + memory.gradients
        batch = f"{run.batch_size} x {run.data.row_length}" + (f" / {run.microbatches}" if run.microbatches > 1 else "")
        sizes = [state, memory.activations, memory.total]
        rows.append([name, batch, cost.passes, output.flops(cost.flops_per_step, unit=""), *map(output.size, sizes)])
    output.heading(f"one training step, memory per device on {_where(next(iter(costs.values())).layout)}")
    columns = ["stage", "batch", "passes", "FLOPs/step", "state", "activations", "total"]
    output.table(columns, rows, right=range(1, 7), fold=[])
    output.say(
        "  FLOPs: forward and backward of all passes. state: parameters, optimizer, gradients. activations: estimated."
    )


def _data(run: "TrainRun", cost: "Estimate") -> dict[str, Any]:
    from diffusion_lm.planning.estimates import describe_rules

    plain = output.plain(cost)
    plain |= plain.pop("layout")
    plain["flops_per_step"] = cost.flops_per_step
    plain["memory"]["total"] = cost.memory.total
    return plain | {"rules": describe_rules(run.rules), "steps": run.steps, "batch_size": run.batch_size}


def _short(number: float) -> str:
    return output.count(number).split(" ", 1)[0]
