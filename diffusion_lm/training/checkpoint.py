"""Checkpoints: the state, the seed, the data position and the open log window, saved in the background by Orbax.

    WORKDIR/checkpoints/STEP/{params, opt_state, ema, meta}

Parameters are an item of their own, so that another run can read them without knowing the optimizer. A folder counts
as a checkpoint once Orbax has written its `commit_success.txt`; anything else is a save that was cut off.
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

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import absolute, is_bucket, read_json, remove_folder
from diffusion_lm.core.types import Params
from diffusion_lm.training.finite import require_finite
from diffusion_lm.training.metrics import Window
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
      keep: how many of the newest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are kept for good; None = none.
      best: the metric that selects the checkpoint which the run hands on; that one is saved when it is measured and
        kept for good. None = the last one is handed on.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    best: BestCheckpoint | None = None

    def __post_init__(self):
        require(
            isinstance(self.every, int) and self.every >= 0,
            f"every = {self.every!r} is no period",
            where="CheckpointPolicy.every",
            fix="Give a number of steps, or 0 to save only at the end.",
        )
        require(
            isinstance(self.keep, int) and self.keep >= 1,
            f"keep = {self.keep!r} would keep no checkpoint",
            where="CheckpointPolicy.keep",
            fix="Keep at least 1.",
        )
        require(
            self.keep_every is None or (isinstance(self.keep_every, int) and self.keep_every >= 1),
            f"keep_every = {self.keep_every!r} is no period",
            where="CheckpointPolicy.keep_every",
            fix="Give a number of steps, or None.",
        )


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds beside the arrays of the state.

    Attributes:
      step: updates made, which is also the number of batches consumed: the data position.
      seed: the run's seed; with `step` it determines all noise to come.
      evaluated: whether the evaluations due at `step` are in the log already.
      window: the sums of the log row that is still open.
      best: the checkpoint that is selected so far; None where nothing selects one.
    """

    step: int = 0
    seed: int = 0
    evaluated: bool = False
    window: Window = dataclasses.field(default_factory=Window)
    best: Selected | None = None


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints Orbax leaves when it has written another one: what `CheckpointPolicy` says.

    Attributes:
      best: the step that is selected; set before each save.
    """

    def __init__(self, policy: CheckpointPolicy):
        self._policy = policy
        self.best: int | None = None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Returns whether each of the checkpoints, oldest first, is kept. The newest is the one just written."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest, period = steps[-self._policy.keep :], self._policy.keep_every
        return [step in newest or step == self.best or bool(period and step % period == 0) for step in steps]


class Checkpointer:
    """The checkpoints of one run folder; a context manager that waits for the save in flight when it closes.

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
        """Whether the policy saves at `step`."""
        return self._policy.every > 0 and step > 0 and step % self._policy.every == 0

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts saving; the arrays are copied off the devices before this returns, the files are written behind it.

        Raises:
          RuntimeError: Orbax declined to save.
        """
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "meta": ocp.args.JsonSave(dataclasses.asdict(progress)),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        # Orbax deletes what is not kept only once the new checkpoint is whole, so a kill here loses no choice.
        self._kept.best = None if progress.best is None else progress.best.step
        # `save` reports a skipped save by its return value only; `force` because the policy is ours, not Orbax's.
        if not self._manager.save(progress.step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"Orbax did not save step {progress.step} in {self._folder}")

    def wait(self) -> None:
        """Waits until the save in flight is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress]:
        """Returns the newest checkpoint, with the shardings of `abstract`, whatever mesh it was saved from.

        Raises:
          ConfigError: there is none, it does not fit, or its parameters hold NaN or Inf.
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
                fix="Use the configuration that wrote it, or another run folder.",
            ) from error
        for item in ("params", "ema"):
            _require_finite(found.get(item), self._folder / str(step))
        meta = found["meta"]
        window, best = Window(**meta["window"]), _selected(meta)
        progress = Progress(meta["step"], meta["seed"], meta["evaluated"], window, best)
        counter = jax.device_put(jnp.asarray(progress.step, jnp.int32), abstract.step.sharding)
        return TrainState(counter, found["params"], found["opt_state"], found.get("ema")), progress


def restore_params(path: str | Path, *, step: int | None = None, like: Params | None = None) -> Params:
    """Returns the parameters that a run hands on, or those of a checkpoint (the moving average where it kept one).

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: which checkpoint; None = the selected one where the run selects (`CheckpointPolicy.best`), else the newest.
      like: tree of arrays or `ShapeDtypeStruct`s with shardings; what has the same path and shape there is read onto
        that sharding, the rest onto the first device.

    Raises:
      ConfigError: there is no such checkpoint, or its parameters hold NaN or Inf.
    """
    folder = _step_folder(absolute(path), step)
    item = folder / ("ema" if (folder / "ema").exists() else "params")
    shardings = {} if like is None else {name: (leaf.shape, leaf.sharding) for name, leaf in _named(like).items()}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(key_path, leaf) -> jax.ShapeDtypeStruct:
        shape, sharding = shardings.get(_name(key_path), (None, default))
        placed: Sharding = sharding if shape == tuple(leaf.shape) else default
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    # The handler, because the checkpointer's own `metadata` warns that items of a step have no file of their own.
    stored: Any = ocp.StandardCheckpointHandler().metadata(item)
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(item, jax.tree_util.tree_map_with_path(abstract, stored.tree))
    _require_finite(params, folder)
    return params


def save_params(workdir: str | Path, params: Params) -> None:
    """Writes parameters as the checkpoint of step 0 of a run folder: of a network that was not trained here.

    It can be read by `restore_params`; having no optimizer, it cannot be resumed.

    Raises:
      ConfigError: they hold NaN or Inf.
      RuntimeError: Orbax declined to save.
    """
    require_finite(params, "the network holds", fix="The checkpoint that it was read from is damaged: get it again.")
    folder = absolute(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(dataclasses.asdict(Progress()))}
    with ocp.CheckpointManager(folder, item_names=("params", "meta")) as manager:
        if not manager.save(0, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"Orbax did not save the parameters in {folder}")
        manager.wait_until_finished()


def selected(path: str | Path) -> Selected | None:
    """Returns which checkpoint a run folder hands on, as its newest checkpoint says; None = the newest itself."""
    folder, steps = _folder(path), finished_steps(path)
    meta = folder / str(steps[-1]) / "meta" / "metadata" if steps else None
    return _selected(read_json(meta)) if meta is not None and meta.is_file() else None


def chosen_step(path: str | Path) -> int | None:
    """Returns the step of the checkpoint that a run folder hands on: selected, else newest; None = there is none.

    Raises:
      ConfigError: the selected one is missing.
    """
    steps, best = finished_steps(path), selected(path)
    if best is None:
        return steps[-1] if steps else None
    require(
        best.step in steps,
        f"the checkpoint of step {best.step}, which {best.metric} selected, is not in {path}",
        fix=f"Restore that folder, or name another step: {', '.join(map(str, steps))}.",
    )
    return best.step


def _selected(meta: Mapping[str, Any]) -> Selected | None:
    # Checkpoints of versions before the selection do not have the field.
    return Selected(**meta["best"]) if meta.get("best") else None


def finished_steps(path: str | Path) -> list[int]:
    """Returns the steps of the whole checkpoints in a run folder, oldest first."""
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
            fix=f"Choose one of {', '.join(map(str, steps))}.",
        )
    return _folder(path) / str(chosen_step(path) if step is None else step)


def _folder(path: str | Path) -> Path:
    """Returns the folder of the checkpoints: of a run folder, or the folder itself."""
    folder = absolute(path)
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


def _require_finite(params: Any, folder: Path) -> None:
    require_finite(
        params,
        f"the checkpoint {folder} holds",
        fix="Use an earlier checkpoint, or train again with a lower learning rate.",
    )


def _missing(path: Path) -> ConfigError:
    return ConfigError(
        f"there is no checkpoint in {path}",
        fix="Name a run folder (it has a folder 'checkpoints'), or train first.",
    )


def _require_storage(folder: Path) -> None:
    """Orbax would find out at the first checkpoint that it deletes."""
    try:
        importlib.import_module("google.cloud.storage")
    except ImportError as error:
        raise ConfigError(
            f"checkpoints in a bucket need the package google-cloud-storage, which is not installed ({folder})",
            where="--workdir",
            fix="Install it: pip install 'diffusion-lm[buckets]'.",
        ) from error


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed save left: Orbax would count it as a checkpoint and refuse to write that step.

    Nothing else is removed. A folder is from a killed save if it has Orbax's temporary name, or, in a bucket, where
    Orbax writes in place, if it has the name of a step, no commit mark, and only items that a save writes.

    Raises:
      ConfigError: a folder has the name of a step and other content; Orbax would count it as a checkpoint.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():  # a bucket has no empty folders
        # A link is the user's: Orbax makes none, and what it points to is outside of this folder.
        if not entry.is_dir() or (not is_bucket(entry) and entry.is_symlink()):
            continue
        if _TEMPORARY.fullmatch(entry.name):
            remove_folder(entry)
        elif _STEP.fullmatch(entry.name) and not (entry / _COMMITTED).exists():
            items = [item.name.split(_TEMPORARY_SUFFIX, 1)[0] for item in entry.iterdir()]
            if not items or not _SAVED.issuperset(items):
                raise ConfigError(
                    f"{entry} is not a checkpoint and has the name of one",
                    where="--workdir",
                    fix="Move it to another place, or give it a name that is not a number.",
                )
            remove_folder(entry)


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
