"""Likelihood of a task's targets, or of its choices, by an estimator: per token and per byte, and who picked what.

    nats per token = sum over examples of -log p(target | conditioning) / sum over examples of their tokens

A token here is a real one: filler of a scored window costs nats and counts for nothing, EOS counts as a token and has
no bytes. So models that say the length by padding and models that say it by EOS are charged for the same text.
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
    "exact": "-log p of the model's own process",
    "nelbo": "an upper bound of -log p, estimated",
    "pseudo": "neither -log p nor a bound of it",
}
NORMALISERS = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
"""Lengths of a choice by which its log-likelihood is divided, under the names of lm-evaluation-harness: its acc_norm
counts characters, its acc_bytes UTF-8 bytes; on ASCII they are the same. Beside them `acc_tokens` divides by tokens."""


@dataclasses.dataclass(frozen=True)
class ScoredExample:
    """One example, scored.

    Attributes:
      nll: -log p of its target (of the right choice), nats.
      variance: of that estimate, from its draws; 0 where it is exact, NaN where one draw was taken.
      tokens: real target tokens.
      bytes: UTF-8 bytes of the target's text.
      draws: draws for each of its rows, on average.
      correct: whether the right choice won, by the name of the rule; empty without choices.
      unsure: whether the winner's lead is within twice its standard error.
      lossy: choices that the vocabulary cannot write whole.
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
    """Scores a task with an estimator: an evaluation of a run like any other.

    Examples whose reference is `{"choices": [...], "answer": index}` are questions: every choice is scored behind the
    example's conditioning, on the same noise, without the window's EOS unless the estimator appends it, and the right
    one counts as the target. A choice that is a list of texts is encoded piece by piece. All others are scored in the
    converter's own window.

    Attributes:
      data: the examples; its converter should be the one that the model was trained with.
      estimator: how rows are scored.
      name: prefix of the values in logs.
      every: period in steps; 0 = only after the last step.
      limit: number of examples; None = all.
      batch_size: examples (or questions) a batch, and rows a forward pass.
      seed: root of the frozen noise.
      mismatches: what the estimator takes otherwise than the model's training (`mismatches`), for the record.
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
        """What a reader of the numbers must know: the estimator, the data, the tokeniser, what a byte is."""
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
            "bytes": "UTF-8 bytes of the target's text; EOS and filler cost nats and have no bytes",
        }

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """What the window cuts of the examples that are used; choices are never cut."""
        found = self.data.cuts("scoring", self.limit)
        if any(_question(record) for record in self.data.records(1)):
            return tuple(cut for cut in found if cut.part != "targets")
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that, with the model, determines the numbers; what stands in the data's files is part of it."""
        fields: dict[str, Any] = plain(dataclasses.replace(self, name="", every=0, batch_size=1))
        return fields | {"manifests": plain(self.data.manifests)}

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the values of `summary`; those that cannot be told (an error from one draw) are left out."""
        del step
        examples = self.examples(model, StreamKeys.create(self.seed))
        require(bool(examples), "the split holds no examples", where="ScoringEvaluation.data", fix="Fill it.")
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
        kept = self._real(batch)
        return [
            ScoredExample(
                nll=-float(scores.log_likelihood[row]),
                variance=float(scores.standard_error[row]) ** 2,
                tokens=len(tokens),
                bytes=len(self._text(record, tokens).encode()),
                draws=float(scores.draws[row]),
                correct={},
            )
            for row, (record, tokens) in enumerate(zip(records, kept, strict=True))
        ]

    def _choices(
        self, model: BoundModel, records: Sequence[Record], questions: Sequence[Any], keys: StreamKeys
    ) -> list[ScoredExample]:
        require(
            all(questions),
            "some examples have choices and some have none",
            where="ScoringEvaluation.data",
            fix="Score them apart.",
        )
        owners = [number for number, (choices, _) in enumerate(questions) for _ in choices]
        parts = [choice for choices, _ in questions for choice in choices]
        texts = ["".join(pieces) for pieces in parts]
        asked = [records[owner] for owner in owners]
        examples = [
            Example(record.inputs, self._encoded(pieces), record.example_id, suffix=record.suffix)
            for record, pieces in zip(asked, parts, strict=True)
        ]
        window: Any = ExactEos() if self.estimator.append_eos else ExactTokens()
        # Conditioning may be cut on its left, a choice never: it would look better than it is (trap T22).
        policy = "error" if self.data.converter.too_long == "error" else "truncate_inputs"
        converter: Any = dataclasses.replace(self.data.converter, target_window=window, too_long=policy)  # type: ignore[type-var]
        batch = converter.batch([[example] for example in examples], self.data.specials, training=False)
        scores = score(self.estimator, model, batch, keys, rows_per_pass=self.batch_size)
        lengths = {name: [length(text) for text in texts] for name, length in NORMALISERS.items()}
        lengths["acc_tokens"] = scores.tokens.tolist()
        chosen = {name: answers(scores, owners, by) for name, by in lengths.items()}
        kept, found = self._real(batch), []
        for owner, (choices, answer) in enumerate(questions):
            first = owners.index(owner)
            right, plain_choice = first + answer, chosen["acc_norm"][owner]
            found.append(
                ScoredExample(
                    nll=-float(scores.log_likelihood[right]),
                    variance=float(scores.standard_error[right]) ** 2,
                    tokens=len(kept[right]),
                    bytes=len(texts[right].encode()),
                    draws=float(np.mean(scores.draws[first : first + len(choices)])),
                    correct={"acc": plain_choice.best == answer}
                    | {name: by[owner].best_normalised == answer for name, by in chosen.items()},
                    lossy=sum(self._lossy(pieces) for pieces in choices),
                    unsure=plain_choice.margin <= 2 * plain_choice.margin_error,
                )
            )
        return found

    def _lossy(self, pieces: Sequence[str]) -> bool:
        """Whether the vocabulary cannot write a choice: two choices may then be one to the model."""
        return any(unwritten(self.data.full_vocabulary, piece) for piece in pieces)

    def _encoded(self, pieces: Sequence[str]) -> np.ndarray:
        """Returns the tokens of a choice, each piece encoded by itself."""
        return np.asarray([token for text in pieces for token in self.data.vocabulary.encode(text)], np.int32)

    def _real(self, batch: Batch) -> list[np.ndarray]:
        """Returns the real tokens of each row (`core.real_tokens`)."""
        real = np.asarray(is_real(batch))
        return [row[mask] for row, mask in zip(np.asarray(batch.tokens), real, strict=True)]

    def _text(self, record: Record, tokens: np.ndarray) -> str:
        """Returns the text of the scored tokens: the task's own where the row holds the whole of it."""
        eos_id = self.data.specials.eos_id
        whole = np.array_equal(tokens[tokens != eos_id], record.targets[record.targets != eos_id])
        return record.targets_text if whole and record.targets_text else self.data.vocabulary.decode(tokens.tolist())


def _question(record: Record) -> tuple[list[list[str]], int] | None:
    """Returns the choices, each a list of pieces, and the number of the right one; None where there are none."""
    reference = record.reference
    if not isinstance(reference, dict) or "choices" not in reference:
        return None
    choices: Any = reference["choices"]
    answer: Any = reference.get("answer")
    known = isinstance(choices, list) and len(choices) > 1 and all(_is_choice(choice) for choice in choices)
    require(
        known and isinstance(answer, int) and 0 <= answer < len(choices),
        f"the reference of example {record.example_id} is no question: {reference!r}",
        where="ScoringEvaluation.data",
        fix='Write {"choices": [at least two texts, or lists of texts], "answer": the index of the right one}.',
    )
    return [[choice] if isinstance(choice, str) else choice for choice in choices], answer


def _is_choice(choice: Any) -> bool:
    pieces = [choice] if isinstance(choice, str) else choice
    texts = isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces)
    return texts and any(pieces)  # a choice without a token would be certain, and win


def summary(examples: Sequence[ScoredExample], kind: str) -> dict[str, float]:
    """Returns what the examples say together; a value that cannot be told is NaN.

    `nats_per_token`, `bits_per_token`, `bits_per_byte` and the perplexity per token, whose name says "perplexity_exact"
    or "perplexity_bound"; of what is neither there is `pseudo_nats_per_token` alone. Of nats per token two standard
    errors: `draw_error` from the Monte-Carlo draws for these examples, `example_error` from the choice of examples (and
    their draws). With choices `acc`, `acc_norm`, `acc_bytes`, `acc_tokens`, each with its standard error over examples,
    `unsure`, the share of questions whose draws do not tell the winner from the second, and `lossy_choices`, the number
    of choices that the vocabulary cannot write whole, where there are any.
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
    """Returns in words what an estimator takes otherwise than the objective that trained the model.

    Such numbers may be wanted (the chain rule on a model that is autoregressive and block diffusion at once), but a
    shift or a visibility by mistake gives plausible nonsense (trap T20), so whoever reports them says so.

    Raises:
      ConfigError: the estimator masks tokens, and the model has never seen MASK.
    """
    needs = objective.needs()
    require(
        not getattr(estimator, "needs_mask_token", False) or needs.mask_token,
        f"{type(estimator).__name__} masks tokens, and {type(objective).__name__} trained without MASK",
        where="--estimator",
        fix="Use an estimator for that noise (diffusion-lm list scoring).",
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
            "in training the tokens before a noisy block are clean, here masks are spread over the whole target "
            "(gin/scoring/block_nelbo.gin scores block by block)"
        )
    return tuple(found)
