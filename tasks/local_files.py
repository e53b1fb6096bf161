"""Reads the local data folder: files in the formats of the public data sets, and Hugging Face folders."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from diffusion_lm.core.errors import ConfigError

VARIABLE = "DIFFUSION_LM_DATA"
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def data_folder() -> Path:
    """Returns the folder named by `$DIFFUSION_LM_DATA`.

    Raises:
      ConfigError: the variable is not set, or is not a directory.
    """
    name = os.environ.get(VARIABLE, "")
    if not name or not Path(name).is_dir():
        raise ConfigError(
            f"{name}: not a directory" if name else f"{VARIABLE} is not set",
            where=VARIABLE,
            fix="Set this environment variable to a data folder as described in docs/data.md.",
        )
    return Path(name)


def local_file(relative: str) -> Path:
    """Returns the path of a file in the data folder, with or without `.gz`; ConfigError if neither exists."""
    path = data_folder() / relative
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"missing file {relative} in the data folder", where=VARIABLE, fix=f"Put it at {path}(.gz).")


def open_text(relative: str) -> TextIO:
    """Opens a text file of the data folder without newline translation."""
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


def rows(relative: str, field: str) -> Iterator[str]:
    """Yields one text field of every row of all files in a directory, in the order of their paths.

    Files are `.jsonl`, plain or compressed (`.gz`, `.zst`), or `.parquet`, in any subdirectory.

    Raises:
      ConfigError: there are no files, a row lacks the field, or `.zst` cannot be read.
    """
    folder = data_folder() / relative
    files = sorted(path for path in folder.rglob("*") if path.name.endswith((*_LINES, ".parquet")))
    if not files:
        raise ConfigError(
            f"no {', '.join(_LINES)} or .parquet files in {relative} of the data folder",
            where=VARIABLE,
            fix=f"Download the data set to {folder}.",
        )
    for path in files:
        for row in _parquet(path, field) if path.suffix == ".parquet" else _json_rows(path):
            if field not in row:
                raise ConfigError(f"{path}: a row has no field {field!r}", where=VARIABLE, fix="Remove this file.")
            yield row[field]


def _parquet(path: Path, field: str) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    columns = [name for name in file.schema_arrow.names if name == field]
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist() if columns else ({},)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _open_lines(path) as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _open_lines(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix != ".zst":
        return open(path, encoding="utf-8")
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reading {path} needs the package zstandard",
            where=VARIABLE,
            fix="Run: pip install zstandard",
        ) from error
    return zstandard.open(path, "rt", encoding="utf-8")


def pairs(relative: str) -> Iterator[tuple[str, str]]:
    """Yields the (English, French) pairs of a `.tsv` file; raises ConfigError for a line without exactly one tab."""
    with open_text(relative) as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) != 2:
                raise ConfigError(
                    f"{relative}, line {number}: {len(fields)} fields instead of 2", fix="Write English<TAB>French."
                )
            yield fields[0], fields[1]
