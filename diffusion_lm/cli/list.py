"""Lists the gin files of one kind with what they are and where they come from, e.g. `diffusion-lm list objectives`.

Kinds: objectives, samplers, scoring, suites, models, sizes, optimizers, partitioning, runs, recipes, bench. The texts
are the first sentences of the files themselves. The kind families is that of checkpoints which `import` reads."""

import argparse
import re
from pathlib import Path
from typing import Any

from diffusion_lm.cli.output import say, table
from diffusion_lm.cli.search_path import packaged_folder, split_search_path

KINDS = {
    "objectives": "objectives",
    "samplers": "samplers",
    "scoring": "scoring",
    "suites": "suites",
    "models": "models",
    "sizes": "models/sizes",
    "optimizers": "optimizers",
    "partitioning": "partitioning",
    "runs": "runs",
    "recipes": "recipes",
    "bench": "bench",
}
"""Kinds and their folders below gin/."""

PARTS = "parts"
"""The folder of files that recipes include and nobody runs."""

FAMILIES = "families"
"""The kind that is no folder of gin files."""

_SOURCE = re.compile(r"(?<![\w.])(\d{4}\.\d{4,5})(?!\w)")
_NAMED = re.compile(r"^Source: (.*?)\.?$")
_BRACKET = re.compile(r"\s*\([^()]*\d{4}\.\d{4,5}[^()]*\)")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)\.(?=\s|$)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("kind", choices=(*KINDS, FAMILIES), help="what to list")
    parser.add_argument(
        "--gin_search_path",
        action="append",
        default=[],
        metavar="DIRS",
        help="comma-separated folders with files of your own (DIR/objectives/*.gin), listed too",
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the verb and returns one object per file: name, path to include, description, arXiv numbers."""
    if arguments.kind == FAMILIES:
        return _families()
    found: dict[str, dict[str, Any]] = {}
    for root in (*map(Path, split_search_path(arguments.gin_search_path)), packaged_folder()):
        offered = root / KINDS[arguments.kind]
        for path in sorted(offered.glob("**/*.gin" if arguments.kind == "recipes" else "*.gin")):
            inside = path.relative_to(offered)
            if PARTS in inside.parts:
                continue
            description, sources = describe(path.read_text(encoding="utf-8"))
            name = inside.with_suffix("").as_posix()
            entry = {
                "name": name,
                "include": f"{KINDS[arguments.kind]}/{inside.as_posix()}",
                "description": description,
                "sources": sources,
            }
            found.setdefault(name, entry)
    entries = [found[name] for name in sorted(found)]
    rows = [
        (e["name"], e["description"], ", ".join(_SOURCE.sub(r"arXiv \1", source) for source in e["sources"]))
        for e in entries
    ]
    table([arguments.kind, "what it is", "source"], rows, fold=(1, 2))
    flags = {"samplers": "decode --sampler", "scoring": "evaluate --estimator", "suites": "evaluate --suite"}
    flag = flags.get(arguments.kind, "--gin_file")
    below = KINDS[arguments.kind]
    say(f"\nUse one: include '{below}/NAME.gin' in a gin file, or {flag} gin/{below}/NAME.gin.")
    return entries


def _families() -> list[dict[str, Any]]:
    from diffusion_lm.interop.name_maps import FAMILIES as families

    entries: list[dict[str, Any]] = [
        {
            "name": family.name,
            "model_types": list(family.model_types),
            "description": family.description,
            "sources": [family.source],
            "diffusion": family.diffusion is not None,
        }
        for family in families
    ]
    rows = [(e["name"], e["description"], ", ".join(e["model_types"]), e["sources"][0]) for e in entries]
    table([FAMILIES, "what it is", "model_type", "source"], rows, fold=(1, 2, 3))
    say("\nRead one: diffusion-lm import FOLDER --workdir DIR.")
    return entries


def describe(text: str) -> tuple[str, list[str]]:
    """Returns the first sentence of a gin file's opening comment and its sources.

    Sources are the arXiv numbers that the comment names, and what stands in its lines `# Source: ...`.
    """
    lines, named = [], []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        source = _NAMED.match(line[1:].strip())
        if source:
            named.append(source[1])
        else:
            lines.append(line[1:].strip())
    sources = list(dict.fromkeys(_SOURCE.findall(" ".join(lines)) + named))
    opening = " ".join(lines).split("  ")[0] if lines else ""
    # The numbers have a column of their own.
    opening = _BRACKET.sub("", opening)
    end = _SENTENCE_END.search(opening)
    return (opening[: end.start()] if end else opening).strip(), sources
