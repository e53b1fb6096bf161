"""Files in folders and in buckets: every path that a user names becomes one here, and here they are written.

A file is either whole or not there: written beside its place, synced, then renamed. An object of a bucket is so by
itself; buckets are reached through `etils.epath`, which Orbax uses too.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import IO, Any, cast

_BUCKETS = ("gs://", "s3://")
_SECONDS_BETWEEN_UPLOADS = 30.0


def is_bucket(path: str | os.PathLike) -> bool:
    """True for a place in a bucket (`gs://...`), False for one in a file system."""
    return os.fspath(path).startswith(_BUCKETS)


def as_path(path: str | os.PathLike) -> Path:
    """Returns what a user named as a path: `~` resolved, and `gs://...` as a path into that bucket.

    `pathlib.Path("gs://bucket/run")` is a local folder `gs:`. What this returns for a bucket behaves like a `Path`
    (`/`, `exists`, `is_file`, `iterdir`, `glob`, `read_text`, `mkdir`), though it is none by type.
    """
    if isinstance(path, PurePath) and not isinstance(path, Path):
        return cast(Path, path)  # a path into a bucket already
    if is_bucket(path):
        from etils import epath

        return cast(Path, epath.Path(os.fspath(path)))
    return Path(path).expanduser()


def absolute(path: str | os.PathLike) -> Path:
    """Returns `as_path(path)` from the root of its file system or bucket on."""
    place = as_path(path)
    return place if is_bucket(place) else place.absolute()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` atomically, creating the folder; a crash leaves the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically, creating the folder; a crash leaves the old file or the new one."""
    path = as_path(path)
    if is_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_text(path: str | os.PathLike, errors: str = "strict") -> str:
    """Returns the text of a file."""
    return as_path(path).read_bytes().decode("utf-8", errors=errors)


def remove_folder(path: str | os.PathLike) -> None:
    """Removes a folder and all that is in it."""
    path = as_path(path)
    if is_bucket(path):
        cast(Any, path).rmtree()
    else:
        shutil.rmtree(path)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON with sorted keys, atomically: equal values give equal bytes."""
    write_text(path, json_text(value, indent=1, sort_keys=True) + "\n")


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Returns `value` as JSON, in which NaN and infinite numbers are null.

    JSON has no literals for them; Python's `NaN` and `Infinity` are refused by other parsers. A result such as a
    perplexity beyond the floats must not end an evaluation, so it is written as what has no number.
    """
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_json(path: str | os.PathLike) -> Any:
    """Returns the value of a JSON file."""
    return json.loads(read_text(path))


class GrowingFile:
    """A file to which whole records are added.

    A local one has each record as soon as it is written. An object of a bucket cannot grow: it is written anew every
    half minute, less often when that takes long, and on `flush` and `close`.

    Args:
      path: the file.
      start: its content so far; what is there is replaced, atomically.
    """

    def __init__(self, path: str | os.PathLike, start: bytes = b""):
        self._path = as_path(path)
        self._file: IO[bytes] | None = None
        self._parts, self._changed, self._due = [start], True, 0.0
        if is_bucket(self._path):
            self.flush()
        else:
            write_bytes(self._path, start)
            self._file = open(self._path, "ab")  # noqa: SIM115 (closed by `close`)

    def write(self, record: bytes) -> None:
        """Adds a record and, in a file system, hands it over, so that a kill of this process cannot lose it."""
        if self._file is not None:
            self._file.write(record)
            self._file.flush()
            return
        self._parts.append(record)
        self._changed = True
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Makes sure that what was written so far would survive the loss of this machine, where there is a bucket."""
        if self._file is not None or not self._changed:
            return
        started = time.monotonic()
        self._parts = [b"".join(self._parts)]
        write_bytes(self._path, self._parts[0])
        self._changed = False
        now = time.monotonic()
        self._due = now + max(_SECONDS_BETWEEN_UPLOADS, 20 * (now - started))

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
