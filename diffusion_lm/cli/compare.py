"""Trains the arms of a Comparison, evaluates them on its tasks, and writes results.json, results.md and a report.

The report is report/index.html. A stage that several arms share is trained once. Finished stages are skipped, so
running the same command again resumes a stopped comparison."""

import argparse
from typing import Any

from diffusion_lm.cli.arguments import RESOLVED, add_gin, load_config, record_config
from diffusion_lm.cli.materialise import ensure
from diffusion_lm.cli.output import heading, progress, say, table
from diffusion_lm.core.files import as_path, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_gin(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="directory of the comparison")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns the content of results.json."""
    from diffusion_lm.parallel import multihost
    from diffusion_lm.recipes import likelihood_table
    from diffusion_lm.recipes.compare import compare
    from diffusion_lm.recipes.comparison import Comparison
    from diffusion_lm.recipes.summary import cut_sentences
    from diffusion_lm.recipes.tables import quality_terminal

    loaded = load_config(arguments)
    multihost.initialize()
    comparison = loaded.build(Comparison)
    ensure(comparison, arguments)
    workdir = as_path(arguments.workdir)
    if multihost.is_primary():
        record_config(loaded, workdir, claimed_by="comparison.json")
    result = compare(comparison, workdir, log=progress)
    if multihost.is_primary():
        write_text(workdir / RESOLVED, loaded.resolved())
        quality_terminal(result.results)
        if likelihood_table.has_bounds(result.results):
            heading("likelihood")
            rows = [(label, *cells, passes) for label, cells, passes in likelihood_table.rows(result.results)]
            table(likelihood_table.columns(result.results), rows, right=range(1, len(rows[0])))
            say(likelihood_table.CAPTION)
        cut = cut_sentences(result.results)
        if cut:
            heading("truncated to the configured lengths")
            for sentence in cut:
                say(f"  {sentence}")
        say(f"table   {result.table}")
        say(f"report  {result.report}")
    return dict(result.results)
