"""Decodes the prompts of a task and scores the completions."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded, Params
from diffusion_lm.data.checks import Cut
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.schema import Record
from diffusion_lm.evaluation.metrics import METRICS, Metric
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.samplers.sampler import Sampler
from diffusion_lm.training.card import plain


class TextDecoder(Protocol):
    """The part of a vocabulary that converts tokens to text."""

    def decode(self, tokens: Sequence[int], /) -> str:
        """Returns the text before the first EOS, without special tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """Held-out prompts and the metric that scores their completions.

    Attributes:
      name: key of the task in result files.
      data: the prompts. The converter sets the target window that the sampler fills. Networks with and without an
        encoder get the same examples and lengths in their own layout.
      metric: a key of `evaluation.metrics.METRICS`.
      label: name of the task in reports; default `name`.
      limit: number of examples, from the start of the split; None = all.
      batch_size: prompts per batch.
      samples: number of completions per prompt (several for pass@k), each with its own random keys.
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
            f"metric={self.metric!r}: unknown metric",
            where="GenerationTask.metric",
            fix=f"Use one of {', '.join(sorted(METRICS))}.",
        )
        require(self.samples >= 1, f"samples={self.samples}: must be >= 1", where="GenerationTask.samples")
        require(self.batch_size >= 1, f"batch_size={self.batch_size}: must be >= 1", where="GenerationTask.batch_size")

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Truncated prompts, and references longer than the target window, among the examples in use."""
        return self.data.cuts("prompts", self.limit)

    @property
    def oracle(self) -> str | None:
        """The property of the reference that the prompts reveal ("length"), or None."""
        converter = getattr(self.data, "converter", None)
        return getattr(getattr(converter, "target_window", None), "oracle", None)

    @property
    def title(self) -> str:
        """Name of the task in reports, with the oracle if there is one."""
        return (self.label or self.name) + (f" (oracle {self.oracle})" if self.oracle else "")

    @property
    def scorer(self) -> Metric:
        """The metric object of `metric`."""
        return METRICS[self.metric]


@dataclasses.dataclass(frozen=True)
class Generation:
    """Completions of one task, with their cost.

    Attributes:
      records: the examples, in order.
      predictions: `samples` decoded strings for each example.
      scores: f32[examples, samples], the sampler's score of each completion.
      lengths: i32[examples, samples], generated tokens of each completion without EOS and padding.
      forward_passes: i32[examples, samples], forward passes per completion; each candidate counts.
      seconds: wall time of decoding, without compilation.
    """

    records: tuple[Record, ...]
    predictions: tuple[tuple[str, ...], ...]
    scores: np.ndarray
    lengths: np.ndarray
    forward_passes: np.ndarray
    seconds: float


class Program:
    """`sampler.generate` compiled ahead of time, with one executable per shape of the prompt.

    Compilation is a separate step (`prepare`), so that timing a call measures only decoding (trap T55).
    """

    def __init__(self, architecture: Architecture, sampler: Sampler, constrain: Constrain = no_constraint):
        def decode(params, prompt: Batch, keys: StreamKeys) -> Decoded:
            model = BoundModel(architecture, params, constrain).for_loops()
            return constrain.whole(sampler.generate(model, prompt, keys))

        self._jitted = jax.jit(decode)
        self._executables: dict[tuple, jax.stages.Compiled] = {}

    def prepare(self, params: Params, prompt: Batch, keys: StreamKeys) -> None:
        """Compiles for the shapes of `prompt`, unless this was done before."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(prompt))
        if shapes not in self._executables:
            self._executables[shapes] = self._jitted.lower(params, prompt, keys).compile()

    def __call__(self, params: Params, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Returns the decoded prompts; compiles first if `prepare` was not called for their shapes."""
        self.prepare(params, prompt, keys)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(prompt))
        return self._executables[shapes](params, prompt, keys)


@functools.cache
def compiled_generate(architecture: Architecture, sampler: Sampler, constrain: Constrain = no_constraint) -> Program:
    """Returns the program of an architecture, a sampler and a placement, cached per process."""
    return Program(architecture, sampler, constrain)


def generate(model: BoundModel, sampler: Sampler, task: GenerationTask, *, seed: int = 0) -> Generation:
    """Decodes every prompt of `task`. A completion depends on (seed, example id, sample number), not on its batch.

    Prompts are converted to the layout of the architecture, with or without an encoder. Rows are distributed over the
    devices of the model's placement if `batch_size` is divisible by their number.

    Raises:
      ConfigError: special token ids of sampler and data differ, vocabulary sizes of network and data differ, or the
        metric cannot read a reference.
    """
    architecture, params, constrain = model.architecture, model.params, model.constrain
    decode = compiled_generate(architecture, sampler, constrain)
    data = task.data.with_encoder(architecture.needs_encoder)
    vocabulary = data.vocabulary
    size = getattr(vocabulary, "size", None)
    require(
        size in (None, architecture.spec.vocab_size),
        f"the network has {architecture.spec.vocab_size} tokens, but the data of task '{task.name}' has {size}",
        where="GenerationTask.data",
        fix="Use the same vocabulary and DataPipeline.vocabulary_map for training and evaluation.",
    )
    # Decoding may take hours, so references that the metric cannot read are found first.
    examples = list(data.records(task.limit))
    task.scorer.checked([record.reference for record in examples], _names(examples))
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
        for row in range(len(batch_records)):  # the last batch is padded with rows that have no record
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


def target_texts(decoded: Decoded, prompt: Batch, vocabulary: TextDecoder) -> list[str]:
    """Returns the generated text of each row: the first `lengths` tokens of its target window."""
    starts = np.argmax(np.asarray(prompt.target_mask), axis=1)
    tokens, lengths = np.asarray(decoded.tokens), np.asarray(decoded.lengths)
    return [vocabulary.decode(tokens[b, starts[b] : starts[b] + lengths[b]].tolist()) for b in range(len(lengths))]


def _names(records: Sequence[Record]) -> list[str]:
    """Returns the names of the examples in error messages."""
    return [f"example {number} (id {record.example_id})" for number, record in enumerate(records)]


def score(task: GenerationTask, generation: Generation) -> tuple[float, np.ndarray, dict[str, float]]:
    """Returns the primary score, the statistics f64[examples, K] for intervals, and the secondary scores."""
    metric = task.scorer
    predictions: Sequence[str | Sequence[str]] = generation.predictions
    if not metric.multiple_samples:
        predictions = [samples[0] for samples in generation.predictions]
    references = [record.reference for record in generation.records]
    statistics = metric.per_example_batch(references, predictions, _names(generation.records))
    return metric.aggregate(statistics), statistics, metric.secondary(statistics)


@dataclasses.dataclass(frozen=True)
class GenerationEvaluation:
    """Decodes and scores a task during training; the training loop calls `run` every `every` steps.

    Attributes:
      task: the task; use a small `limit`.
      sampler: the sampler.
      every: period in steps; 0 = only after the last step.
      seed: seed of the decoding noise; the same at every step, so that points of a curve differ only by the model.
    """

    task: GenerationTask
    sampler: Sampler
    every: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Prefix of the logged values, with the oracle if there is one."""
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
        """Plain data that, together with the model, determines the results, including the manifests of the data."""
        task = dataclasses.replace(self.task, label="", batch_size=1)
        fields: dict[str, Any] = plain(dataclasses.replace(self, task=task, every=0))
        return fields | {"manifests": plain(self.task.data.manifests)}

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the metric's primary and secondary scores."""
        del step
        result = generate(model, self.sampler, self.task, seed=self.seed)
        value, _, secondary = score(self.task, result)
        return {self.task.scorer.primary_key: value, **secondary}
