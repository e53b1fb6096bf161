import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data import counted
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter
from diffusion_lm.data.pretraining import CausalLM, DenoiserMixture, PrefixSplit, RandomLength, SpanCorruption
from diffusion_lm.data.target_window import ExactEos, ExactTokens

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
    with pytest.raises(ConfigError, match="5 noise spans, but there are 4 sentinels"):
        split(SpanCorruption(), piece_of(100), sentinels=SENTINELS[:4])


def test_one_piece_in_a_hundred_has_a_random_length():
    """LLaDA: 1 % of the pieces are cut to a length uniform in 1..n; the others are what they are without."""
    part, piece = RandomLength(), piece_of(50)
    lengths = np.array([len(split(part, piece, epoch, example)[1]) for epoch in range(10) for example in range(1000)])
    cut = lengths[lengths < 50]
    # 1 of 50 random lengths is the whole piece.
    assert abs(len(cut) / 10_000 - 0.01 * 49 / 50) < 4 * (0.01 / 10_000) ** 0.5
    assert abs(cut.mean() - 25) < 4 * 14.4 / len(cut) ** 0.5
    assert 1 <= cut.min() < 8
    assert 42 < cut.max() <= 49
    assert part.target_window == ExactTokens()
    always = RandomLength(share=1.0)
    lengths = [len(split(always, piece_of(4), 0, example)[1]) for example in range(4000)]
    assert np.abs(np.bincount(lengths, minlength=5)[1:] - 1000).max() < 4 * 27.4
    np.testing.assert_array_equal(split(always, piece)[1], piece[: len(split(always, piece)[1])])


def test_a_random_length_is_drawn_apart_from_the_split():
    """Where nothing is cut, the prefix split is the one without a random length; where it is, it is uniform still."""
    piece = piece_of(9)
    kept, points = 0, []
    for example in range(3000):
        inputs, targets = split(RandomLength(PrefixSplit(), share=0.5), piece, 0, example)
        if len(inputs) + len(targets) == 9:
            np.testing.assert_array_equal(inputs, split(PrefixSplit(), piece, 0, example)[0])
            kept += 1
        elif len(inputs) + len(targets) == 5:
            points.append(len(inputs))
    assert 1500 < kept < 1900
    counts = np.bincount(points, minlength=5)[1:]
    assert np.abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


def ul2_kind(inputs, targets):
    """Which denoiser made a pair of a piece of 200 tokens, by what it looks like."""
    mode, body = inputs[0], inputs[1:]
    if not (body >= 900).any():
        return mode, "prefix"
    return mode, (round(float((targets < 900).sum()) / 200, 2), int((targets >= 900).sum()))


def test_ul2_mixes_its_seven_denoisers_at_their_rates():
    """40 % R of two kinds, 40 % X of four, 20 % S (arXiv 2205.05131), each with its mode's token in front."""
    part, seen = DenoiserMixture(), {}
    for example in range(4000):
        inputs, targets = split(part, piece_of(200), 0, example)
        kind = ul2_kind(inputs, targets)
        seen[kind] = seen.get(kind, 0) + 1
    r, s, x = SENTINELS[-1], SENTINELS[-2], SENTINELS[-3]
    expected = {
        (r, (0.15, 10)): 0.2, (r, (0.15, 4)): 0.2, (s, "prefix"): 0.2,
        (x, (0.5, 33)): 0.1, (x, (0.5, 12)): 0.1, (x, (0.15, 1)): 0.1, (x, (0.5, 2)): 0.1,
    }  # fmt: skip
    assert set(seen) == set(expected)
    for kind, share in expected.items():
        assert abs(seen[kind] / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5, kind


def test_ul2_restores_the_text_and_ends_every_target_with_eos():
    part, piece = DenoiserMixture(), np.append(piece_of(60), 1).astype(np.int32)
    assert part.target_window == ExactEos()
    for example in range(60):
        inputs, targets = split(part, piece, 0, example)
        assert 1 not in targets, "the window adds EOS; that of the document would be a second one"
        if not (targets >= 900).any():
            np.testing.assert_array_equal(np.concatenate([inputs[1:], targets]), piece[:-1])
            continue
        spans, current = {}, None
        for token in targets.tolist():
            if token >= 900:
                current = spans[token] = []
            else:
                current.append(token)
        restored = [t for token in inputs[1:].tolist() for t in (spans[token] if token >= 900 else [token])]
        assert restored == piece[:-1].tolist()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomLength(share=1.5), "share=1.5"),
        (lambda: DenoiserMixture(shares=(1.0,)), "7 parts, 1 shares, 7 modes"),
        (lambda: DenoiserMixture(parts=(CausalLM(),), shares=(0.0,), modes=("R",)), "with a positive sum"),
        (lambda: DenoiserMixture(parts=(CausalLM(),), shares=(1.0,), modes=("Q",)), "'Q'"),
        (lambda: split(DenoiserMixture(), piece_of(20), sentinels=SENTINELS[:2]), "one for each mode"),
    ],
)
def test_impossible_pretraining_is_an_error(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


PARTS = [PrefixSplit(), SpanCorruption(), SpanCorruption(0.5, 3.0), CausalLM(), RandomLength(), DenoiserMixture()]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_no_pair_is_longer_than_announced(part):
    """Rows are planned by `lengths` and sides by `widest`, whatever is drawn."""
    window = part.target_window
    for length in (1, 2, 3, 9, 40):
        inputs, targets = (int(one[0]) for one in part.lengths(np.array([length])))
        widest = tuple(int(one[0]) for one in part.widest(np.array([length])))
        planned = inputs + int(window.slots(np.array([targets]), 10**6)[0])
        for example in range(100):
            got = tuple(map(len, split(part, piece_of(length), 0, example)))
            assert got[0] + int(window.slots(np.array([got[1]]), 10**6)[0]) <= planned
            assert got[0] <= widest[0]
            assert got[1] <= widest[1]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_the_longest_piece_of_an_encoder_decoder_fits_both_sides(part):
    double = EncoderDecoderConverter(30, 20)
    piece = double.max_piece(part)
    assert piece > 0
    for example in range(200):
        inputs, targets = split(part, piece_of(piece), 0, example)
        assert len(inputs) <= 30
        assert int(part.target_window.slots(np.array([len(targets)]), 10**6)[0]) <= 20


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_longest_piece_fits_and_one_more_token_does_not(part):
    single = SingleStreamConverter(30, 50)
    piece = single.max_piece(part)

    def slots(length):
        inputs, targets = part.lengths(np.array([length]))
        return int(1 + inputs[0] + part.target_window.slots(targets, 10**6)[0])

    assert slots(piece) <= single.row_length < slots(piece + 1)
