"""Rolling likelihood: scores documents longer than a row in windows, every token exactly once.

    -log p(document)  ~  sum over windows of -log p(scored tokens of the window | BOS, context in its row)

This is `loglikelihood_rolling` of lm-evaluation-harness. The first window has no context, and each later one has at
least `context` preceding tokens. The last window may have few tokens to score; preceding tokens fill its row.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.schema import Record
from diffusion_lm.evaluation.generation import TextDecoder
from diffusion_lm.evaluation.scoring import Estimator, continuation_batch, score
from diffusion_lm.evaluation.scoring_task import ScoredExample, ScoringEvaluation


@dataclasses.dataclass(frozen=True)
class ScoredWindow:
    """One row of a document: tokens [first, start) are conditioning, tokens [start, end) are scored."""

    first: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text to score.

    Attributes:
      tokens: i32[n], the tokens to score.
      prompt: i32[p], tokens before the text, used as conditioning only.
      example_id: key of its noise.
      text: the text, for its number of bytes; EOS has none.
    """

    tokens: np.ndarray
    prompt: np.ndarray
    example_id: int
    text: str


@dataclasses.dataclass(frozen=True)
class RollingEvaluation(ScoringEvaluation):
    """Scores documents of any length with an estimator; values as in `scoring_task.summary`, per document.

    If `materialise` split a document into pieces, they are joined again, up to the piece that ends with EOS. Inputs of
    a record are conditioning. For a bound, the value is the sum of the bounds of the windows.

    Attributes:
      window: tokens per row after BOS; None = the row length of the model's training.
      context: minimum number of preceding tokens in the row of every window except the first.
    """

    window: int | None = None
    context: int = 1

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of `ScoringEvaluation`, and window and context."""
        return {**super().conditions, "window": self.size, "context": self.context}

    @property
    def size(self) -> int:
        """Tokens per row after BOS."""
        return self.data.row_length - 1 if self.window is None else self.window

    def examples(self, model: BoundModel, keys: StreamKeys) -> list[ScoredExample]:
        """Returns the first `limit` documents, scored."""
        found = documents(self.data.records(), self.data.vocabulary, self.data.specials)
        chosen = list(itertools.islice(found, self.limit))
        return score_documents(
            self.estimator, model, chosen, keys, self.data.specials, self.size, self.context, self.batch_size
        )


def windows(length: int, size: int, context: int, prompt: int = 0) -> list[ScoredWindow]:
    """Returns the windows of a document in order; their scored parts cover the text without gaps or overlap.

    Args:
      length: number of tokens of prompt and text.
      size: tokens per row after BOS.
      context: minimum number of tokens before the scored ones, if the document has that many.
      prompt: number of tokens at the beginning that are not scored.

    Raises:
      ConfigError: `context` leaves no slot for a scored token.
    """
    require(
        0 <= context < size,
        f"context={context}: must be in [0, {size}), because a row has {size} tokens after BOS",
        where="RollingEvaluation.context",
        fix="Use a smaller context, or a larger RollingEvaluation.window.",
    )
    found, start = [], prompt
    while start < length:
        # The first row has the whole prompt if it fits; otherwise it is truncated on the left like any context.
        end = min(size if start == prompt < size else start + size - context, length)
        found.append(ScoredWindow(max(end - size, 0), start, end))
        start = end
    return found


def documents(records: Iterator[Record], vocabulary: TextDecoder, specials: SpecialTokens) -> Iterator[Document]:
    """Yields documents, joining consecutive records that are pieces of one document."""
    pieces: list[Record] = []
    for record in records:
        pieces.append(record)
        # A record with inputs is a whole document. Other documents continue in the next record until EOS.
        if len(record.inputs) or record.targets_text or record.targets[-1:].tolist() == [specials.eos_id]:
            yield _joined(pieces, vocabulary, specials)
            pieces = []
    if pieces:
        yield _joined(pieces, vocabulary, specials)


def _joined(pieces: Sequence[Record], vocabulary: TextDecoder, specials: SpecialTokens) -> Document:
    tokens = np.concatenate([piece.targets for piece in pieces])
    text = pieces[0].targets_text or vocabulary.decode(tokens[tokens != specials.eos_id].tolist())
    return Document(tokens, pieces[0].inputs, pieces[0].example_id, text)


def score_documents(
    estimator: Estimator,
    model: BoundModel,
    texts: Sequence[Document],
    keys: StreamKeys,
    specials: SpecialTokens,
    size: int,
    context: int,
    batch_size: int,
) -> list[ScoredExample]:
    """Returns the scores of documents; a document without tokens has nll 0.

    Args:
      estimator: the estimator.
      model: a network without an encoder.
      texts: the documents.
      keys: random keys of the noise.
      specials: special tokens of the model's vocabulary.
      size: tokens per row after BOS.
      context: see `windows`.
      batch_size: rows per forward pass.
    """
    require(
        not model.architecture.needs_encoder,
        "rolling likelihood does not support networks with an encoder",
        where="RollingEvaluation",
        fix="Score the targets without --rolling.",
    )
    rows = [
        (number, text, window)
        for number, text in enumerate(texts)
        for window in windows(len(text.prompt) + len(text.tokens), size, context, len(text.prompt))
    ]
    nll, variance = np.zeros(len(texts)), np.zeros(len(texts))
    draws: list[list[float]] = [[] for _ in texts]
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        whole = [np.concatenate([text.prompt, text.tokens]) for _, text, _ in part]
        batch = continuation_batch(
            [tokens[w.first : w.start].tolist() for tokens, (_, _, w) in zip(whole, part, strict=True)],
            [tokens[w.start : w.end].tolist() for tokens, (_, _, w) in zip(whole, part, strict=True)],
            size + 1,
            special=specials,
        )
        # Noise is keyed by example id, so each window gets its own id (a hash of document and position).
        ids = np.array([(text.example_id + 2654435761 * w.start) % 2**32 for _, text, w in part], np.uint32)
        batch = batch.replace(example_ids=jnp.broadcast_to(jnp.asarray(ids)[:, None], batch.tokens.shape))
        scores = score(estimator, model, batch, keys, rows_per_pass=batch_size)
        for row, (number, _, _) in enumerate(part):
            nll[number] -= scores.log_likelihood[row]
            variance[number] += scores.standard_error[row] ** 2
            draws[number].append(float(scores.draws[row]))
    return [
        ScoredExample(
            nll=float(nll[number]),
            variance=float(variance[number]),
            tokens=len(text.tokens),
            bytes=len(text.text.encode()),
            draws=float(np.mean(draws[number])) if draws[number] else 0.0,
            correct={},
        )
        for number, text in enumerate(texts)
    ]
