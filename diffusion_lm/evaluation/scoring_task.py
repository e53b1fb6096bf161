"""Likelihood of the targets of a task, per token and per byte, and multiple-choice accuracy, by an estimator.

    nats per token = sum over examples of -log p(target | conditioning) / sum over examples of real target tokens

Padding in a scored window adds to the nats but not to the tokens. EOS counts as a token and has no bytes. Models that
learn the length from padding and models that learn it from EOS are then comparable.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import is_real
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch
from diffusion_lm.data.checks import Cut
from diffusion_lm.data.fitting import Example
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.round_trip import unwritten
from diffusion_lm.data.schema import Record
from diffusion_lm.data.target_window import ExactEos, ExactTokens
from diffusion_lm.evaluation.scoring import Estimator, answers, score
from diffusion_lm.nn.named_masks import named_blocks
from diffusion_lm.objectives.objective import Objective
from diffusion_lm.training.card import first_difference, plain

MEANING = {
    "exact": "-log p under the model's generation process",
    "nelbo": "estimate of an upper bound of -log p",
    "pseudo": "neither -log p nor a bound of it",
}
NORMALISERS = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
"""Length of a choice that divides its log-likelihood, by the metric name of lm-evaluation-harness: characters for
acc_norm, UTF-8 bytes for acc_bytes (the same for ASCII). `acc_tokens` divides by tokens."""


Question = tuple[list[list[str]], int]
"""The choices of a question, each a list of texts, and the index of the correct one."""


@dataclasses.dataclass(frozen=True)
class ScoredExample:
    """A scored example.

    Attributes:
      nll: -log p of its target (for a question: of the correct choice), in nats.
      variance: variance of that estimate over its draws; 0 if exact, NaN if there was one draw.
      tokens: number of real target tokens.
      bytes: number of UTF-8 bytes of the target's text.
      draws: mean number of draws per row.
      correct: whether the correct choice has the best score, by metric name; empty without choices.
      unsure: whether the margin of the best choice is within two standard errors.
      lossy: number of choices that the vocabulary cannot represent completely.
    """

    nll: float
    variance: float
    tokens: int
    bytes: int
    draws: float
    correct: dict[str, bool]
    unsure: bool = False
    lossy: int = 0


@dataclasses.dataclass(frozen=True)
class ScoringEvaluation:
    """Scores a task with an estimator; can be used as an evaluation of a training run.

    Examples with reference `{"choices": [...], "answer": index}` are questions. Every choice is scored after the
    conditioning of the example, with the same noise, and without EOS unless the estimator appends it. The correct
    choice is the target for likelihood values. A choice that is a list of texts is encoded text by text. All other
    examples are scored in the target window of the converter.

    Attributes:
      data: the examples; the converter should be that of the model's training.
      estimator: the estimator.
      name: prefix of the logged values.
      every: period in steps; 0 = only after the last step.
      limit: number of examples; None = all.
      batch_size: examples (or questions) per batch, and rows per forward pass.
      seed: seed of the frozen noise.
      mismatches: differences between the estimator and the training (function `mismatches`); stored only.
    """

    data: DataPipeline
    estimator: Estimator
    name: str = "score"
    every: int = 0
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    mismatches: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of the result that are stored with it: estimator, data, tokenizer, definition of a byte."""
        return {
            "estimator": self.estimator,
            "kind": self.estimator.bound_kind,
            "meaning": MEANING[self.estimator.bound_kind],
            "data": [f"{source.task}/{source.split}" for source in self.data.sources],
            "converter": self.data.converter,
            "limit": self.limit,
            "seed": self.seed,
            "tokeniser": {"sha256": self.data.vocabulary.sha256, "size": self.data.vocabulary.size},
            "unlike_training": self.mismatches,
            "bytes": "UTF-8 bytes of the target's text; EOS and padding add to the nats but have no bytes",
        }

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Truncated examples among those in use; choices are never truncated."""
        found = self.data.cuts("scoring", self.limit)
        if any(_question(record) for record in self.data.records(1)):
            return tuple(cut for cut in found if cut.part != "targets")
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that, together with the model, determines the results, including the manifests of the data."""
        fields: dict[str, Any] = plain(dataclasses.replace(self, name="", every=0, batch_size=1))
        return fields | {"manifests": plain(self.data.manifests)}

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the finite values of `summary` (e.g. no standard error if there is one draw)."""
        del step
        examples = self.examples(model, StreamKeys.create(self.seed))
        require(
            bool(examples),
            "the evaluation split has no examples",
            where="ScoringEvaluation.data",
            fix="Use a split that is not empty.",
        )
        values = summary(examples, self.estimator.bound_kind)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def examples(self, model: BoundModel, keys: StreamKeys) -> list[ScoredExample]:
        """Returns the scored examples in stored order."""
        examples: list[ScoredExample] = []
        for batch, records in self.data.eval_batches(self.batch_size, limit=self.limit):
            questions = [_question(record) for record in records]
            if any(questions):
                examples += self._choices(model, records, questions, keys)
            else:
                rows = jax.tree.map(lambda x, count=len(records): x[:count], batch)
                examples += self._targets(model, rows, records, keys)
        return examples

    def _targets(
        self, model: BoundModel, batch: Batch, records: Sequence[Record], keys: StreamKeys
    ) -> list[ScoredExample]:
        scores = score(self.estimator, model, batch, keys, rows_per_pass=self.batch_size)
        real = self._real(batch)
        return [
            ScoredExample(
                nll=-float(scores.log_likelihood[row]),
                variance=float(scores.standard_error[row]) ** 2,
                tokens=len(tokens),
                bytes=len(self._text(record, tokens).encode()),
                draws=float(scores.draws[row]),
                correct={},
            )
            for row, (record, tokens) in enumerate(zip(records, real, strict=True))
        ]

    def _choices(
        self, model: BoundModel, records: Sequence[Record], found: Sequence[Question | None], keys: StreamKeys
    ) -> list[ScoredExample]:
        questions = [question for question in found if question is not None]
        require(
            len(questions) == len(found),
            "only some of the examples have choices",
            where="ScoringEvaluation.data",
            fix="Put examples with and without choices into separate tasks.",
        )
        owners = [number for number, (choices, _) in enumerate(questions) for _ in choices]
        parts = [choice for choices, _ in questions for choice in choices]
        texts = ["".join(pieces) for pieces in parts]
        examples = [
            Example(
                records[owner].inputs, self._encoded(pieces), records[owner].example_id, suffix=records[owner].suffix
            )
            for owner, pieces in zip(owners, parts, strict=True)
        ]
        window: Any = ExactEos() if self.estimator.append_eos else ExactTokens()
        # Conditioning may be truncated on the left. A truncated choice would get too high a likelihood (trap T22).
        policy = "error" if self.data.converter.too_long == "error" else "truncate_inputs"
        converter: Any = dataclasses.replace(self.data.converter, target_window=window, too_long=policy)  # type: ignore[type-var]
        batch = converter.batch([[example] for example in examples], self.data.specials, training=False)
        scores = score(self.estimator, model, batch, keys, rows_per_pass=self.batch_size)
        lengths = {name: [length(text) for text in texts] for name, length in NORMALISERS.items()}
        lengths["acc_tokens"] = scores.tokens.tolist()
        chosen = {name: answers(scores, owners, by) for name, by in lengths.items()}
        real, scored_examples = self._real(batch), []
        for owner, (choices, answer) in enumerate(questions):
            first = owners.index(owner)
            # `best` and `margin` do not depend on the length by which `best_normalised` divides.
            correct, plain_choice = first + answer, chosen["acc_norm"][owner]
            scored_examples.append(
                ScoredExample(
                    nll=-float(scores.log_likelihood[correct]),
                    variance=float(scores.standard_error[correct]) ** 2,
                    tokens=len(real[correct]),
                    bytes=len(texts[correct].encode()),
                    draws=float(np.mean(scores.draws[first : first + len(choices)])),
                    correct={"acc": plain_choice.best == answer}
                    | {name: by[owner].best_normalised == answer for name, by in chosen.items()},
                    lossy=sum(self._lossy(pieces) for pieces in choices),
                    unsure=plain_choice.margin <= 2 * plain_choice.margin_error,
                )
            )
        return scored_examples

    def _lossy(self, pieces: Sequence[str]) -> bool:
        """Returns whether encoding loses part of a choice, in which case two choices may have the same tokens."""
        return any(unwritten(self.data.full_vocabulary, piece) for piece in pieces)

    def _encoded(self, pieces: Sequence[str]) -> np.ndarray:
        """Returns the tokens of a choice, with each piece encoded separately."""
        return np.asarray([token for text in pieces for token in self.data.vocabulary.encode(text)], np.int32)

    def _real(self, batch: Batch) -> list[np.ndarray]:
        """Returns the real tokens of each row (`core.real_tokens`)."""
        real = np.asarray(is_real(batch))
        return [row[mask] for row, mask in zip(np.asarray(batch.tokens), real, strict=True)]

    def _text(self, record: Record, tokens: np.ndarray) -> str:
        """Returns the text of the scored tokens: that of the task, or decoded tokens if the target was truncated."""
        eos_id = self.data.specials.eos_id
        complete = np.array_equal(tokens[tokens != eos_id], record.targets[record.targets != eos_id])
        return record.targets_text if complete and record.targets_text else self.data.vocabulary.decode(tokens.tolist())


def _question(record: Record) -> Question | None:
    """Returns the choices, each a list of texts, and the index of the correct one; None if there are no choices."""
    reference = record.reference
    if not isinstance(reference, dict) or "choices" not in reference:
        return None
    choices: Any = reference["choices"]
    answer: Any = reference.get("answer")
    valid = isinstance(choices, list) and len(choices) > 1 and all(_is_choice(choice) for choice in choices)
    require(
        valid and isinstance(answer, int) and 0 <= answer < len(choices),
        f"the reference of example {record.example_id} is not a valid question: {reference!r}",
        where="ScoringEvaluation.data",
        fix='Use {"choices": [at least two texts or lists of texts], "answer": index of the correct choice}.',
    )
    return [[choice] if isinstance(choice, str) else choice for choice in choices], answer


def _is_choice(choice: object) -> bool:
    pieces = [choice] if isinstance(choice, str) else choice
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return False
    return any(pieces)  # an empty choice would have probability 1 and always win


def summary(examples: Sequence[ScoredExample], kind: str) -> dict[str, float]:
    """Returns the values over all examples; a value that cannot be computed is NaN.

    - `nats_per_token`, `bits_per_token`, `bits_per_byte`, and the perplexity per token as `perplexity_exact` or
      `perplexity_bound`. For kind "pseudo" only `pseudo_nats_per_token`.
    - Standard errors of nats per token: `draw_error` over the Monte Carlo draws for these examples, `example_error`
      over the choice of examples, including their draws.
    - With choices: `acc`, `acc_norm`, `acc_bytes` and `acc_tokens`, each with its standard error over examples;
      `unsure`, the fraction of questions where the best two choices are within the error of the draws; and
      `lossy_choices`, the number of choices that the vocabulary cannot represent completely, if any.
    """
    nll = np.array([example.nll for example in examples])
    tokens = np.array([example.tokens for example in examples], np.float64)
    total, size, count = nll.sum(), tokens.sum(), len(examples)
    bytes_ = sum(example.bytes for example in examples)
    mean = total / size
    spread = np.sqrt(((nll - mean * tokens) ** 2).sum() * count / (count - 1)) / size if count > 1 else math.nan
    name = "pseudo_nats_per_token" if kind == "pseudo" else "nats_per_token"
    values = {
        "examples": float(count),
        "tokens": size,
        "bytes": float(bytes_),
        "draws": float(np.mean([example.draws for example in examples])),
        name: mean,
        "draw_error": math.sqrt(sum(example.variance for example in examples)) / size,
        "example_error": spread,
    }
    if kind != "pseudo":
        values["bits_per_token"] = mean / math.log(2)
        values["bits_per_byte"] = total / math.log(2) / bytes_ if bytes_ else math.nan
        values["perplexity_exact" if kind == "exact" else "perplexity_bound"] = math.exp(min(mean, 700.0))
    for rule in examples[0].correct:
        share = float(np.mean([example.correct[rule] for example in examples]))
        values[rule] = share
        values[f"{rule}_error"] = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
    if examples[0].correct:
        if any(example.lossy for example in examples):
            values["lossy_choices"] = float(sum(example.lossy for example in examples))
        values["unsure"] = float(np.mean([example.unsure for example in examples]))
    return {key: float(value) for key, value in values.items()}


def mismatches(estimator: Estimator, objective: Objective) -> tuple[str, ...]:
    """Returns a description of each difference between an estimator and the objective that trained the model.

    Differences are allowed (e.g. the chain rule on a model trained for AR and block diffusion). A wrong alignment or
    visibility, however, gives plausible but wrong numbers (trap T20), so results list the differences.

    Raises:
      ConfigError: the estimator masks tokens, but the model was trained without MASK.
    """
    needs = objective.needs()
    require(
        not getattr(estimator, "needs_mask_token", False) or needs.mask_token,
        f"{type(estimator).__name__} masks tokens, but {type(objective).__name__} trained without MASK",
        where="--estimator",
        fix="Use an estimator for this noise process (diffusion-lm list scoring).",
    )
    own = getattr(estimator, "objective", None)
    if own is not None:
        difference = first_difference(plain(objective), plain(own), "objective")
        return (difference,) if difference else ()
    found = []
    for name, trained in (("visibility", needs.visibility), ("alignment", getattr(objective, "alignment", None))):
        used = getattr(estimator, name, None)
        if used is not None and trained is not None and used != trained:
            found.append(f"{name} is {trained} in training and {used} here")
    if named_blocks(needs.visibility) is not None and not getattr(estimator, "keeps_past_clean", True):
        found.append(
            "in training the tokens before a noisy block are clean, but here masks cover the whole target "
            "(gin/scoring/block_nelbo.gin scores block by block)"
        )
    return tuple(found)
