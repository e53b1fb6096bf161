"""Lists the gin files of one kind with a description and their sources, e.g. `diffusion-lm list objectives`.

Kinds: objectives, samplers, scoring, suites, models, sizes, optimizers, partitioning, runs, recipes, bench. The
description is the first sentence of the comment at the top of the file. The kind `families` lists the checkpoint
families that `import` reads."""

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
"""Kinds and their directories under gin/."""

PARTS = "parts"
"""Directory of files that recipes include and that are not listed."""

FAMILIES = "families"
"""The kind that lists checkpoint families instead of gin files."""

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
        help="comma-separated directories with gin files to list too (DIR/objectives/*.gin)",
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the verb; returns one dict per file: name, path to include, description and sources."""
    if arguments.kind == FAMILIES:
        return _families()
    found: dict[str, dict[str, Any]] = {}
    for root in (*map(Path, split_search_path(arguments.gin_search_path)), packaged_folder()):
        directory = root / KINDS[arguments.kind]
        for path in sorted(directory.glob("**/*.gin" if arguments.kind == "recipes" else "*.gin")):
            inside = path.relative_to(directory)
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
    table([arguments.kind, "description", "source"], rows, fold=(1, 2))
    flags = {"samplers": "decode --sampler", "scoring": "evaluate --estimator", "suites": "evaluate --suite"}
    flag = flags.get(arguments.kind, "--gin_file")
    location = KINDS[arguments.kind]
    say(f"\nTo use one: include '{location}/NAME.gin' in a gin file, or pass {flag} gin/{location}/NAME.gin.")
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
    table([FAMILIES, "description", "model_type", "source"], rows, fold=(1, 2, 3))
    say("\nTo import one: diffusion-lm import PATH --workdir DIR.")
    return entries


def describe(text: str) -> tuple[str, list[str]]:
    """Returns the first sentence of the comment at the top of a gin file, and its sources.

    Sources are the arXiv numbers in the comment and the text of its `# Source: ...` lines.
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
    # arXiv numbers are shown in the source column instead.
    opening = _BRACKET.sub("", opening)
    end = _SENTENCE_END.search(opening)
    return (opening[: end.start()] if end else opening).strip(), sources
