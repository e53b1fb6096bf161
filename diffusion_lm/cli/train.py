"""Trains the model of a TrainRun. Run the same command again to go on; a finished run returns at once.

The run folder gets checkpoints, metrics.jsonl, run_card.json and resolved.gin: one file that says all that was set."""

import argparse
import dataclasses
from typing import Any

from diffusion_lm.cli.arguments import RESOLVED, add_gin, load_config, record_config
from diffusion_lm.cli.materialise import ensure
from diffusion_lm.cli.output import heading, say, table
from diffusion_lm.core.files import as_path, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run folder")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns its result."""
    from diffusion_lm.parallel import multihost
    from diffusion_lm.training.loop import train
    from diffusion_lm.training.run import TrainRun

    loaded = load_config(arguments)
    multihost.initialize()
    configured = loaded.build(TrainRun)
    ensure(configured, arguments)
    workdir = as_path(arguments.workdir)
    if multihost.is_primary():
        record_config(loaded, workdir, claimed_by="run_card.json")
    result = train(configured, workdir)
    if multihost.is_primary():
        # A folder of another configuration was refused above, so this is the same run, perhaps executed differently.
        write_text(workdir / RESOLVED, loaded.resolved())
        heading(f"{result.step:,} steps, in {workdir}")
        if result.selected is not None:
            say(f"handed on: {result.selected}")
        table(["metric", "value"], [(name, f"{value:.6g}") for name, value in result.metrics.items()], right=[1])
    return {
        "workdir": str(workdir),
        "step": result.step,
        "metrics": result.metrics,
        "cuts": configured.cuts(),
        **({} if result.selected is None else {"selected": dataclasses.asdict(result.selected)}),
        "initial": None if result.report is None else str(result.report),
    }
