"""Generative perplexity: perplexity of generated texts under an autoregressive model, the judge.

A low value alone proves nothing: repeating one likely word, a low temperature, or imprecise sampling all lower it
(arXiv 2409.02908). The result therefore requires entropy, distinct n-grams and lengths of the texts, and the settings
of the sampler.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.data.vocabulary_map import PrunedVocabulary
from diffusion_lm.evaluation.generation import GenerationTask, generate
from diffusion_lm.evaluation.rolling import Document, score_documents
from diffusion_lm.evaluation.scoring_estimators import ExactAutoregressive
from diffusion_lm.samplers.sampler import Sampler
from diffusion_lm.training.card import plain
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.trained import trained_model


@dataclasses.dataclass(frozen=True)
class Diversity:
    """Diversity statistics of texts. Tokens are those of the judge, so that models with other vocabularies compare.

    Attributes:
      unigram_entropy: entropy in nats of the token frequencies within a text, mean over texts.
      distinct: unique n-grams divided by all n-grams over all texts, n = 1, 2, ... (arXiv 1510.03055).
      mean_length: tokens per text.
      empty: fraction of texts without tokens, which have no perplexity.
    """

    unigram_entropy: float
    distinct: tuple[float, ...]
    mean_length: float
    empty: float

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], orders: int = 4) -> "Diversity":
        """Returns the diversity of texts, each a sequence of tokens, with n-grams up to n = `orders`."""
        require(bool(texts), "no text was generated", where="Diversity", fix="Decode at least one prompt.")
        entropies, shares = [], []
        for text in texts:
            counts = np.array(list(Counter(text).values()), np.float64)
            p = counts / max(counts.sum(), 1.0)
            entropies.append(-float(np.sum(p * np.log(p))))
        for n in range(1, orders + 1):
            grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
            shares.append(len(set(grams)) / len(grams) if grams else 0.0)
        lengths = np.array([len(text) for text in texts])
        return cls(float(np.mean(entropies)) + 0.0, tuple(shares), float(lengths.mean()), float((lengths == 0).mean()))


@dataclasses.dataclass(frozen=True)
class GenerativePerplexity:
    """Perplexity of generated texts under a judge, with their diversity. No field has a default.

    Attributes:
      nats_per_token: sum of -log p over all texts under the judge, divided by `tokens`; NaN if all texts are empty.
      tokens: number of scored tokens.
      texts: number of texts.
      diversity: entropy, distinct n-grams and lengths of the texts.
      sampler: settings of the sampler (temperature, steps, ...), as plain data.
    """

    nats_per_token: float
    tokens: int
    texts: int
    diversity: Diversity
    sampler: Mapping[str, object]

    def __post_init__(self):
        require(
            isinstance(self.diversity, Diversity) and bool(self.sampler),
            "generative perplexity cannot be interpreted without diversity and sampler settings",
            where="GenerativePerplexity",
            fix="Pass Diversity.of(texts) and training.card.plain(sampler).",
        )

    @property
    def values(self) -> dict[str, float]:
        """The numbers by name, without those that are not finite."""
        found = {
            "generative_perplexity": math.exp(min(self.nats_per_token, 700.0)),
            "generative_nats_per_token": self.nats_per_token,
            "unigram_entropy": self.diversity.unigram_entropy,
            **{f"distinct_{n}": share for n, share in enumerate(self.diversity.distinct, 1)},
            "mean_length": self.diversity.mean_length,
            "empty": self.diversity.empty,
            "texts": float(self.texts),
            "tokens": float(self.tokens),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


@dataclasses.dataclass(frozen=True)
class Judge:
    """An autoregressive run whose exact likelihood scores texts.

    Attributes:
      run: configuration of the run.
      folder: its run directory.
      step: step of the checkpoint.
    """

    run: TrainRun
    folder: str
    step: int

    def __post_init__(self):
        require(
            self.run.objective.bound_kind == "exact",
            f"{type(self.run.objective).__name__} has no exact likelihood; the gap of a bound depends on the text",
            where="--judge",
            fix="Use the run directory of an autoregressive model.",
        )

    @property
    def vocabulary(self) -> Vocabulary | PrunedVocabulary:
        """The vocabulary of the run's data."""
        return self.run.data.vocabulary

    def load(self) -> BoundModel:
        """Returns the model with its parameters."""
        return trained_model(self.run, self.folder, step=self.step)

    def judge(
        self,
        model: BoundModel,
        prompts: Sequence[str],
        texts: Sequence[str],
        sampler: Sampler,
        batch_size: int,
    ) -> GenerativePerplexity:
        """Returns the perplexity of `texts`, each given its prompt, under the judge's `model`; EOS is not scored."""
        data = self.run.data
        encoded = [np.asarray(self.vocabulary.encode(text), np.int32) for text in texts]
        found = [
            Document(tokens, np.asarray(self.vocabulary.encode(prompt), np.int32), number, text)
            for number, (prompt, text, tokens) in enumerate(zip(prompts, texts, encoded, strict=True))
        ]
        estimator, size = ExactAutoregressive(self.run.objective.needs().visibility), data.row_length - 1
        keys = StreamKeys.create(0)
        # Later windows of a long text condition on at least half a row of its preceding tokens.
        scored = score_documents(estimator, model, found, keys, data.specials, size, size // 2, batch_size)
        tokens = sum(one.tokens for one in scored)
        return GenerativePerplexity(
            nats_per_token=sum(one.nll for one in scored) / tokens if tokens else math.nan,
            tokens=tokens,
            texts=len(texts),
            diversity=Diversity.of([text.tolist() for text in encoded]),
            sampler=plain(sampler),
        )


@dataclasses.dataclass(frozen=True)
class GenerativeEvaluation:
    """Decodes a task and scores the completions by a judge, each given its prompt.

    Attributes:
      task: the prompts; the metric is not used.
      sampler: the sampler.
      judge: the autoregressive run that scores the texts.
      seed: seed of the decoding noise.
    """

    task: GenerationTask
    sampler: Sampler
    judge: Judge
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the result."""
        return f"judged/{self.task.name}"

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of the result that are stored with it."""
        vocabulary = self.judge.vocabulary
        return {
            "sampler": self.sampler,
            "judge": {"folder": self.judge.folder, "step": self.judge.step},
            "tokeniser": {"sha256": vocabulary.sha256, "size": vocabulary.size},
            "meaning": "perplexity of generated texts under the judge, in the judge's tokens; compare at equal entropy",
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that, together with the model, determines the results."""
        task = dataclasses.replace(self.task, label="", batch_size=1)
        fields: dict[str, Any] = plain(dataclasses.replace(self, task=task))
        return fields | {"manifests": plain(self.task.data.manifests)}

    def run(self, model: BoundModel, step: int) -> dict[str, float]:
        """Returns the values of `GenerativePerplexity`."""
        del step
        result = generate(model, self.sampler, self.task, seed=self.seed)
        prompts = [record.inputs_text for record in result.records for _ in range(self.task.samples)]
        texts = [text for samples in result.predictions for text in samples]
        judged = self.judge.judge(self.judge.load(), prompts, texts, self.sampler, self.task.batch_size)
        return judged.values
