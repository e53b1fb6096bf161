"""`TrainRun`: the dataclass that is the manual of training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.architectures.extended import layer_with
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

# How a run is executed, not what it computes: a run may be continued with other values of these.
_EXECUTION = {
    "TrainRun": (
        *("mesh", "rules", "microbatches", "checkpoint", "evaluations", "log_every"),
        *("xla_options", "profile"),
    ),
    "TransformerSpec": ("scan_layers", "remat", "attention", "logits_chunk"),
}


@dataclasses.dataclass(frozen=True)
class TrainRun:
    """One training run: what is trained, on what, how long, and what is written down on the way.

    Equal runs give equal numbers. The run folder holds `run_card.json` (this configuration), `checkpoints/`,
    `metrics.jsonl` and, where TensorBoard is installed, `tensorboard/`. A run that was stopped continues from its
    newest checkpoint, bit for bit; a finished one returns at once.

    Attributes:
      model: the network.
      objective: what is minimised. The step differentiates its `loss_sum` and divides once by its global `weight`.
      data: the training data. Batch number i is a pure function of the pipeline and i.
      steps: number of updates; 0 leaves the network as it was initialised.
      batch_size: rows per update, over all devices and hosts.
      optimizer: update rule and learning-rate schedule.
      microbatches: equal parts of the batch that are run one after the other to save memory; changes no result.
      seed: root of the initialisation, the noise and the dropout.
      mesh: how many devices each mesh axis gets.
      rules: which mesh axes each logical axis is split over.
      evaluations: what is measured during training, e.g. `BoundEvaluation` and `GenerationEvaluation`; each has its own
        period `every` (0 = only after the last step) and always runs after the last step.
      checkpoint: when to save, what to keep, and whether the last or the best checkpoint is handed on.
      log_every: steps per row of the log and per progress line; a row is the mean over its steps.
      ema_decay: decay of the moving average of the parameters that is evaluated and handed on; None keeps none. Update
        n (from 0) uses min(ema_decay, (1 + n)/(10 + n)).
      xla_options: sets of compiler options for the step (`parallel/xla_options.py`), of which those of the platform are
        taken; the run card has them in full.
      profile: (step, number of steps) to trace, e.g. (100, 5), once everything is compiled; None traces nothing. The
        trace lies below `profile/` of the run folder and opens in TensorBoard's profiler, XProf and Perfetto.
      initial: run folder or checkpoint to take initial parameters from (`transfer` reports what fits); None starts
        afresh from `seed`. Optimizer state never carries over.
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
        object.__setattr__(self, "evaluations", tuple(self.evaluations))
        object.__setattr__(self, "xla_options", tuple(self.xla_options))
        check_sets(self.xla_options)
        for field, low in (("steps", 0), ("batch_size", 1), ("microbatches", 1), ("seed", 0), ("log_every", 1)):
            value = getattr(self, field)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= low,
                f"{field} = {value!r} is no whole number >= {low}",
                where=f"TrainRun.{field}",
                fix="Give a whole number.",
            )
        check_profile(self.profile, self.steps)
        require(
            self.ema_decay is None or (isinstance(self.ema_decay, int | float) and 0 <= self.ema_decay < 1),
            f"ema_decay = {self.ema_decay!r} lies outside [0, 1)",
            where="TrainRun.ema_decay",
            fix="Give a decay such as 0.999, or None.",
        )
        require(
            self.batch_size % self.microbatches == 0,
            f"a batch of {self.batch_size} rows does not divide into {self.microbatches} microbatches",
            where="TrainRun.microbatches",
            fix="Choose a divisor of the batch size.",
        )
        for field in ("model", "objective", "optimizer"):
            try:
                hash(getattr(self, field))
            except TypeError as error:
                raise ConfigError(
                    f"{type(getattr(self, field)).__name__} cannot be hashed: {error}",
                    where=f"TrainRun.{field}",
                    fix="Make it a frozen dataclass whose fields are hashable (tuples, not lists).",
                ) from error
        names = [evaluation.name for evaluation in self.evaluations]
        require(
            len(set(names)) == len(names),
            f"two evaluations have one name: {', '.join(names)}",
            where="TrainRun.evaluations",
            fix="Name them apart.",
        )
        if self.checkpoint.best is not None:
            self.checkpoint.best.evaluation(self.evaluations)

    def validate(self) -> None:
        """Checks what needs the devices and the data: that batch, vocabulary, rows and objective fit the rest.

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
            f"{type(self.objective).__name__} needs rows of one example and the data is packed",
            where="DataPipeline.pack",
            fix="Set it to False.",
        )
        require(
            not needs.self_conditioning or self.model.spec.self_conditioning,
            f"{type(self.objective).__name__} feeds predictions back and the network has no layer that reads them",
            where="TransformerSpec.self_conditioning",
            fix="Bind it to True.",
        )
        require(
            not needs.token_schedules or layer_with(self.model, "exponents") is not None,
            f"{type(self.objective).__name__} learns a masking schedule a token and the network has no exponents",
            where="TrainRun.model",
            fix="Use gin/runs/token_schedules.gin, which wraps it in exponents.WithTokenSchedules.",
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
        """Raises `ConfigError` where the target window does not fit the objective's length model."""
        converter = getattr(self.data, "converter", None)
        if getattr(self.data, "pretraining", None) is None:
            window = getattr(converter, "target_window", None)
            check_window(self.objective.needs(), window, where=f"{type(converter).__name__}.target_window")

    def _check_samplers(self) -> None:
        """Raises `ConfigError` where an evaluation decodes another process than the one that is trained."""
        for evaluation in self.evaluations:
            check_sampler(
                self.objective.needs().contracts,
                getattr(evaluation, "sampler", None),
                where=f"TrainRun.evaluations, {evaluation.name}",
                fix="Use a sampler for this objective (diffusion-lm list samplers).",
            )

    def check_mesh(self, devices: Sequence[Any] | None = None) -> None:
        """Checks what needs the devices alone: that they (None = those of all processes) share a batch's rows evenly.

        Raises:
          ConfigError: they do not.
        """
        divisor = batch_divisor(self.rules, self.mesh.build(devices))
        rows = self.batch_size // self.microbatches
        what = "a batch" if self.microbatches == 1 else "a microbatch"
        require(
            rows % divisor == 0,
            f"{what} of {rows} rows does not divide by the {divisor} devices that share the batch",
            where="TrainRun.batch_size",
            fix=f"Use a multiple of {divisor * self.microbatches} rows, or fewer devices on mesh axes data and fsdp "
            "(gin/partitioning/fsdp_tp.gin gives some to the axis tensor).",
        )

    def _check_data(self) -> None:
        spec, specials = self.model.spec, getattr(self.data, "specials", None)
        if specials is not None:
            require(
                spec.vocab_size == specials.vocab_size,
                f"the model has a vocabulary of {spec.vocab_size} tokens and the data one of {specials.vocab_size}",
                where="TransformerSpec.vocab_size",
                fix=f"Set it to {specials.vocab_size}, or use data of the model's vocabulary.",
            )
            require(
                not self.objective.needs().mask_token or specials.mask_id is not None,
                f"{type(self.objective).__name__} needs a mask token and the vocabulary of the data has none",
                where="TrainRun.data",
                fix="Materialise the data with a vocabulary that reserves one.",
            )
        length, positions = getattr(self.data, "row_length", None), spec.max_positions
        require(
            positions is None or length is None or length <= positions,
            f"rows of {length} tokens are longer than the {positions} positions of the model",
            where="TransformerSpec.max_positions",
            fix=f"Set it to {length} or more, or shorten the rows of the data.",
        )

    def cuts(self) -> list[dict[str, Any]]:
        """Returns what the rows of the training data and of the evaluations do not hold whole, as JSON data.

        Each has `used_by` ("training" or the evaluation's name) and the fields of `checks.Cut`.
        """
        used: list[tuple[str, Any]] = []
        if hasattr(self.data, "cuts"):
            used.append(("training", self.data.cuts("training")))
        used += [(evaluation.name, getattr(evaluation, "cuts", ())) for evaluation in self.evaluations]
        return [{"used_by": name, **cut.plain()} for name, cuts in used for cut in cuts]

    def identity(self) -> dict[str, Any]:
        """Returns the plain data that determines the run's numbers; what only says how it is executed is left out.

        What is in the data's files is part of it, and so is what selects the checkpoint that is handed on. The number
        of steps is not where the schedule does not depend on it: such a run may be prolonged.
        """
        data = _without_execution(plain(self))
        adjusting = [plain(one) for one in self.evaluations if isinstance(one, Adjusting)]
        if adjusting:
            data["adjusting"] = _without_execution(adjusting)
        data["manifests"] = plain(getattr(self.data, "manifests", ()))
        pruned = getattr(self.data, "pruned", None)
        if pruned is not None:
            data["vocabulary_sha256"] = pruned.sha256
        if not self.optimizer.schedule.needs_total:
            del data["steps"]
        if self.checkpoint.best is not None:
            data["best"] = self.checkpoint.best.identity(self.evaluations)
        return data


def _without_execution(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = _EXECUTION.get(str(value.get("class", "")).rsplit(".", 1)[-1], ())
        return {key: _without_execution(item) for key, item in value.items() if key not in left_out}
    if isinstance(value, list):
        return [_without_execution(item) for item in value]
    return value
