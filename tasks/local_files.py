"""The local data folder: gzip or plain files in the formats of the public data sets."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from diffusion_lm.core.errors import ConfigError

VARIABLE = "DIFFUSION_LM_DATA"


def data_folder() -> Path:
    """Returns the folder named by `$DIFFUSION_LM_DATA`.

    Raises:
      ConfigError: the variable is not set, or names no folder.
    """
    name = os.environ.get(VARIABLE, "")
    if not name or not Path(name).is_dir():
        raise ConfigError(
            f"the folder of local data is not {'there: ' + name if name else 'known'}",
            where=VARIABLE,
            fix=f"Set the environment variable {VARIABLE} to a folder laid out as docs/data.md describes.",
        )
    return Path(name)


def local_file(relative: str) -> Path:
    """Returns the path of a file of the data folder, with or without `.gz`; ConfigError where neither is there."""
    path = data_folder() / relative
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"the data folder has no file {relative}", where=VARIABLE, fix=f"Put it at {path}(.gz).")


def open_text(relative: str) -> TextIO:
    """Opens a text file of the data folder for reading; newlines are kept as they are."""
    path = local_file(relative)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def json_lines(relative: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a `.jsonl` file."""
    with open_text(relative) as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def pairs(relative: str) -> Iterator[tuple[str, str]]:
    """Yields the (English, French) pairs of a `.tsv` file; raises ConfigError for a line without exactly one tab."""
    with open_text(relative) as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) != 2:
                raise ConfigError(
                    f"{relative}, line {number}, has {len(fields)} fields", fix="Write English<TAB>French."
                )
            yield fields[0], fields[1]
