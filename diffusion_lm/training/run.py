"""`TrainRun`: the configuration of a training run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.architectures.exponents import WithTokenSchedules
from diffusion_lm.architectures.extended import layer_of
from diffusion_lm.core.checks import check_count
from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.evaluation.compatibility import check_sampler, check_window
from diffusion_lm.objectives.objective import Objective
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import batch_divisor
from diffusion_lm.parallel.xla_options import check_sets
from diffusion_lm.training.card import fingerprint as fingerprint
from diffusion_lm.training.card import plain
from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.hooks import Adjusting, Evaluation
from diffusion_lm.training.optimizers import AdamW, Optimizer
from diffusion_lm.training.profile import check_profile
from diffusion_lm.training.step import TrainStep

# Fields that determine how a run is executed and not what it computes: a run may be resumed with other values of them.
_EXECUTION = {
    "TrainRun": (
        *("mesh", "rules", "microbatches", "checkpoint", "evaluations", "log_every"),
        *("xla_options", "profile"),
    ),
    "TransformerSpec": ("scan_layers", "remat", "attention", "logits_chunk"),
}


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """One training run: network, objective, data, length, and what is logged, evaluated and saved.

    Equal runs give equal numbers. The run directory has `run_card.json` (this configuration), `checkpoints/`,
    `metrics.jsonl` and, if TensorBoard is installed, `tensorboard/`. An interrupted run resumes from its newest
    checkpoint with the same results bit for bit; a finished run returns immediately.

    Attributes:
      model: the network.
      objective: the loss. The step differentiates its `loss_sum` and divides once by its global `weight`.
      data: the training data. Batch number i is a pure function of the pipeline and i.
      steps: number of updates; 0 keeps the initial parameters.
      batch_size: rows per update, over all devices and hosts.
      optimizer: update rule and learning-rate schedule.
      microbatches: number of equal parts of the batch that run one after the other to save memory; changes no result.
      seed: root of the initialisation, the noise and the dropout.
      mesh: number of devices per mesh axis.
      rules: the mesh axes over which each logical axis is split.
      evaluations: the evaluations during training, e.g. `BoundEvaluation` and `GenerationEvaluation`; each has its own
        period `every` (0 = only after the last step) and always runs after the last step.
      checkpoint: when to save, what to keep, and whether the run returns the last or the best checkpoint.
      log_every: steps per log row and per progress line; a row is the mean over its steps.
      ema_decay: decay of the moving average of the parameters that is evaluated and returned; None = no average.
        Update n (from 0) uses min(ema_decay, (1 + n)/(10 + n)).
      xla_options: sets of compiler options for the step (`parallel/xla_options.py`); those of the current platform
        apply, and the run card lists them.
      profile: (step, number of steps) to trace, e.g. (100, 5), after compilation; None = no trace. The trace is in
        `profile/` of the run directory and can be opened in TensorBoard's profiler, XProf and Perfetto.
      initial: run directory or checkpoint with the initial parameters (`transfer` reports what fits); None = fresh
        parameters from `seed`. Optimizer state is never transferred.
    """

    model: Architecture
    objective: Objective
    data: DataPipeline
    steps: int
    batch_size: int
    optimizer: Optimizer = AdamW()
    microbatches: int = 1
    seed: int = 0
    mesh: MeshSpec = MeshSpec()
    rules: LogicalRules = LogicalRules()
    evaluations: tuple[Evaluation, ...] = ()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    log_every: int = 50
    ema_decay: float | None = None
    initial: str | None = None
    xla_options: tuple[str, ...] = ()
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        # gin passes lists, which are not hashable.
        object.__setattr__(self, "evaluations", tuple(self.evaluations))
        object.__setattr__(self, "xla_options", tuple(self.xla_options))
        check_sets(self.xla_options)
        for field, low in (("steps", 0), ("batch_size", 1), ("microbatches", 1), ("seed", 0), ("log_every", 1)):
            check_count(getattr(self, field), f"TrainRun.{field}", minimum=low)
        check_profile(self.profile, self.steps)
        require(
            self.ema_decay is None or (isinstance(self.ema_decay, int | float) and 0 <= self.ema_decay < 1),
            f"ema_decay={self.ema_decay!r}: must be in [0, 1)",
            where="TrainRun.ema_decay",
            fix="Use a decay such as 0.999, or None.",
        )
        require(
            self.batch_size % self.microbatches == 0,
            f"microbatches={self.microbatches}: must divide batch_size={self.batch_size}",
            where="TrainRun.microbatches",
            fix="Use a divisor of the batch size.",
        )
        # Compiled steps are shared between equal settings, so these must be hashable.
        for field in ("model", "objective", "optimizer"):
            try:
                hash(getattr(self, field))
            except TypeError as error:
                raise ConfigError(
                    f"{type(getattr(self, field)).__name__} cannot be hashed: {error}",
                    where=f"TrainRun.{field}",
                    fix="Make it a frozen dataclass with hashable fields (tuples, not lists).",
                ) from error
        names = [evaluation.name for evaluation in self.evaluations]
        require(
            len(set(names)) == len(names),
            f"two evaluations have the same name: {', '.join(names)}",
            where="TrainRun.evaluations",
            fix="Give each evaluation its own name.",
        )
        # Raises if no evaluation measures the metric: better now than after hours of training.
        if self.checkpoint.best is not None:
            self.checkpoint.best.evaluation(self.evaluations)

    def validate(self) -> None:
        """Checks batch size, vocabulary, row length, objective and samplers against devices, data and model.

        Raises:
          ConfigError: something does not fit.
        """
        self.check_mesh()
        self._check_data()
        self.check_window()
        self._check_samplers()
        needs = self.objective.needs()
        require(
            not (needs.one_example_per_row and getattr(self.data, "pack", False)),
            f"pack=True: {type(self.objective).__name__} needs one example per row",
            where="DataPipeline.pack",
            fix="Set it to False.",
        )
        require(
            not needs.self_conditioning or self.model.spec.self_conditioning,
            f"self_conditioning=False: {type(self.objective).__name__} needs a network that reads its predictions",
            where="TransformerSpec.self_conditioning",
            fix="Set it to True.",
        )
        require(
            not needs.token_schedules or layer_of(self.model, WithTokenSchedules) is not None,
            f"{type(self.objective).__name__} learns a masking schedule per token, and the network has no exponents",
            where="TrainRun.model",
            fix="Use gin/runs/token_schedules.gin, which wraps the network in exponents.WithTokenSchedules.",
        )

    def train_step(self, devices: tuple[jax.Device, ...] | None = None) -> TrainStep:
        """Returns the training step of the run, the one that `train` runs and `plan` compiles.

        Args:
          devices: as in `TrainStep`.
        """
        return TrainStep(
            self.model,
            self.objective,
            self.optimizer,
            self.mesh,
            self.rules,
            microbatches=self.microbatches,
            ema_decay=self.ema_decay,
            devices=devices,
            xla_option_sets=self.xla_options,
        ).shared()

    def check_window(self) -> None:
        """Raises `ConfigError` if the target window does not fit the objective's length model."""
        converter = getattr(self.data, "converter", None)
        # The check is for tasks with targets; pretraining transforms make their own.
        if getattr(self.data, "pretraining", None) is None:
            window = getattr(converter, "target_window", None)
            check_window(self.objective.needs(), window, where=f"{type(converter).__name__}.target_window")

    def _check_samplers(self) -> None:
        """Raises `ConfigError` if an evaluation decodes with another noise process than the one that is trained."""
        for evaluation in self.evaluations:
            check_sampler(
                self.objective.needs().contracts,
                getattr(evaluation, "sampler", None),
                where=f"TrainRun.evaluations, {evaluation.name}",
                fix="Use a sampler for this objective (diffusion-lm list samplers).",
            )

    def check_mesh(self, devices: Sequence[jax.Device] | None = None) -> None:
        """Checks that the rows of a batch can be split evenly over the devices.

        Args:
          devices: None = those of all processes.

        Raises:
          ConfigError: they cannot.
        """
        divisor = batch_divisor(self.rules, self.mesh.build(devices))
        rows = self.batch_size // self.microbatches
        what = "a batch" if self.microbatches == 1 else "a microbatch"
        require(
            rows % divisor == 0,
            f"batch_size={self.batch_size}: {what} of {rows} rows cannot be split over {divisor} devices",
            where="TrainRun.batch_size",
            fix=f"Use a multiple of {divisor * self.microbatches} rows, or fewer devices on mesh axes data and fsdp "
            "(gin/partitioning/fsdp_tp.gin has some on the axis tensor).",
        )

    def _check_data(self) -> None:
        spec, specials = self.model.spec, getattr(self.data, "specials", None)
        if specials is not None:
            require(
                spec.vocab_size == specials.vocab_size,
                f"vocab_size={spec.vocab_size}: the vocabulary of the data has {specials.vocab_size} tokens",
                where="TransformerSpec.vocab_size",
                fix=f"Set it to {specials.vocab_size}, or use data with the model's vocabulary.",
            )
            require(
                not self.objective.needs().mask_token or specials.mask_id is not None,
                f"{type(self.objective).__name__} needs a MASK token, and the vocabulary of the data has none",
                where="TrainRun.data",
                fix="Materialise the data with a vocabulary that has one.",
            )
        length, positions = getattr(self.data, "row_length", None), spec.max_positions
        require(
            positions is None or length is None or length <= positions,
            f"max_positions={positions}: the rows of the data have {length} tokens",
            where="TransformerSpec.max_positions",
            fix=f"Set it to {length} or more, or shorten the rows of the data.",
        )

    def cuts(self) -> list[dict[str, Any]]:
        """Returns the truncated examples of the training data and of the evaluations, as JSON data.

        Each entry has `used_by` ("training" or the evaluation's name) and the fields of `checks.Cut`.
        """
        used: list[tuple[str, Any]] = []
        if hasattr(self.data, "cuts"):
            used.append(("training", self.data.cuts("training")))
        used += [(evaluation.name, getattr(evaluation, "cuts", ())) for evaluation in self.evaluations]
        return [{"used_by": name, **cut.plain()} for name, cuts in used for cut in cuts]

    def identity(self) -> dict[str, Any]:
        """Returns the plain data that determines the run's numbers, without the fields of `_EXECUTION`.

        It includes the contents of the data files and the selection of the final checkpoint. It includes the number of
        steps only if the schedule depends on it; other runs may be extended.
        """
        data = _without_execution(plain(self))
        # Evaluations do not change the run, except those that adjust its objective.
        adjusting = [plain(one) for one in self.evaluations if isinstance(one, Adjusting)]
        if adjusting:
            data["adjusting"] = _without_execution(adjusting)
        data["manifests"] = plain(getattr(self.data, "manifests", ()))
        pruned = getattr(self.data, "pruned", None)
        if pruned is not None:
            data["vocabulary_sha256"] = pruned.sha256
        # With such a schedule, a longer run begins with the same updates.
        if not self.optimizer.schedule.needs_total:
            del data["steps"]
        if self.checkpoint.best is not None:
            data["best"] = self.checkpoint.best.identity(self.evaluations)
        return data


def _without_execution(value: Any) -> Any:
    """Returns plain data without the fields of `_EXECUTION`, in all nested objects."""
    if isinstance(value, dict):
        left_out = _EXECUTION.get(str(value.get("class", "")).rsplit(".", 1)[-1], ())
        return {key: _without_execution(item) for key, item in value.items() if key not in left_out}
    if isinstance(value, list):
        return [_without_execution(item) for item in value]
    return value
