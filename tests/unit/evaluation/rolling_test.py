"""Windows of rolling likelihood, and the likelihood of documents that are longer than a row."""

import dataclasses
import itertools
import math
from typing import Any

import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.schema import Record
from diffusion_lm.evaluation.rolling import RollingEvaluation, windows
from diffusion_lm.evaluation.scoring import continuation_batch, score
from diffusion_lm.evaluation.scoring_estimators import ExactAutoregressive, ExactCount

MASK, BOS = 4, stubs.BOS


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """A pipeline of records whose text has two bytes a token."""

    pieces: Any
    row_length: int = 7
    specials: SpecialTokens = SpecialTokens(stubs.VOCAB, bos_id=BOS, mask_id=MASK)

    @property
    def vocabulary(self):
        return self

    def decode(self, tokens):
        return "xx" * len(tokens)

    def records(self):
        for number, piece in enumerate(self.pieces):
            yield piece if isinstance(piece, Record) else Record((), piece, number)


@pytest.mark.parametrize(("length", "size", "context"), [*itertools.product((1, 5, 6, 7, 23), (6,), (0, 1, 3, 5))])
def test_every_token_is_scored_exactly_once_after_enough_context(length, size, context):
    found = windows(length, size, context)
    scored = [token for window in found for token in range(window.start, window.end)]
    assert scored == list(range(length))
    for number, window in enumerate(found):
        assert window.end - window.first <= size
        assert number == 0 or window.start - window.first >= context
    assert found[-1].first == max(length - size, 0), "the last window sees as much as its row holds"


def test_a_prompt_is_context_and_never_scored():
    for prompt in (2, 5, 9):
        found = windows(prompt + 8, 6, 2, prompt)
        assert found[0].first == (7 if prompt == 9 else 0), "a prompt that fits is kept whole"
        scored = [token for window in found for token in range(window.start, window.end)]
        assert scored == list(range(prompt, prompt + 8))
        assert all(window.start - window.first >= 2 for window in found)
        assert all(window.end - window.first <= 6 for window in found)
    with pytest.raises(ConfigError, match=r"must be in \[0, "):
        windows(9, 6, 6)


def test_documents_are_joined_from_their_pieces_and_cost_the_sum_of_their_windows():
    """Two documents in three pieces; by hand, from rows that another function lays out."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(6, stubs.VOCAB, 14), rng.integers(6, stubs.VOCAB, 3)
    first[-1] = second[-1] = stubs.EOS
    data, model = Documents([first[:8], first[8:], second]), stubs.nano(**stubs.QUICK)
    evaluation = RollingEvaluation(data, ExactAutoregressive(), context=2, batch_size=2)
    nats = 0.0
    for text, parts in ((first, [(0, 0, 6), (4, 6, 10), (8, 10, 14)]), (second, [(0, 0, 3)])):
        for begin, start, end in parts:
            row = continuation_batch([text[begin:start]], [text[start:end]], 7, special=data.specials)
            nats -= float(score(ExactAutoregressive(), model, row, StreamKeys.create(0)).log_likelihood[0])
    values = evaluation.run(model, 0)
    assert values["examples"] == 2
    assert values["tokens"] == 17
    assert values["bytes"] == 2 * 15, "EOS has none"
    assert values["nats_per_token"] == pytest.approx(nats / 17, rel=1e-5)
    assert values["perplexity_exact"] == pytest.approx(math.exp(nats / 17), rel=1e-5)
    assert evaluation.size == 6
    assert dataclasses.replace(evaluation, limit=1).run(model, 0)["tokens"] == 14


def test_bounds_roll_too_with_noise_of_their_own_for_each_window():
    model = stubs.table_model(np.zeros((7, stubs.VOCAB)))
    data = Documents([np.array([7] * 15 + [stubs.EOS])])
    values = RollingEvaluation(data, ExactCount(8), batch_size=4).run(model, 0)
    assert values["bits_per_token"] == pytest.approx(math.log2(stubs.VOCAB - 1), rel=1e-5)
    assert "perplexity_bound" in values
    uneven = np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB))
    evaluation = RollingEvaluation(data, ExactCount(8), batch_size=4)
    noisy = evaluation.run(stubs.table_model(uneven, by_token=True), 0)
    assert "draw_error" in noisy


def test_an_encoder_decoder_is_refused():
    network = stubs.BoundModel(dataclasses.replace(stubs.TableArchitecture(np.zeros((2, 2))), needs_encoder=True), {})
    with pytest.raises(ConfigError, match="encoder"):
        RollingEvaluation(Documents([[7, stubs.EOS]]), ExactAutoregressive()).run(network, 0)
