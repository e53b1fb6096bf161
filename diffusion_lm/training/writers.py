"""Where the log goes: `metrics.jsonl` always, TensorBoard where it is installed.

A row is flat except for `timing`: everything outside it is reproduced bit for bit by the same configuration.
"""

import importlib.util
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from diffusion_lm.core.files import GrowingFile, as_path, json_text, read_text

Row = Mapping[str, Any]


class Writer(Protocol):
    """A destination of log rows."""

    def write(self, row: Row) -> None:
        """Writes one row with the keys `step` and `kind`."""

    def flush(self) -> None:
        """Writes what is buffered."""

    def close(self) -> None:
        """Writes what is buffered and closes."""


class JsonlWriter:
    """Appends one JSON object per line to a file, whole lines only.

    Args:
      path: the file.
      keep: which rows of an earlier part of the run stay. Rows of steps that the run is about to take again must go;
        so does a line that a kill left half written.
    """

    def __init__(self, path: Path, keep: Callable[[Row], bool]):
        self._file = GrowingFile(path, b"".join(_line(row) for row in read_rows(path) if keep(row)))

    def write(self, row: Row) -> None:
        """Writes one row."""
        self._file.write(_line(row))

    def flush(self) -> None:
        """Makes sure that the rows so far are in the file, also if it is in a bucket."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: Row) -> bytes:
    return (json_text(row) + "\n").encode()


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`; none if there is no file. A half-written last line is left out."""
    if not as_path(path).exists():
        return []
    rows = []
    for line in read_text(path, errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class TensorBoardWriter:
    """Writes scalars as TensorBoard event files, with TensorBoard's own protocol buffers and without TensorFlow.

    Args:
      folder: the log folder.
      first_step: TensorBoard hides older events from this step on; a resumed run takes those steps again.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        self._event, self._summary, self._crc = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        self._file = GrowingFile(folder / f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}")
        self._record(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._record(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, row: Row) -> None:
        """Writes every number of the row, those of training under `train/`."""
        prefix = "train/" if row["kind"] == "train" else ""
        numbers = {**row, **{f"timing/{name}": value for name, value in row["timing"].items()}}
        values = [
            self._summary.Value(tag=prefix + name, simple_value=value)
            for name, value in numbers.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._record(self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values)))

    def flush(self) -> None:
        """Makes sure that the events so far are in the file, also if it is in a bucket."""
        self._file.flush()

    def _record(self, event: Any) -> None:
        """Frames one record: length, its checksum, data, its checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", self._crc(length)) + data + struct.pack("<I", self._crc(data)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def open_writers(workdir: Path, keep: Callable[[Row], bool], step: int) -> list[Writer]:
    """Returns the writers of a run folder in which the run has made `step` updates; `keep` as for `JsonlWriter`."""
    writers: list[Writer] = [JsonlWriter(workdir / "metrics.jsonl", keep)]
    if importlib.util.find_spec("tensorboard") is not None:
        writers.append(TensorBoardWriter(workdir / "tensorboard", step + 1))
    return writers
