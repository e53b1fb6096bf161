"""Writes the HTML report of a finished comparison again, from the files in its folder.

Needs results.json; speed.json, samples.json, playback.json and the metrics of the stages are shown if they are there.
The page is WORKDIR/report/index.html. Nothing else is written."""

import argparse

from diffusion_lm.cli.output import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="directory of the comparison")


def run(arguments: argparse.Namespace) -> dict[str, str]:
    """Runs the verb and returns the path of the page."""
    from diffusion_lm.recipes import report

    page = report.from_folder(arguments.workdir)
    say(f"report  {page}")
    return {"report": str(page)}
