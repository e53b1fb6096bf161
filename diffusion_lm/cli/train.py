"""Trains the model of a TrainRun. Running the same command again resumes a stopped run; a finished run returns at once.

The run directory contains checkpoints, metrics.jsonl, run_card.json and resolved.gin, which lists all settings."""

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
    parser.add_argument("--workdir", required=True, metavar="DIR", help="run directory")


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
        # `train` raised if the directory belongs to another configuration. Settings that do not change the run, such as
        # the mesh, may still differ, so the file is written again.
        write_text(workdir / RESOLVED, loaded.resolved())
        heading(f"{result.step:,} steps, in {workdir}")
        if result.selected is not None:
            say(f"best checkpoint: {result.selected}")
        table(["metric", "value"], [(name, f"{value:.6g}") for name, value in result.metrics.items()], right=[1])
    return {
        "workdir": str(workdir),
        "step": result.step,
        "metrics": result.metrics,
        "cuts": configured.cuts(),
        **({} if result.selected is None else {"selected": dataclasses.asdict(result.selected)}),
        "initial": None if result.report is None else str(result.report),
    }
