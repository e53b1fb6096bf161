"""Pretraining text and code from the Python installation, and lines of the embedded tasks' training splits.

Prose: the language reference in `pydoc_data.topics`. Code: sources of the standard library, including docstrings.
In-domain lines: English sentences, French sentences, passages and functions of training examples, in separate documents
per kind. The task yields whole documents; `materialise --chunk_length` splits them into chunks.
"""

import functools
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffusion_lm_tasks import embedded_code, embedded_qa, embedded_translation
from diffusion_lm_tasks.splits import split_of

CODE_BYTES = 2_500_000
"""Maximum size of the standard library's sources, which are taken in a pseudo-random order of their names."""

_PACKAGES = ("", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json")
_PACKAGES += ("logging", "multiprocessing", "unittest", "urllib", "wsgiref", "xml/dom", "xml/etree", "zoneinfo")
_LINES_PER_DOCUMENT = 12


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        text = topics.topics[name].strip()
        # Shortens horizontal rules of repeated punctuation, which waste tokens.
        yield f"topics/{name}", re.sub(r"([*=\-~^\"])\1{4,}", r"\1\1\1", text)


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path.relative_to(root).as_posix() for package in _PACKAGES for path in (root / package).glob("*.py"))
    order = sorted(paths, key=lambda name: random.Random(f"stdlib/{name}").random())
    left = CODE_BYTES
    for name in order:
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        # Skips files that are mostly data, such as tables of code points.
        if name.startswith("_") or sum(c.isalpha() or c.isspace() for c in text) < 0.6 * len(text):
            continue
        if left <= 0:
            return
        text = text[:60_000]
        left -= len(text.encode())
        yield f"stdlib/{name}", text.strip()


def _documents(lines: Sequence[str], separator: str, seed: str) -> list[str]:
    lines = sorted(set(lines))
    random.Random(seed).shuffle(lines)
    starts = range(0, len(lines), _LINES_PER_DOCUMENT)
    return [separator.join(lines[start : start + _LINES_PER_DOCUMENT]) for start in starts]


def in_domain(split: str) -> dict[str, list[str]]:
    """Returns monolingual documents made from the embedded tasks' examples of `split`, by kind."""
    pairs, problems = embedded_translation.examples()[split], embedded_code.examples()[split]
    prefix = len(embedded_translation.PREFIX)
    passages = [example.inputs.split(" context: ")[1] for example in embedded_qa.examples()[split]]
    return {
        "english": _documents([pair.inputs[prefix:] for pair in pairs], "\n", "english"),
        "french": _documents([pair.targets for pair in pairs], "\n", "french"),
        "facts": _documents(passages, "\n", "facts"),
        "functions": _documents([f"# {p.inputs}\n{p.targets}\n" for p in problems], "\n", "functions"),
    }


@functools.cache
def stock(split: str) -> dict[str, list[str]]:
    """Returns the prose and code documents of the Python installation that belong to `split`."""
    return {
        "prose": [text for name, text in _topics() if split_of(name, held_out=0.03) == split],
        "code": [text for name, text in _sources() if split_of(name, held_out=0.03) == split],
    }


@functools.cache
def documents(split: str) -> tuple[str, ...]:
    """Returns all documents of `split` in a fixed random order."""
    found = [text for group in (stock(split), in_domain(split)) for texts in group.values() for text in texts]
    random.Random(f"documents/{split}").shuffle(found)
    return tuple(found)
