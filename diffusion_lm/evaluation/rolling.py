"""Rolling likelihood: whole documents, longer than a row, in windows that score every token exactly once.

    -log p(document)  ~  sum over windows of -log p(tokens of the window | BOS, the context that its row holds)

as `loglikelihood_rolling` of lm-evaluation-harness: the first window has no context, each later one has at least
`context` tokens of the text before it, and the last one, which may be short, has as many as its row holds.
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
from diffusion_lm.evaluation.scoring import Estimator, continuation_batch, score
from diffusion_lm.evaluation.scoring_task import ScoredExample, ScoringEvaluation


@dataclasses.dataclass(frozen=True)
class Window:
    """A row of a document: tokens [first, start) are conditioning, tokens [start, end) are scored."""

    first: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A text to score.

    Attributes:
      tokens: i32[n], all scored.
      prompt: i32[p], what stands before the text; conditioning only.
      example_id: root of its noise.
      text: the text, for its bytes; EOS has none.
    """

    tokens: np.ndarray
    prompt: np.ndarray
    example_id: int
    text: str


@dataclasses.dataclass(frozen=True)
class RollingEvaluation(ScoringEvaluation):
    """Scores documents of any length with an estimator; values as in `scoring_task.summary`, per document.

    Pieces that materialising cut a document into are joined again, up to the piece that ends with EOS. Inputs of a
    record are conditioning. With a bound the value is the sum of the windows' bounds.

    Attributes:
      window: tokens of a row after its BOS; None = the row length of the model's training.
      context: the least number of tokens that a window after the first one sees of the text before it.
    """

    window: int | None = None
    context: int = 1

    @property
    def conditions(self) -> dict[str, Any]:
        """Those of all scores, and the windows."""
        return {**super().conditions, "window": self.size, "context": self.context}

    @property
    def size(self) -> int:
        """Tokens of a row after its BOS."""
        return self.data.row_length - 1 if self.window is None else self.window

    def examples(self, model: BoundModel, keys: StreamKeys) -> list[ScoredExample]:
        """Returns the scored documents, of which `limit` counts the first ones."""
        found = documents(self.data.records(), self.data.vocabulary, self.data.specials)
        chosen = list(itertools.islice(found, self.limit))
        return score_documents(
            self.estimator, model, chosen, keys, self.data.specials, self.size, self.context, self.batch_size
        )


def windows(length: int, size: int, context: int, prompt: int = 0) -> list[Window]:
    """Returns the windows of a document, in order; the scored parts cut it without a gap and without an overlap.

    Args:
      length: tokens of prompt and text.
      size: tokens of a row after its BOS.
      context: the least number of tokens before the scored ones, where there are as many.
      prompt: tokens at the beginning that are not scored.

    Raises:
      ConfigError: a row has no slot left for a scored token.
    """
    require(
        0 <= context < size,
        f"rows of {size} tokens have no room for {context} of context and one that is scored",
        where="RollingEvaluation.context",
        fix="Give less context, or longer windows.",
    )
    found, start = [], prompt
    while start < length:
        # The first row keeps its whole prompt; a prompt that fills it is cut on its left, as all context is.
        end = min(size if start == prompt < size else start + size - context, length)
        found.append(Window(max(end - size, 0), start, end))
        start = end
    return found


def documents(records: Iterator[Record], vocabulary: Any, specials: SpecialTokens) -> Iterator[Document]:
    """Yields the documents that consecutive records make up."""
    pieces: list[Record] = []
    for record in records:
        pieces.append(record)
        # Records with inputs are whole; a document continues in the next piece until EOS.
        if len(record.inputs) or record.targets_text or record.targets[-1:].tolist() == [specials.eos_id]:
            yield _joined(pieces, vocabulary, specials)
            pieces = []
    if pieces:
        yield _joined(pieces, vocabulary, specials)


def _joined(pieces: Sequence[Record], vocabulary: Any, specials: SpecialTokens) -> Document:
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
    """Returns the scores of documents, of which those without a token cost nothing.

    Args:
      estimator: how rows are scored.
      model: a network of one stream.
      texts: the documents.
      keys: the root of the noise.
      specials: of the model's vocabulary.
      size: tokens of a row after its BOS.
      context: see `windows`.
      batch_size: rows a forward pass.
    """
    require(
        not model.architecture.needs_encoder,
        "documents in windows are rows of one stream, and the network has an encoder",
        where="RollingEvaluation",
        fix="Score its targets without --rolling.",
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
        # Each window is an example of its own to everything that is keyed by it.
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
