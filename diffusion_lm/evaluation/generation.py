"""Decodes the prompts of a task and scores what comes out."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.data.checks import Cut
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.schema import Record
from diffusion_lm.evaluation.metrics import METRICS, Metric
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.samplers.base import Sampler
from diffusion_lm.training.card import plain


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """Held-out prompts and the metric that scores their completions.

    Attributes:
      name: key of the task in result files.
      data: where the prompts come from; its converter fixes the window that the sampler fills. Networks with and
        without an encoder get the same examples and lengths, each in its own layout.
      metric: a name of `evaluation.metrics.METRICS`.
      label: how reports call the task; the name where empty.
      limit: number of examples, from the start of the split; None = all of them.
      batch_size: prompts decoded at once.
      samples: completions drawn per prompt (pass@k draws several); each has keys of its own.
    """

    name: str
    data: DataPipeline
    metric: str
    label: str = ""
    limit: int | None = None
    batch_size: int = 32
    samples: int = 1

    def __post_init__(self):
        require(
            self.metric in METRICS,
            f"unknown metric '{self.metric}'",
            where="GenerationTask.metric",
            fix=f"Use one of {', '.join(sorted(METRICS))}.",
        )
        require(self.samples >= 1, f"samples = {self.samples}", where="GenerationTask.samples", fix="Draw at least 1.")
        require(
            self.batch_size >= 1, f"batch_size = {self.batch_size}", where="GenerationTask.batch_size", fix="Use >= 1."
        )

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Prompts that the window cuts, and references that it is too short for, of the examples that are used."""
        return self.data.cuts("prompts", self.limit)

    @property
    def oracle(self) -> str | None:
        """What the prompts give away of the reference ("length"), or None."""
        converter = getattr(self.data, "converter", None)
        return getattr(getattr(converter, "target_window", None), "oracle", None)

    @property
    def title(self) -> str:
        """How reports call the task; an oracle is part of it."""
        return (self.label or self.name) + (f" (oracle {self.oracle})" if self.oracle else "")

    @property
    def scorer(self) -> Metric:
        """The metric object that `metric` names."""
        return METRICS[self.metric]


@dataclasses.dataclass(frozen=True)
class Generation:
    """Completions of one task, with what they cost.

    Attributes:
      records: the examples, in order.
      predictions: `samples` decoded strings for each example.
      scores: the sampler's own score of each completion, f32[examples, samples].
      lengths: generated tokens of each completion, EOS and filler not counted, i32[examples, samples].
      forward_passes: network calls per completion, i32[examples, samples] (candidates counted one each).
      seconds: wall time of decoding, without compilation.
    """

    records: tuple[Record, ...]
    predictions: tuple[tuple[str, ...], ...]
    scores: np.ndarray
    lengths: np.ndarray
    forward_passes: np.ndarray
    seconds: float


class Program:
    """`sampler.generate` as a compiled program, one executable per shape of the prompt.

    Compilation is a step of its own (`prepare`), so that a clock around a call measures decoding alone (trap T55).
    """

    def __init__(self, architecture: Architecture, sampler: Sampler, constrain: Constrain = no_constraint):
        def decode(params, prompt: Batch, keys: StreamKeys) -> Decoded:
            model = BoundModel(architecture, params, constrain).for_loops()
            return constrain.whole(sampler.generate(model, prompt, keys))

        self._jitted = jax.jit(decode)
        self._executables: dict[tuple, Any] = {}

    def prepare(self, params: Any, prompt: Batch, keys: StreamKeys) -> None:
        """Compiles for the shapes of `prompt` unless that is done."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(prompt))
        if shapes not in self._executables:
            self._executables[shapes] = self._jitted.lower(params, prompt, keys).compile()

    def __call__(self, params: Any, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Returns the decoded prompts; compiles first where `prepare` did not."""
        self.prepare(params, prompt, keys)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(prompt))
        return self._executables[shapes](params, prompt, keys)


@functools.cache
def compiled_generate(architecture: Architecture, sampler: Sampler, constrain: Constrain = no_constraint) -> Program:
    """Returns the program of an architecture, a sampler and a placement, one in a process."""
    return Program(architecture, sampler, constrain)


def generate(model: BoundModel, sampler: Sampler, task: GenerationTask, *, seed: int = 0) -> Generation:
    """Decodes every prompt of `task`. A completion depends on (seed, example id, sample number), not on its batch.

    Prompts are laid out for the architecture: one task serves networks with and without an encoder. The devices of the
    model's placement share the rows of a batch where `batch_size` divides by their number.

    Raises:
      ConfigError: the sampler means other tokens by its ids than the data.
    """
    task.data.specials.check(sampler)
    architecture, params, constrain = model.architecture, model.params, model.constrain
    decode = compiled_generate(architecture, sampler, constrain)
    data = task.data.with_encoder(architecture.needs_encoder)
    vocabulary = data.vocabulary
    size = getattr(vocabulary, "size", None)
    require(
        size in (None, architecture.spec.vocab_size),
        f"the network has {architecture.spec.vocab_size} tokens and the data of task '{task.name}' {size}",
        where="GenerationTask.data",
        fix="Give training and evaluation one vocabulary, and one DataPipeline.vocabulary_map.",
    )
    # A reference that the metric cannot read is found before anything is decoded, which may take hours.
    known = list(data.records(task.limit))
    task.scorer.checked([record.reference for record in known], _names(known))
    records: list[Record] = []
    columns: dict[str, list] = {name: [] for name in ("predictions", "scores", "lengths", "forward_passes")}
    seconds = 0.0
    for prompt, batch_records in data.prompt_batches(task.batch_size, limit=task.limit):
        rows, placed = [], constrain.rows(prompt)
        for sample in range(task.samples):
            keys = StreamKeys.create(seed, sample)
            decode.prepare(params, placed, keys)
            started = time.perf_counter()
            rows.append(jax.device_get(decode(params, placed, keys)))
            seconds += time.perf_counter() - started
        records.extend(batch_records)
        texts = [target_texts(decoded, prompt, vocabulary) for decoded in rows]
        for row in range(len(batch_records)):  # the rows past the records only fill the last batch
            columns["predictions"].append(tuple(text[row] for text in texts))
            for name in ("scores", "lengths", "forward_passes"):
                columns[name].append([getattr(decoded, name)[row] for decoded in rows])
    return Generation(
        records=tuple(records),
        predictions=tuple(columns["predictions"]),
        scores=np.asarray(columns["scores"], np.float32),
        lengths=np.asarray(columns["lengths"], np.int32),
        forward_passes=np.asarray(columns["forward_passes"], np.int32),
        seconds=seconds,
    )


def target_texts(decoded: Decoded, prompt: Batch, vocabulary: Any) -> list[str]:
    """Returns the generated text of each row: the first `lengths` tokens of its target window."""
    starts = np.argmax(np.asarray(prompt.target_mask), axis=1)
    tokens, lengths = np.asarray(decoded.tokens), np.asarray(decoded.lengths)
    return [vocabulary.decode(tokens[b, starts[b] : starts[b] + lengths[b]].tolist()) for b in range(len(lengths))]


def _names(records: Sequence[Record]) -> list[str]:
    """Returns how errors call the examples."""
    return [f"example {number} (id {record.example_id})" for number, record in enumerate(records)]


def score(task: GenerationTask, generation: Generation) -> tuple[float, np.ndarray, dict[str, float]]:
    """Returns the task's headline value, its per-example statistics (for intervals) and the secondary values."""
    metric = task.scorer
    predictions: Sequence[Any] = generation.predictions
    if not metric.multiple_samples:
        predictions = [samples[0] for samples in generation.predictions]
    references = [record.reference for record in generation.records]
    statistics = metric.per_example_batch(references, predictions, _names(generation.records))
    return metric.aggregate(statistics), statistics, metric.secondary(statistics)


@dataclasses.dataclass(frozen=True)
class GenerationEvaluation:
    """Decodes a task during training; the trainer calls `run` every `every` steps.

    Attributes:
      task: what to decode; keep its `limit` small.
      sampler: how to decode it.
      every: period in steps; 0 = only after the last step.
      seed: root of the decoding noise; frozen, so that curves compare models and not draws.
    """

    task: GenerationTask
    sampler: Sampler
    every: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Prefix of the values in the log; an oracle is part of it."""
        return f"decode/{self.task.name}" + (f"/oracle_{self.task.oracle}" if self.task.oracle else "")

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """See `GenerationTask.cuts`."""
        return self.task.cuts

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of the values that `run` returns."""
        return self.task.scorer.value_names

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that, with the model, determines the numbers; what stands in the data's files is part of it."""
        task = dataclasses.replace(self.task, label="", batch_size=1)
        fields: dict[str, Any] = plain(dataclasses.replace(self, task=task, every=0))
        return fields | {"manifests": plain(self.task.data.manifests)}

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the metric's headline and secondary values."""
        del step
        result = generate(model, self.sampler, self.task, seed=self.seed)
        value, _, secondary = score(self.task, result)
        return {self.task.scorer.primary_key: value, **secondary}
