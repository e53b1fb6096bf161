import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.real_tokens import real_tokens
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter, with_encoder
from diffusion_lm.data.fitting import Example
from diffusion_lm.data.target_window import EosFilled, ExactEos, ExactTokens, OracleLength, PadFilled

SPECIALS = SpecialTokens(vocab_size=100, pad_id=0, eos_id=1, bos_id=2, mask_id=4)


def example(inputs, targets, number=7, window=None):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32), number, window)


def test_single_stream_row_of_exact_eos():
    batch = SingleStreamConverter(4, 5).batch([[example([10, 11], [20, 21])]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 10, 11, 20, 21, 1, 0, 0, 0, 0]]
    assert batch.target_mask.tolist() == [[False] * 3 + [True] * 3 + [False] * 4]
    assert batch.loss_weights.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0] * 4]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0, 0, 0]]
    assert batch.example_ids.tolist() == [[7] * 6 + [0] * 4]
    assert (batch.tokens.dtype, batch.example_ids.dtype, batch.loss_weights.dtype) == (np.int32, np.uint32, np.float32)


def test_single_stream_row_of_pad_filled_scores_the_filler():
    converter = SingleStreamConverter(4, 5, PadFilled(4))
    batch = converter.batch([[example([10], [20, 21])]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 10, 20, 21, 1, 0, 0, 0, 0, 0]]
    assert batch.target_mask.tolist() == [[False] * 2 + [True] * 4 + [False] * 4]
    assert batch.loss_weights.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0] * 4]


def test_encoder_decoder_rows():
    batch = EncoderDecoderConverter(3, 4).batch([[example([10, 11], [20])]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 20, 1, 0, 0]]
    assert batch.target_mask.tolist() == [[False, True, True, False, False]]
    assert batch.encoder.tokens.tolist() == [[10, 11, 1, 0]]
    assert batch.encoder.segment_ids.tolist() == [[1, 1, 1, 0]]
    assert batch.encoder.positions.tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("window", [ExactEos(), PadFilled(3)])
@pytest.mark.parametrize("kind", [SingleStreamConverter, EncoderDecoderConverter])
def test_T33_packing_leak_and_positions(kind, window):
    converter = kind(14, 14, window)
    parts = [example([10, 11], [20, 21], 1), example([12], [22], 2), example([13, 14, 15], [], 3)]
    packed = converter.batch([parts], SPECIALS, training=True)
    for segment, part in enumerate(parts, 1):
        alone = converter.batch([[part]], SPECIALS, training=True)
        here, there = packed.segment_ids[0] == segment, alone.segment_ids[0] == 1
        for name in ("tokens", "target_mask", "loss_weights", "positions", "example_ids"):
            np.testing.assert_array_equal(getattr(packed, name)[0][here], getattr(alone, name)[0][there], err_msg=name)
        assert packed.positions[0][here].tolist() == list(range(here.sum()))
        if alone.encoder is not None:
            here, there = packed.encoder.segment_ids[0] == segment, alone.encoder.segment_ids[0] == 1
            for name in ("tokens", "positions"):
                np.testing.assert_array_equal(
                    getattr(packed.encoder, name)[0][here], getattr(alone.encoder, name)[0][there], err_msg=name
                )
    rest = packed.segment_ids[0] == 0
    assert not packed.target_mask[0][rest].any()
    assert not packed.loss_weights[0][rest].any()
    assert np.diff(packed.segment_ids[0][~rest]).min() >= 0


@pytest.mark.parametrize("window", [ExactEos(), PadFilled()])
def test_T34_prompt_must_stay_clean(window):
    converter = SingleStreamConverter(6, 8, window)
    batch = converter.batch([[example([10, 11, 12], [20, 21])]], SPECIALS, training=True)
    conditioning = ~batch.target_mask[0]
    assert batch.tokens[0][conditioning][:4].tolist() == [2, 10, 11, 12]
    assert not batch.loss_weights[0][conditioning].any()
    assert batch.segment_ids[0][batch.target_mask[0]].all()


def test_T35_mask_id_in_a_batch_is_an_error():
    for bad, name in ((4, "MASK"), (100, "outside")):
        for inputs, targets in (([bad], [20]), ([10], [bad])):
            for converter in (SingleStreamConverter(4, 4), EncoderDecoderConverter(4, 4)):
                with pytest.raises(ConfigError, match=name):
                    converter.batch([[example(inputs, targets)]], SPECIALS, training=True)


def test_long_conditioning_is_cut_on_the_left_and_keeps_bos():
    batch = SingleStreamConverter(2, 3).batch([[example([10, 11, 12], [20])]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 11, 12, 20, 1, 0]]
    encoder = EncoderDecoderConverter(2, 3).batch([[example([10, 11, 12], [20])]], SPECIALS, training=False).encoder
    assert encoder.tokens.tolist() == [[11, 12, 1]]
    nothing = SingleStreamConverter(0, 3).batch([[example([10], [20])]], SPECIALS, training=True)
    assert nothing.tokens.tolist() == [[2, 20, 1, 0]]


@pytest.mark.parametrize("kind", [SingleStreamConverter, EncoderDecoderConverter])
def test_long_targets_are_cut_in_training_only(kind):
    long = [[example([], [20, 21, 22])]]
    batch = kind(0, 3).batch(long, SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 20, 21, 22]]  # without EOS: the target does not end there
    with pytest.raises(ConfigError, match=r"target of example 7 has 3 tokens, but the row has room for 2"):
        kind(0, 3).batch(long, SPECIALS, training=False)
    assert kind(0, 3, too_long="truncate").batch(long, SPECIALS, training=False).tokens.tolist() == [[2, 20, 21, 22]]
    with pytest.raises(ConfigError, match="Increase target_length"):
        kind(0, 3, too_long="error").batch(long, SPECIALS, training=True)


def test_prompts_hold_pad_in_the_window():
    converter = SingleStreamConverter(3, 4, PadFilled(3))
    prompts = converter.prompts([example([10, 11], [20]), example([10, 11, 12, 13], [20], 8)], SPECIALS)
    assert prompts.tokens.tolist() == [[2, 10, 11, 0, 0, 0, 0, 0], [2, 11, 12, 13, 0, 0, 0, 0]]
    assert prompts.target_mask.sum(axis=1).tolist() == [3, 3]
    assert prompts.target_mask[0].tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert prompts.segment_ids.tolist() == [[1] * 6 + [0] * 2, [1] * 7 + [0]]
    assert not prompts.loss_weights.any()
    assert prompts.row_ids.tolist() == [7, 8]
    both = EncoderDecoderConverter(3, 4).prompts([example([10, 11], [20])], SPECIALS)
    assert both.tokens.tolist() == [[2, 0, 0, 0, 0]]
    assert both.encoder.tokens.tolist() == [[10, 11, 1, 0]]


def test_pieces_of_text_use_the_row_as_they_like():
    piece = example([10, 11, 12, 13], [20, 21], window=ExactTokens())
    batch = SingleStreamConverter(2, 4).batch([[piece]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 10, 11, 12, 13, 20, 21]]
    assert batch.target_mask.sum() == 2


def test_bad_fields_are_errors():
    for arguments in (
        {"inputs_length": -1},
        {"target_length": 0},
        {"too_long": "maybe"},
        {"target_window": PadFilled(9)},
    ):
        with pytest.raises(ConfigError):
            SingleStreamConverter(**{"inputs_length": 4, "target_length": 8, **arguments})


@pytest.mark.parametrize("converter", [SingleStreamConverter(3, 4), EncoderDecoderConverter(3, 4)])
def test_abstract_batch_is_the_shape_of_a_batch(converter):
    import jax

    real = converter.batch([[example([10], [20])]] * 2, SPECIALS, training=True)
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), real)
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), converter.abstract_batch(2, SPECIALS)) == shapes


@pytest.mark.parametrize(
    ("window", "tokens", "weights"),
    [
        (ExactEos(), [11, 12, 1], [1, 1, 1]),
        (PadFilled(), [11, 12, 1, 0, 0], [1, 1, 1, 1, 1]),
        (PadFilled(window=4), [11, 12, 1, 0], [1, 1, 1, 1]),
        (EosFilled(), [11, 12, 1, 1, 1], [1, 1, 1, 1, 1]),
        (OracleLength(), [11, 12, 1], [1, 1, 1]),
        (OracleLength(closing=False), [11, 12], [1, 1]),
    ],
)
def test_T32_eos_padding(window, tokens, weights):
    """One EOS ends a target; filler, be it PAD or further EOS, is scored only where the recipe says so."""
    filled, scored = window.fill(np.asarray([11, 12], np.int32), SPECIALS, capacity=5)
    assert filled.tolist() == tokens
    assert scored.tolist() == weights


def test_real_tokens_are_the_same_whatever_fills_the_window():
    """The loss per real token counts the text and its first EOS, packed or not; a target's own repeats count."""
    examples = [example([10], [20, 20]), example([10, 1], []), example([1], [20] * 9)]
    for window in (ExactEos(), PadFilled(), EosFilled()):
        batch = SingleStreamConverter(3, 5, window).batch([[e] for e in examples], SPECIALS, training=True)
        assert np.asarray(real_tokens(batch, SPECIALS.pad_id, SPECIALS.eos_id)).sum(axis=1).tolist() == [3, 1, 5]


@pytest.mark.parametrize("make", [SingleStreamConverter, EncoderDecoderConverter])
def test_only_an_oracle_shows_a_references_length(make):
    """Its prompts have the reference's slots; those of all other windows do not depend on the reference."""
    examples = [example([10], [20, 21, 22]), example([10, 11], [20]), example([10], [20] * 9)]
    for window, sizes in ((OracleLength(), [4, 2, 5]), (OracleLength(closing=False), [3, 1, 5])):
        prompts = make(3, 5, window).prompts(examples, SPECIALS)
        assert prompts.target_mask.sum(axis=1).tolist() == sizes
        assert (prompts.tokens[prompts.target_mask] == SPECIALS.pad_id).all()
        assert window.oracle == "length"
        with pytest.raises(ConfigError, match="needs the length of a reference"):
            make(3, 5, window).prompts([example([10], [])], SPECIALS)
    for window in (ExactEos(), ExactTokens(), PadFilled(), EosFilled()):
        prompts = make(3, 5, window).prompts([*examples, example([10], [])], SPECIALS)
        assert prompts.target_mask.sum(axis=1).tolist() == [5] * 4
        assert window.oracle is None


def test_a_separator_closes_the_conditioning():
    """It is conditioning itself: seen, never noised, never scored; training rows and prompts have it in one place."""
    converter = SingleStreamConverter(3, 4, PadFilled(), separator_id=5)
    assert converter.row_length == 9
    short, long = example([10], [20, 21]), example([10, 11, 12, 13], [20])
    batch = converter.batch([[short], [long]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 10, 5, 20, 21, 1, 0, 0, 0], [2, 11, 12, 13, 5, 20, 1, 0, 0]]
    assert batch.target_mask.tolist() == [[False] * 3 + [True] * 4 + [False] * 2, [False] * 5 + [True] * 4]
    assert batch.loss_weights.sum(1).tolist() == [4, 4]
    prompts = converter.prompts([short, long], SPECIALS)
    assert prompts.tokens.tolist() == [[2, 10, 5, 0, 0, 0, 0, 0, 0], [2, 11, 12, 13, 5, 0, 0, 0, 0]]
    np.testing.assert_array_equal(prompts.target_mask, batch.target_mask)
    costs = converter.costs(np.array([[1, 2, 0], [4, 1, 0]]), None)
    np.testing.assert_array_equal(costs[:, 0], (batch.segment_ids > 0).sum(1))
    packed = SingleStreamConverter(8, 8, ExactEos(), separator_id=5)
    row = packed.batch([[short, example([11], [22])]], SPECIALS, training=True)
    assert row.tokens[0, :10].tolist() == [2, 10, 5, 20, 21, 1, 2, 11, 5, 22]


def test_pieces_of_text_have_no_separator():
    piece = example([10], [20, 21], window=ExactTokens())
    batch = SingleStreamConverter(2, 3, separator_id=5).batch([[piece]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 10, 20, 21, 0, 0, 0]]


def test_a_separator_outside_the_vocabulary_or_that_is_mask_is_refused():
    for wrong in (SPECIALS.mask_id, 100):
        with pytest.raises(ConfigError):
            SingleStreamConverter(2, 3, separator_id=wrong).batch([[example([10], [20])]], SPECIALS, training=True)


@pytest.mark.parametrize("settings", [{"separator_id": 5}, {"max_slots": 6}, {"suffix_length": 2}])
def test_what_an_encoder_decoder_cannot_have_is_refused_and_not_dropped(settings):
    (field,) = settings
    converter = SingleStreamConverter(3, 4, **settings)
    assert with_encoder(converter, False) is converter
    with pytest.raises(ConfigError, match=rf"SingleStreamConverter\.{field}"):
        with_encoder(converter, True)
