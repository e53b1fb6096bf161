"""Compiles a configuration for TPUs or GPUs without access to them, and reports memory per device, whether the programs
fit, communication, and an upper bound on speed. It compiles the training step, the likelihood bound and the decoding
program of each run that differs in cost. Exit code 3: a program does not fit."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_lm.cli import environment, output
from diffusion_lm.cli.arguments import add_gin, build_root, load_config
from diffusion_lm.cli.explain import distinct_runs
from diffusion_lm.core.errors import ConfigError, near_names

if TYPE_CHECKING:
    import jax

    from diffusion_lm.evaluation.speed import SpeedArm, SpeedStudy
    from diffusion_lm.planning.accelerators import Accelerator
    from diffusion_lm.planning.plan import ProgramPlan
    from diffusion_lm.recipes.comparison import Comparison
    from diffusion_lm.samplers.sampler import Sampler
    from diffusion_lm.training.run import TrainRun

PROGRAMS = ("train", "bound", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="TPU slice, e.g. v5e-16, v4-32, v5p:4x4x4, 2xv6e-256; GPUs, e.g. h100-8; cpu-8",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices (default: 1)")
    parser.add_argument(
        "--programs",
        default=",".join(PROGRAMS),
        metavar="LIST",
        help=f"comma-separated programs to compile, of {','.join(PROGRAMS)} (default: all)",
    )
    parser.add_argument("--stage", metavar="NAME", help="compile only this stage of a comparison")
    parser.add_argument(
        "--search",
        action="store_true",
        help="if a training step does not fit, search remat policy, microbatches and mesh for settings that fit",
    )
    parser.add_argument(
        "--search_limit", type=int, default=8, metavar="N", help="maximum programs to compile per search (default: 8)"
    )


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Runs the verb; returns everything that it printed as data, and the exit code."""
    from diffusion_lm.planning import topologies
    from diffusion_lm.recipes.comparison import Comparison

    accelerator = topologies.parse(arguments.topology, arguments.slices)
    kinds = _programs(arguments.programs)
    root = build_root(load_config(arguments))
    runs = distinct_runs(root) if isinstance(root, Comparison) else {"run": root}
    if arguments.stage:
        runs = _one_stage(root, arguments.stage)
    devices = topologies.devices(accelerator)
    output.heading(f"plan for {accelerator}")
    planner = _Planner(accelerator, devices)
    result: dict[str, Any] = {"accelerator": str(accelerator), "programs": {}, "found": {}}
    fits = True
    for program in _in_order(planner, root, runs, arguments.stage):
        if program.kind not in kinds:
            continue
        output.progress(f"compile  {program.kind} of {program.of}")
        plan = program.compile()
        result["programs"][f"{program.of}/{program.kind}"] = _show(program, plan, accelerator)
        fits = fits and plan.fits
        if program.run is not None and arguments.search and not plan.fits:
            result["found"][program.of] = _search(planner, program.run, arguments.search_limit)
    output.say("\n  " + ("Everything fits." if fits else _advice(arguments.search)))
    result["fits"] = fits
    return result, environment.EXIT_OK if fits else environment.EXIT_DOES_NOT_FIT


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program to compile.

    Attributes:
      kind: one of `PROGRAMS`.
      of: name of the run, stage, arm or task that it belongs to.
      compile: compiles the program and returns its plan.
      detail: text that is appended to the heading.
      run: the run, for training steps only.
    """

    kind: str
    of: str
    compile: "Callable[[], ProgramPlan]"
    detail: str = ""
    run: "TrainRun | None" = None


class _Planner:
    """Compiles programs for one accelerator and analyses them; a training step is compiled once per run.

    FLOPs are known for training steps only. The number of forward passes of a bound or a decode depends on the data.
    """

    def __init__(self, accelerator: "Accelerator", devices: "Sequence[jax.Device]"):
        self.accelerator, self.devices = accelerator, devices
        self._steps: dict[TrainRun, ProgramPlan] = {}

    def train(self, run: "TrainRun") -> "ProgramPlan":
        """Returns the plan of the training step of `run`."""
        from diffusion_lm.planning import plan, programs
        from diffusion_lm.planning.estimates import train_flops_per_step
        from diffusion_lm.planning.search import recomputed_share

        # The search starts from the configured run, which has been compiled already.
        if run not in self._steps:
            flops = train_flops_per_step(run)
            self._steps[run] = plan.examine(
                programs.train(run, self.devices),
                self.accelerator,
                model_flops=flops,
                recomputed_flops=flops * recomputed_share(run),
                tokens=run.batch_size * run.data.row_length,
            )
        return self._steps[run]

    def bound(self, run: "TrainRun") -> "ProgramPlan":
        """Returns the plan of the likelihood bound of one batch."""
        from diffusion_lm.planning import plan, programs

        tokens = run.batch_size * run.data.row_length
        return plan.examine(programs.bound(run, self.devices), self.accelerator, model_flops=0.0, tokens=tokens)

    def decode(self, run: "TrainRun", sampler: "Sampler", prompts: int) -> "ProgramPlan":
        """Returns the plan of decoding a batch of `prompts` rows with the shapes of the run."""
        from diffusion_lm.planning import plan, programs

        compiled = programs.decode(run, sampler, prompts, self.devices)
        return plan.examine(compiled, self.accelerator, model_flops=0.0, tokens=prompts * run.data.row_length)

    def decode_alone(self, arm: "SpeedArm", study: "SpeedStudy") -> "ProgramPlan":
        """Returns the plan of the longest decode of one arm of a speed study, which uses one device."""
        from diffusion_lm.evaluation.speed import random_prompt
        from diffusion_lm.planning import plan, programs

        prompt = random_prompt(arm.architecture, study.batch_size, study.prompt_length, max(study.lengths))
        compiled = programs.decode_alone(arm.architecture, arm.sampler, prompt, self.devices[0])
        return plan.examine(compiled, self.accelerator, model_flops=0.0, tokens=prompt.tokens.size)


def _programs(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in PROGRAMS:
            raise ConfigError(
                f"unknown program {name!r}{near_names(name, PROGRAMS)}",
                where="--programs",
                fix=f"Use {', '.join(PROGRAMS)}.",
            )
    return names


def _one_stage(root: "Comparison | TrainRun", name: str) -> "dict[str, TrainRun]":
    stages = {stage.name: stage.run for stage in getattr(root, "stages", ())}
    if name not in stages:
        raise ConfigError(
            f"unknown stage {name!r}{near_names(name, stages)}",
            where="--stage",
            fix=f"Use one of {', '.join(stages)}." if stages else "Omit --stage: this is a single run.",
        )
    return {name: stages[name]}


def _in_order(
    planner: _Planner, root: "Comparison | TrainRun", runs: "dict[str, TrainRun]", stage: str | None
) -> Iterator[_Program]:
    for name, run in runs.items():
        yield _Program("train", name, functools.partial(planner.train, run), run=run)
        if run.objective.needs().passes:
            yield _Program("bound", name, functools.partial(planner.bound, run))
    for name, run, sampler, prompts in _decodes(root, stage):
        decode = functools.partial(planner.decode, run, sampler, prompts)
        yield _Program("decode", name, decode, f", {prompts} prompts")
    study: SpeedStudy | None = None if stage else getattr(root, "speed", None)
    if study is None:
        return
    for arm in study.arms:
        decode = functools.partial(planner.decode_alone, arm, study)
        yield _Program("decode", f"speed: {arm.label}", decode, f" of {max(study.lengths):,} tokens on one device")


def _decodes(root: "Comparison | TrainRun", stage: str | None) -> "list[tuple[str, TrainRun, Sampler, int]]":
    """Returns (name, run, sampler, prompts) per pair of network and sampler, for the task with the largest batch.

    The size of a batch is its number of tokens, `batch_size * row_length`.
    """
    from diffusion_lm.evaluation.generation import GenerationEvaluation
    from diffusion_lm.recipes.comparison import Comparison

    found: dict[object, tuple[int, tuple[str, TrainRun, Sampler, int]]] = {}
    if isinstance(root, Comparison):
        for arm in root.arms:
            for task in root.tasks:
                run, sampler = arm.stage_for(task.name).run, arm.sampler_for(task.name)
                if stage in (None, arm.stage_for(task.name).name):
                    data = task.data.with_encoder(run.model.needs_encoder)
                    slots = task.batch_size * data.row_length
                    entry = (
                        f"{arm.name} on {task.name}",
                        dataclasses.replace(run, data=data),
                        sampler,
                        task.batch_size,
                    )
                    if slots > found.get((run.model, sampler), (0,))[0]:
                        found[run.model, sampler] = (slots, entry)
        return [entry for _, entry in found.values()]
    for evaluation in root.evaluations:
        if isinstance(evaluation, GenerationEvaluation):
            task = evaluation.task
            data = task.data.with_encoder(root.model.needs_encoder)
            found[evaluation.sampler] = (
                0, (task.name, dataclasses.replace(root, data=data), evaluation.sampler, task.batch_size)
            )  # fmt: skip
    return [entry for _, entry in found.values()]


def _show(program: _Program, plan: "ProgramPlan", accelerator: "Accelerator") -> dict[str, Any]:
    output.heading(f"{program.of}: {program.kind}{program.detail}")
    if plan.memory is None:
        output.facts([("does not fit", plan.refusal.splitlines()[0])])
        return output.plain(plan)
    memory, roof = plan.memory, plan.roof
    verdict = f"fits, {output.size(memory.spare)} free" if plan.fits else f"exceeds by {output.size(-memory.spare)}"
    output.facts(
        [
            ("memory", f"{output.size(memory.peak)} of {output.size(memory.available)} per device: {verdict}"),
            ("  arguments", f"{output.size(memory.arguments)}, of which {output.size(memory.donated)} donated"),
            ("  temporaries", output.size(memory.temporaries)),
            ("  outputs, code", f"{output.size(memory.outputs)}, {output.size(memory.code)}"),
        ]
    )
    for scope, kind, size in plan.largest[:3]:
        output.say(f"  large: {kind} {output.size(size)}  {_short_scope(scope)}")
    links = accelerator.generation.links
    if plan.collectives:
        rows = [
            (one.kind, one.group, links[one.crosses_slices], one.count, output.size(one.bytes))
            for one in plan.collectives
        ]
        output.table(["collective", "devices", "over", "count", "sent per device"], rows, right=[1, 3, 4], fold=[])
    pairs: list[tuple[str, str]] = []
    speed: dict[str, Any] = {}
    if roof is not None:
        times = {"compute": roof.compute, "hbm": roof.hbm, links[0]: roof.ici, links[1]: roof.dcn}
        shown = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in times.items() if seconds)
        bound = max(times, key=times.__getitem__)
        pairs.append(("at best", f"{roof.seconds * 1e3:.2f} ms by {bound} (ms: {shown})"))
        speed = {"seconds": roof.seconds, "bound_by": roof.bound}
    mfu = plan.mfu(accelerator)
    if mfu is not None and roof is not None:
        speed |= {"tokens_per_second": plan.tokens / roof.seconds, "mfu": mfu}
        pairs.append(("", f"{output.count(speed['tokens_per_second'])} tokens/s, MFU {mfu:.0%}"))
    if roof is not None and program.run is not None:
        speed["hours"] = program.run.steps * roof.seconds / 3600
        pairs.append(("whole run", f"{program.run.steps:,} steps, {speed['hours']:.1f} hours at best"))
    output.facts([*pairs, ("compiled in", f"{plan.compile_seconds:.0f} s")])
    return output.plain(plan) | {"speed": speed}


def _short_scope(scope: str) -> str:
    return "/".join(scope.split("/")[-4:])


def _search(planner: _Planner, run: "TrainRun", limit: int) -> dict[str, Any] | None:
    from diffusion_lm.planning.search import search

    found = search(run, planner.accelerator, planner.train, limit=limit, log=output.progress)
    if found is None:
        output.say(f"  search: none of {limit} compiled settings fits; use more chips or a smaller batch")
        return None
    output.say(f"  search: fits with {'; '.join(found.changes)} ({found.tried} settings compiled)")
    settings = _Program("train", "found", lambda: found.plan, run=found.run)
    return {"changes": list(found.changes), "tried": found.tried} | _show(settings, found.plan, planner.accelerator)


def _advice(searched: bool) -> str:
    return "Not everything fits." + ("" if searched else " Add --search to look for settings that fit.")
