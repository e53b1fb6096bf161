"""Checkpoints: state, seed, data position and the open log window, saved in the background by Orbax.

    WORKDIR/checkpoints/STEP/{params, opt_state, ema, meta}

Parameters are a separate item, so that another run can read them without knowing the optimizer. A directory is a
checkpoint once Orbax has written its `commit_success.txt`; otherwise it is an interrupted save.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from diffusion_lm.core.checks import check_count
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import absolute, is_bucket, read_json, remove_folder
from diffusion_lm.core.types import Params
from diffusion_lm.training.finite import require_finite
from diffusion_lm.training.metrics import MetricWindow
from diffusion_lm.training.selection import BestCheckpoint, Selected
from diffusion_lm.training.state import TrainState

FOLDER = "checkpoints"
_COMMITTED = "commit_success.txt"
_ITEMS = ("params", "opt_state", "ema", "meta")
_SAVED = {*_ITEMS, "_CHECKPOINT_METADATA"}
_TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
_TEMPORARY = re.compile(r"[0-9]+" + re.escape(_TEMPORARY_SUFFIX) + r"(-[0-9]+)?")
_STEP = re.compile("[0-9]+")


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """When to save and what to keep. The last state is always saved, and so is the state at a preemption.

    Attributes:
      every: period in steps; 0 = only after the last step.
      keep: number of newest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are never deleted; None = no such checkpoints.
      best: the metric that selects the checkpoint that the run returns. The selected one is saved when it is measured
        and never deleted. None = the run returns the last one.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    best: BestCheckpoint | None = None

    def __post_init__(self):
        fix = "Use a number of steps, or 0 to save only at the end."
        check_count(self.every, "CheckpointPolicy.every", fix, minimum=0)
        check_count(self.keep, "CheckpointPolicy.keep", "Keep at least 1.")
        if self.keep_every is not None:
            check_count(self.keep_every, "CheckpointPolicy.keep_every", "Use a number of steps, or None.")


@dataclasses.dataclass
class Progress:
    """The contents of a checkpoint besides the arrays of the state.

    Attributes:
      step: number of updates, which is also the number of batches consumed and so the position in the data.
      seed: the run's seed; with `step` it determines all further noise.
      evaluated: whether the evaluations that are due at `step` are already in the log.
      window: the sums of the open log row.
      best: the checkpoint selected so far; None if the run does not select one.
      adjustments: evaluation -> its values that last adjusted the objective (`hooks.Adjusting`).
    """

    step: int = 0
    seed: int = 0
    evaluated: bool = False
    window: MetricWindow = dataclasses.field(default_factory=MetricWindow)
    best: Selected | None = None
    adjustments: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Tells Orbax which checkpoints to preserve after a save, following a `CheckpointPolicy`.

    Attributes:
      best: the selected step; set before each save.
    """

    def __init__(self, policy: CheckpointPolicy):
        self._policy = policy
        self.best: int | None = None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Returns whether each of the checkpoints, oldest first, is preserved. The newest is the one just written."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest, period = steps[-self._policy.keep :], self._policy.keep_every
        return [step in newest or step == self.best or bool(period and step % period == 0) for step in steps]


class Checkpointer:
    """The checkpoints of one run directory; a context manager that waits for a running save when it closes.

    Args:
      workdir: the run folder.
      policy: when to save and what to keep.
    """

    def __init__(self, workdir: Path, policy: CheckpointPolicy):
        self._folder = absolute(workdir) / FOLDER
        self._policy = policy
        if is_bucket(self._folder):
            _require_storage(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _remove_unfinished(self._folder)
        self._kept = _Kept(policy)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._kept)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *error) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Returns whether the policy saves at `step`."""
        return self._policy.every > 0 and step > 0 and step % self._policy.every == 0

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts a save: the arrays are copied from the devices before this returns, the files are written afterwards.

        Raises:
          RuntimeError: Orbax did not save.
        """
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "meta": ocp.args.JsonSave(dataclasses.asdict(progress)),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        # Orbax deletes old checkpoints only after the new one is complete, so a kill here cannot lose the selected one.
        self._kept.best = None if progress.best is None else progress.best.step
        # `save` reports a skipped save only by its return value. `force`: our policy decides when to save, not Orbax.
        if not self._manager.save(progress.step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"Orbax did not save step {progress.step} in {self._folder}")

    def wait(self) -> None:
        """Waits until a running save is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress]:
        """Returns the newest checkpoint with the shardings of `abstract`, whatever mesh it was saved on.

        Raises:
          ConfigError: there is none, it does not fit, or its parameters have NaN or Inf.
        """
        step = self.latest_step
        if step is None:
            raise _missing(self._folder)
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "opt_state": ocp.args.StandardRestore(abstract.opt_state),
            "meta": ocp.args.JsonRestore(),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"the checkpoint of step {step} does not fit the model and optimizer of this run: {_first_line(error)}",
                where=str(self._folder),
                fix="Use the configuration that wrote it, or another run directory.",
            ) from error
        for item in ("params", "ema"):
            _require_finite(found.get(item), self._folder / str(step))
        meta = found["meta"]
        window, best = MetricWindow(**meta["window"]), _selected(meta)
        # Older checkpoints have no adjustments.
        adjustments = meta.get("adjustments", {})
        progress = Progress(meta["step"], meta["seed"], meta["evaluated"], window, best, adjustments)
        # The step is stored in the metadata only.
        counter = jax.device_put(jnp.asarray(progress.step, jnp.int32), abstract.step.sharding)
        return TrainState(counter, found["params"], found["opt_state"], found.get("ema")), progress


def restore_params(path: str | Path, *, step: int | None = None, like: Params | None = None) -> Params:
    """Returns the final parameters of a run, or those of a checkpoint; the moving average if there is one.

    Args:
      path: a run directory, its `checkpoints` directory, or the directory of one step.
      step: which checkpoint; None = the selected one if the run selects (`CheckpointPolicy.best`), else the newest.
      like: tree of arrays or `ShapeDtypeStruct`s with shardings; arrays with the same path and shape are read with that
        sharding, all others onto the first device.

    Raises:
      ConfigError: there is no such checkpoint, or its parameters have NaN or Inf.
    """
    folder = _step_folder(absolute(path), step)
    item = folder / ("ema" if (folder / "ema").exists() else "params")
    shardings = {} if like is None else {name: (leaf.shape, leaf.sharding) for name, leaf in _named(like).items()}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(key_path, leaf) -> jax.ShapeDtypeStruct:
        # Arrays of another shape are resized later, so they are read onto one device.
        shape, sharding = shardings.get(_name(key_path), (None, default))
        placed: Sharding = sharding if shape == tuple(leaf.shape) else default
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    # The handler, because `StandardCheckpointer.metadata` warns about items without a metadata file.
    stored: Any = ocp.StandardCheckpointHandler().metadata(item)
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(item, jax.tree_util.tree_map_with_path(abstract, stored.tree))
    _require_finite(params, folder)
    return params


def save_params(workdir: str | Path, params: Params) -> None:
    """Writes parameters as the checkpoint of step 0 of a run directory, e.g. of an imported network.

    `restore_params` can read it. It has no optimizer state, so it cannot be resumed.

    Raises:
      ConfigError: they have NaN or Inf.
      RuntimeError: Orbax did not save.
    """
    require_finite(
        params, "the network holds", fix="The checkpoint that it was read from is damaged: download it again."
    )
    folder = absolute(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(dataclasses.asdict(Progress()))}
    with ocp.CheckpointManager(folder, item_names=("params", "meta")) as manager:
        if not manager.save(0, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"Orbax did not save the parameters in {folder}")
        manager.wait_until_finished()


def selected(path: str | Path) -> Selected | None:
    """Returns the selected checkpoint of a run directory, as stored in its newest one; None = the newest one."""
    folder, steps = _folder(path), finished_steps(path)
    meta = folder / str(steps[-1]) / "meta" / "metadata" if steps else None
    return _selected(read_json(meta)) if meta is not None and meta.is_file() else None


def chosen_step(path: str | Path) -> int | None:
    """Returns the step of the final checkpoint of a run directory: selected, else newest; None = there is none.

    Raises:
      ConfigError: the selected one is missing.
    """
    steps, best = finished_steps(path), selected(path)
    if best is None:
        return steps[-1] if steps else None
    require(
        best.step in steps,
        f"the checkpoint of step {best.step}, selected by {best.metric}, is not in {path}",
        fix=f"Restore that directory, or use another step: {', '.join(map(str, steps))}.",
    )
    return best.step


def _selected(meta: Mapping[str, Any]) -> Selected | None:
    # Checkpoints of older versions do not have the field.
    return Selected(**meta["best"]) if meta.get("best") else None


def finished_steps(path: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a run directory, oldest first."""
    folder = _folder(path)
    if not folder.is_dir():
        return []
    whole = (entry for entry in folder.iterdir() if _STEP.fullmatch(entry.name) and (entry / _COMMITTED).exists())
    return sorted(int(entry.name) for entry in whole)


def _step_folder(path: Path, step: int | None) -> Path:
    if step is None and (path / _COMMITTED).exists():
        return path
    steps = finished_steps(path)
    if not steps:
        raise _missing(path)
    if step is not None and step not in steps:
        raise ConfigError(
            f"there is no checkpoint of step {step} in {path}",
            fix=f"Use one of {', '.join(map(str, steps))}.",
        )
    return _folder(path) / str(chosen_step(path) if step is None else step)


def _folder(path: str | Path) -> Path:
    """Returns the `checkpoints` directory of a run directory, or the directory itself."""
    folder = absolute(path)
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


def _require_finite(params: Params | None, folder: Path) -> None:
    require_finite(
        params,
        f"the checkpoint {folder} holds",
        fix="Use an earlier checkpoint, or train again with a lower learning rate.",
    )


def _missing(path: Path) -> ConfigError:
    return ConfigError(
        f"there is no checkpoint in {path}",
        fix="Use a run directory (it has a subdirectory 'checkpoints'), or train first.",
    )


def _require_storage(folder: Path) -> None:
    """Raises `ConfigError` without google-cloud-storage; Orbax would fail only when it first deletes a checkpoint."""
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError as error:
        raise ConfigError(
            f"the package google-cloud-storage is not installed, and checkpoints in a bucket need it ({folder})",
            where="--workdir",
            fix="Install it: pip install 'diffusion-lm[buckets]'.",
        ) from error


def _remove_unfinished(folder: Path) -> None:
    """Removes directories of interrupted saves: Orbax would treat them as checkpoints and refuse to write that step.

    Nothing else is removed. A directory is from an interrupted save if it has Orbax's temporary name. In a bucket,
    where Orbax writes in place, it has the name of a step, no commit file, and only items that a save writes.

    Raises:
      ConfigError: a directory has the name of a step and other contents; Orbax would treat it as a checkpoint.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():  # a bucket has no empty folders
        # Orbax never creates links: a link is the user's, and its target is outside this directory.
        if not entry.is_dir() or (not is_bucket(entry) and entry.is_symlink()):
            continue
        if _TEMPORARY.fullmatch(entry.name):
            remove_folder(entry)
        elif _STEP.fullmatch(entry.name) and not (entry / _COMMITTED).exists():
            items = [item.name.split(_TEMPORARY_SUFFIX, 1)[0] for item in entry.iterdir()]
            if not items or not _SAVED.issuperset(items):
                raise ConfigError(
                    f"{entry} has the name of a checkpoint but is none",
                    where="--workdir",
                    fix="Move it elsewhere, or give it a name that is not a number.",
                )
            remove_folder(entry)


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
