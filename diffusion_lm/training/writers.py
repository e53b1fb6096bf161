"""Log writers: `metrics.jsonl` always, TensorBoard if it is installed, Weights & Biases if a project is set.

A row is flat except for `timing`. Everything outside `timing` is reproduced bit for bit by the same configuration.
"""

import importlib.util
import json
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import GrowingFile, as_path, is_bucket, json_text, read_json, read_text, write_json

Row = Mapping[str, Any]
PROJECT = "WANDB_PROJECT"
"""The environment variable with the Weights & Biases project; setting it enables that writer."""


class Writer(Protocol):
    """A destination of log rows."""

    def write(self, row: Row) -> None:
        """Writes one row with the keys `step` and `kind`."""

    def flush(self) -> None:
        """Writes what is buffered."""

    def close(self) -> None:
        """Writes what is buffered and closes."""


class JsonlWriter:
    """Appends one JSON object per line to a file, complete lines only.

    Args:
      path: the file.
      keep: whether a row of an earlier part of the run stays. Rows of steps that will run again must be dropped; an
        incomplete last line is dropped too.
    """

    def __init__(self, path: Path, keep: Callable[[Row], bool]):
        self._file = GrowingFile(path, b"".join(_line(row) for row in read_rows(path) if keep(row)))

    def write(self, row: Row) -> None:
        """Writes one row."""
        self._file.write(_line(row))

    def flush(self) -> None:
        """Writes the rows so far to the file, also in a bucket."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: Row) -> bytes:
    return (json_text(row) + "\n").encode()


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`, or none if there is no file; an incomplete last line is skipped."""
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
    """Writes scalars as TensorBoard event files with TensorBoard's protocol buffers, without TensorFlow.

    Args:
      folder: the log directory.
      first_step: TensorBoard hides older events from this step on, because a resumed run repeats those steps.
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
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()]
        self._record(self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values)))

    def flush(self) -> None:
        """Writes the events so far to the file, also in a bucket."""
        self._file.flush()

    def _record(self, event: Any) -> None:
        """Frames one record: length, its checksum, data, its checksum."""
        # The format of TFRecord files.
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", self._crc(length)) + data + struct.pack("<I", self._crc(data)))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandbWriter:
    """Logs to Weights & Biases, configured by the package's own variables (`WANDB_MODE`, `WANDB_ENTITY`, ...).

    A run directory is one Weights & Biases run, however often it is started; its id is in `wandb.json`. Rows that a
    resumed run repeats are logged again with the same values, and `step` is the axis of all charts. The files of an
    offline run (`WANDB_MODE=offline`) are in `wandb/` of the run directory, or in a temporary directory if that is in a
    bucket.

    Args:
      workdir: the run directory.
      identity: the run's configuration as plain data.

    Raises:
      ConfigError: the package is not installed, or it cannot start a run.
    """

    def __init__(self, workdir: Path, identity: Mapping[str, Any] | None = None):
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "a Weights & Biases project is set, and the package wandb is not installed",
                where=PROJECT,
                fix="Install it: pip install 'diffusion-lm[tracking]'; or unset the variable.",
            ) from error
        place = workdir / "wandb.json"
        # Stored, so that a resumed run continues the same Weights & Biases run.
        if not place.exists():
            write_json(place, {"id": secrets.token_hex(4)})
        # The stages of a comparison form a group. Arguments would override the package's variables.
        comparison = workdir.parent.parent.name if workdir.parent.name == "stages" else None
        try:
            self._run = wandb.init(
                project=os.environ[PROJECT],
                id=read_json(place)["id"],
                resume="allow",
                name=None if "WANDB_NAME" in os.environ else workdir.name,
                group=None if "WANDB_RUN_GROUP" in os.environ else comparison,
                dir=tempfile.mkdtemp(prefix="wandb-") if is_bucket(workdir) else str(workdir),
                config=dict(identity or {}),
                settings=wandb.Settings(console="off"),  # the package must not capture stdout and stderr
            )
        except Exception as error:  # the package's errors have no common class
            raise ConfigError(
                f"Weights & Biases cannot start a run: {str(error).strip().splitlines()[0]}",
                where=PROJECT,
                fix="Log in (wandb login), set WANDB_MODE=offline, or unset the variable.",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Logs every number of the row, those of training under `train/`."""
        # As a value and not as `log(step=...)`, which drops rows of steps that were logged before a restart.
        self._run.log({"step": row["step"], **_numbers(row)})

    def flush(self) -> None:
        """Does nothing: a process of the package writes the rows."""

    def close(self) -> None:
        """Waits until all rows are written or sent."""
        self._run.finish()


def _numbers(row: Row) -> dict[str, float]:
    """Returns the numbers of a row by chart name, without the step."""
    prefix = "train/" if row["kind"] == "train" else ""
    numbers = {**row, **{f"timing/{name}": value for name, value in row["timing"].items()}}
    return {
        prefix + name: value for name, value in numbers.items() if name != "step" and isinstance(value, int | float)
    }


def open_writers(
    workdir: Path, keep: Callable[[Row], bool], step: int, identity: Mapping[str, Any] | None = None
) -> list[Writer]:
    """Returns the writers of a run directory.

    Args:
      workdir: the run directory.
      keep: as for `JsonlWriter`.
      step: number of updates so far.
      identity: the run's configuration as plain data.
    """
    writers: list[Writer] = [JsonlWriter(workdir / "metrics.jsonl", keep)]
    if importlib.util.find_spec("tensorboard") is not None:
        writers.append(TensorBoardWriter(workdir / "tensorboard", step + 1))
    # Not enabled by installation alone, which would send the log of every run to a third party.
    if os.environ.get(PROJECT):
        writers.append(WandbWriter(workdir, identity))
    return writers
