"""Checkpoints: the state, the seed, the data position and the open log window, saved in the background by Orbax.

    WORKDIR/checkpoints/STEP/{params, opt_state, ema, meta}

Parameters are an item of their own, so that another run can read them without knowing the optimizer. A folder counts
as a checkpoint once Orbax has written its `commit_success.txt`; anything else is a save that was cut off.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import absolute, is_bucket, remove_folder
from diffusion_lm.core.types import Params
from diffusion_lm.training.metrics import Window
from diffusion_lm.training.state import TrainState

FOLDER = "checkpoints"
_COMMITTED = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """When to save and what to keep. The last state is always saved, and so is the state at a preemption.

    Attributes:
      every: period in steps; 0 = only after the last step.
      keep: how many of the newest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are kept for good; None = none.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None

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
      adjustments: evaluation -> its values by which the objective was last adjusted (`hooks.Adjusting`).
    """

    step: int = 0
    seed: int = 0
    evaluated: bool = False
    window: Window = dataclasses.field(default_factory=Window)
    adjustments: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


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
        options = ocp.CheckpointManagerOptions(max_to_keep=policy.keep, keep_period=policy.keep_every)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_names=("params", "opt_state", "ema", "meta")
        )

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
        # `save` reports a skipped save by its return value only; `force` because the policy is ours, not Orbax's.
        if not self._manager.save(progress.step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"Orbax did not save step {progress.step} in {self._folder}")

    def wait(self) -> None:
        """Waits until the save in flight is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress]:
        """Returns the newest checkpoint, with the shardings of `abstract`, whatever mesh it was saved from.

        Raises:
          ConfigError: there is none, or it does not fit.
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
        meta = found["meta"]
        # Older checkpoints have no adjustments.
        adjustments = meta.get("adjustments", {})
        progress = Progress(meta["step"], meta["seed"], meta["evaluated"], Window(**meta["window"]), adjustments)
        counter = jax.device_put(jnp.asarray(progress.step, jnp.int32), abstract.step.sharding)
        return TrainState(counter, found["params"], found["opt_state"], found.get("ema")), progress


def restore_params(path: str | Path, *, step: int | None = None, like: Params | None = None) -> Params:
    """Returns the final parameters of a checkpoint (the moving average where the run kept one).

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: which checkpoint; None = the newest.
      like: tree of arrays or `ShapeDtypeStruct`s with shardings; what has the same path and shape there is read onto
        that sharding, the rest onto the first device.

    Raises:
      ConfigError: there is no such checkpoint.
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
        return reader.restore(item, jax.tree_util.tree_map_with_path(abstract, stored.tree))


def save_params(workdir: str | Path, params: Params) -> None:
    """Writes parameters as the checkpoint of step 0 of a run folder: of a network that was not trained here.

    It can be read by `restore_params`; having no optimizer, it cannot be resumed.

    Raises:
      RuntimeError: Orbax declined to save.
    """
    folder = absolute(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(dataclasses.asdict(Progress()))}
    with ocp.CheckpointManager(folder, item_names=("params", "meta")) as manager:
        if not manager.save(0, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"Orbax did not save the parameters in {folder}")
        manager.wait_until_finished()


def finished_steps(path: str | Path) -> list[int]:
    """Returns the steps of the whole checkpoints in a run folder, oldest first."""
    folder = absolute(path)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not folder.is_dir():
        return []
    whole = (entry for entry in folder.iterdir() if entry.name.isdigit() and (entry / _COMMITTED).exists())
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
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    return folder / str(steps[-1] if step is None else step)


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
    """Removes what a killed save left behind: Orbax would count it as a checkpoint and refuse to write that step."""
    for entry in folder.iterdir() if folder.is_dir() else ():  # a bucket has no empty folders
        head = entry.name.split(".", 1)[0]
        if entry.is_dir() and head.isdigit() and not (entry / _COMMITTED).exists():
            remove_folder(entry)


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
