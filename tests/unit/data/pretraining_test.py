import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data import counted
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter
from diffusion_lm.data.pretraining import CausalLM, PrefixSplit, SpanCorruption

SENTINELS = tuple(range(999, 899, -1))


def split(part, piece, epoch=0, example=0, sentinels=SENTINELS):
    return part.split(piece, counted.key("pretraining", 0, epoch, example), eos_id=1, sentinel_ids=sentinels)


def piece_of(length):
    return (2 + np.arange(length) % 800).astype(np.int32)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 128])
def test_prefix_split_restores_the_text(length):
    piece = piece_of(length)
    inputs, targets = split(PrefixSplit(), piece, epoch=length)
    np.testing.assert_array_equal(np.concatenate([inputs, targets]), piece)
    assert len(targets) >= 1
    assert len(inputs) >= min(1, length - 1)


def test_prefix_split_point_is_uniform_and_differs_by_epoch_and_example():
    piece = piece_of(9)
    points = [len(split(PrefixSplit(), piece, epoch, example)[0]) for epoch in range(20) for example in range(200)]
    counts = np.bincount(points, minlength=10)
    assert counts[0] == 0
    assert counts[9] == 0
    assert np.abs(counts[1:9] - 500).max() < 100  # standard deviation 21
    assert len({len(split(PrefixSplit(), piece_of(1000), epoch)[0]) for epoch in range(10)}) > 5


def test_causal_lm_makes_everything_target():
    inputs, targets = split(CausalLM(), piece_of(5))
    assert len(inputs) == 0
    np.testing.assert_array_equal(targets, piece_of(5))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 20, 99, 300])
@pytest.mark.parametrize("density", [0.15, 0.5, 0.9])
def test_span_corruption_counts_are_exact_and_the_text_is_restored(length, density):
    part = SpanCorruption(noise_density=density)
    piece = piece_of(length)
    inputs, targets = split(part, piece, epoch=3, example=length)
    expected_inputs, expected_targets = part.lengths(np.array([length]))
    assert (len(inputs), len(targets)) == (expected_inputs[0], expected_targets[0])
    if length > 1:
        assert (targets < 900).sum() == np.clip(round(length * density), 1, length - 1)
    spans, current = {}, None
    for token in targets.tolist():
        if token >= 900:
            current = spans[token] = []
        else:
            current.append(token)
    assert list(spans) == list(SENTINELS[: len(spans)])
    assert all(spans.values())
    restored = [t for token in inputs.tolist() for t in (spans[token] if token >= 900 else [token])]
    assert restored == piece.tolist()


def test_span_corruption_has_the_lengths_of_t5():
    inputs, targets = SpanCorruption().lengths(np.array([568]))
    assert (inputs[0] + 1, targets[0] + 1) == (512, 114)  # both with EOS
    assert EncoderDecoderConverter(511, 114).max_piece(SpanCorruption()) == 568


def test_span_corruption_differs_by_epoch_and_leaves_the_end_of_the_document_out():
    piece = np.append(piece_of(60), 1).astype(np.int32)
    first, second = (split(SpanCorruption(), piece, epoch)[0] for epoch in (0, 1))
    assert not np.array_equal(first, second)
    assert 1 not in first
    np.testing.assert_array_equal(first, split(SpanCorruption(), piece, 0)[0])


def test_too_few_sentinels_is_an_error():
    with pytest.raises(ConfigError, match="5 noise spans, the vocabulary 4 sentinels"):
        split(SpanCorruption(), piece_of(100), sentinels=SENTINELS[:4])


@pytest.mark.parametrize("part", [PrefixSplit(), SpanCorruption(), SpanCorruption(0.5, 3.0), CausalLM()])
def test_longest_piece_fits_and_one_more_token_does_not(part):
    single = SingleStreamConverter(30, 50)
    piece = single.max_piece(part)

    def slots(length):
        inputs, targets = part.lengths(np.array([length]))
        return int(1 + inputs[0] + part.target_window.slots(targets, 10**6)[0])

    assert slots(piece) <= single.row_length < slots(piece + 1)
