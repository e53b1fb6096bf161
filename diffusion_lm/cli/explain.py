"""Shows what a configuration is, without running it and without its data: every setting, then the stages and arms of a
comparison, parameters, shapes, shardings, FLOPs, and the memory that training needs on each device."""

import argparse
from typing import Any

from diffusion_lm.cli import output
from diffusion_lm.cli.arguments import add_gin, build_root, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="number of devices to plan for (default: the fewest that the mesh allows)",
    )
    parser.add_argument("--no_config", action="store_true", help="leave out the list of settings")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns all that it printed."""
    from diffusion_lm.recipes.comparison import Comparison

    loaded = load_config(arguments)
    root = build_root(loaded)
    if not arguments.no_config:
        output.say(loaded.resolved())
    result: dict[str, Any] = {"config": loaded.resolved()}
    if isinstance(root, Comparison):
        result["comparison"] = _explain_comparison(root)
        runs = _distinct_runs(root)
    else:
        runs = {"run": root}
    shown: list[Any] = []
    result["runs"] = {}
    for name, one in runs.items():
        model = (one.model, one.optimizer, one.mesh, one.rules)
        result["runs"][name] = _explain_run(name, one, arguments.devices, show_model=model not in shown)
        shown.append(model)
    return result


def _explain_comparison(comparison: Any) -> dict[str, Any]:
    users: dict[str, list[str]] = {}
    for arm in comparison.arms:
        for task in comparison.tasks:
            for stage in arm.stage_for(task.name).path:
                if arm.name not in users.setdefault(stage.name, []):
                    users[stage.name].append(arm.name)
    stages = []
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
                "arms": users[stage.name],
            }
        )
    output.heading(f"{comparison.title or comparison.name}: stages, each run once")
    output.table(
        ["stage", "starts from", "objective", "steps", "tokens", "FLOPs", "arms"],
        [
            [
                stage["name"],
                stage["initial"] or "scratch",
                stage["objective"],
                f"{stage['steps']:,}",
                _short(stage["tokens"]),
                output.flops(stage["flops"], unit=""),
                ", ".join(stage["arms"]),
            ]
            for stage in stages
        ],
        right=[3, 4, 5],
        fold=[6],
    )
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
    output.say(f"\n  all stages: {output.flops(once)}; without sharing stages it would be {output.flops(apart)}")
    return {"name": comparison.name, "stages": stages, "arms": arms, "tasks": tasks, "flops": once}


def _arm(comparison: Any, arm: Any) -> dict[str, Any]:
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


def _stage_flops(run: Any) -> float:
    from diffusion_lm.cli.estimates import estimate

    return estimate(run).flops_per_step * run.steps


def _distinct_runs(comparison: Any) -> dict[str, Any]:
    """Returns one run for each combination of what costs differ by; the first stage that trains gives it its name."""
    found: dict[Any, tuple[str, Any]] = {}
    for stage in sorted(comparison.stages, key=lambda stage: stage.run.steps == 0):
        run = stage.run
        costs = (run.objective, run.optimizer, run.batch_size, run.microbatches, run.data.row_length)
        kind = (run.model, *costs, run.mesh, run.rules)
        found.setdefault(kind, (stage.name, run))
    return dict(found.values())


def _explain_run(name: str, run: Any, devices: int | None, *, show_model: bool) -> dict[str, Any]:
    from diffusion_lm.cli.estimates import describe_rules, estimate

    cost = estimate(run, devices)
    mesh = ", ".join(f"{axis} {size}" for axis, size in cost.mesh.items())
    where = f"{cost.devices} device{'s' if cost.devices > 1 else ''} ({mesh})"
    if show_model:
        output.heading(f"{type(run.model).__name__}: arrays on {where}")
        _print_arrays(run, cost)
        output.heading(f"{type(run.model).__name__}: parameters")
        parts = [(part, output.count(number)) for part, number in cost.parameters.items()]
        output.facts([*parts, ("total", output.count(cost.total_parameters))])
    tokens = f"{run.batch_size} rows x {run.data.row_length} = {cost.tokens_per_step:,} tokens"
    if cost.encoder_tokens_per_step:
        tokens += f", and {cost.encoder_tokens_per_step:,} of the encoder"
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
            ("memory", f"of each of {where}"),
            ("  parameters", output.size(memory.parameters)),
            *([("  moving average", output.size(memory.ema))] if memory.ema else []),
            ("  optimizer", output.size(memory.optimizer)),
            ("  gradients", output.size(memory.gradients)),
            ("  activations", f"{output.size(memory.activations)} (estimate, remat = {run.model.spec.remat!r})"),
            ("  total", f"{output.size(memory.total)} (estimate)"),
        ]
    )
    plain = output.plain(cost)
    plain["flops_per_step"] = cost.flops_per_step
    plain["memory"]["total"] = memory.total
    return plain | {"rules": describe_rules(run.rules), "steps": run.steps, "batch_size": run.batch_size}


def _print_arrays(run: Any, cost: Any) -> None:
    decays = getattr(run.optimizer, "weight_decay", 0.0)
    rows = [
        [
            row.name,
            "x".join(map(str, row.shape)),
            ", ".join(axis or "-" for axis in row.axes),
            row.spec,
            output.size(row.bytes_per_device),
            *(["yes" if cost.decays[row.name] else "no"] if decays else []),
        ]
        for row in cost.rows
    ]
    columns = ["array", "shape", "logical axes", "sharding", "per device", *(["decay"] if decays else [])]
    output.table(columns, rows, right=[4], fold=[2])
    for fallback in dict.fromkeys(text for row in cost.rows for text in row.fallbacks):
        output.say(f"  note: {fallback}")


def _short(number: float) -> str:
    return output.count(number).split(" ", 1)[0]
