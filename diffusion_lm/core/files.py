"""Reads and writes files on local disks and in buckets; `as_path` converts every path that a user gives.

Writes are atomic: a local file is written to a temporary name, synced and renamed. Objects of a bucket are atomic by
themselves; they are accessed through `etils.epath`, as in Orbax.
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
    """Returns whether a path is in a bucket (`gs://...` or `s3://...`)."""
    return os.fspath(path).startswith(_BUCKETS)


def as_path(path: str | os.PathLike) -> Path:
    """Converts a user's path to a `Path`: expands `~`, and returns an `epath.Path` for `gs://...`.

    `pathlib.Path("gs://bucket/run")` would be a local directory `gs:`. An `epath.Path` has the methods of `Path` (`/`,
    `exists`, `is_file`, `iterdir`, `glob`, `read_text`, `mkdir`), although it is not a subclass.
    """
    if isinstance(path, PurePath) and not isinstance(path, Path):
        return cast(Path, path)  # already an epath.Path
    if is_bucket(path):
        from etils import epath

        return cast(Path, epath.Path(os.fspath(path)))
    return Path(path).expanduser()


def absolute(path: str | os.PathLike) -> Path:
    """Returns `as_path(path)` as an absolute path."""
    place = as_path(path)
    return place if is_bucket(place) else place.absolute()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` to `path` atomically, creating its directory; a crash leaves the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` atomically, creating its directory; a crash leaves the old file or the new one."""
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
    """Removes a directory and its contents."""
    path = as_path(path)
    if is_bucket(path):
        cast(Any, path).rmtree()
    else:
        shutil.rmtree(path)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes `value` as JSON with sorted keys, atomically. Equal values give equal bytes."""
    write_text(path, json_text(value, indent=1, sort_keys=True) + "\n")


def json_text(value: object, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Returns `value` as JSON, with null for NaN and infinite numbers.

    JSON has no literals for them, and other parsers reject Python's `NaN` and `Infinity`. An error instead would end an
    evaluation whose perplexity overflows.
    """
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
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
    """A file to which records are appended.

    A local file is flushed after each record. An object in a bucket cannot be appended to: it is uploaded again every
    30 seconds (less often if an upload takes more than 1.5 seconds), and by `flush` and `close`.

    Args:
      path: the file.
      start: initial content, which atomically replaces an existing file.
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
        """Appends a record. In a file system it is passed to the kernel, so it survives a kill of this process."""
        if self._file is not None:
            self._file.write(record)
            self._file.flush()
            return
        self._parts.append(record)
        self._changed = True
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Uploads all records, so that they survive the loss of this machine; no effect for local files."""
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
