"""The length head: its logits by hand, what it may look at, its loss, and that the network under it stays as it is."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import optax
import pytest

from diffusion_lm.architectures.length_head import WithLengthHead, length_logits
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Full
from diffusion_lm.objectives.length_prediction import LengthPrediction
from diffusion_lm.training.partial import PartialAdamW

KEYS = StreamKeys.create(3)
MODEL = stubs.with_length_head(stubs.nano(**stubs.QUICK))
ENCODER_DECODER = stubs.with_length_head(stubs.nano_encoder_decoder(**stubs.QUICK))
BATCH = stubs.make_batch([2, 5, 3], [6, 2, 4], 11)


def logits(batch, model=MODEL):
    return jax.jit(lambda batch: length_logits(model, batch, "full"))(batch)


def silenced(model):
    """The same with a block that adds nothing to its input."""
    head = dict(model.params["length_head"])
    head["blocks"] = jax.tree.map(jnp.zeros_like, head["blocks"])
    return stubs.BoundModel(model.architecture, {**model.params, "length_head": head}), head


def test_logits_by_hand_from_the_states_of_the_prompt_alone():
    """With a silent block: W2 tanh(W1 mean + b1) + b2 of the states of a row that ends where the prompt does."""
    model, head = silenced(MODEL)
    found = logits(BATCH, model)
    states = jax.jit(lambda *inputs: model(inputs[0], visibility=Full(), positions=inputs[1], segment_ids=inputs[2]))
    for row, length in enumerate([2, 5, 3]):
        tokens = BATCH.tokens[row : row + 1, :length]
        positions = jnp.arange(length)[None]
        hidden = states(tokens, positions, jnp.ones_like(tokens))
        mean = np.asarray(hidden.values_BTD[0], np.float64).mean(axis=0)
        inner = np.tanh(mean @ np.asarray(head["hidden"]["kernel"]) + np.asarray(head["hidden"]["bias"]))
        expected = inner @ np.asarray(head["output"]["kernel"]) + np.asarray(head["output"]["bias"])
        np.testing.assert_allclose(found[row], expected, atol=2e-4)


def test_the_block_takes_part():
    assert np.abs(logits(BATCH) - logits(BATCH, silenced(MODEL)[0])).max() > 1e-2


@pytest.mark.parametrize("model", [MODEL, ENCODER_DECODER], ids=["single", "encoder_decoder"])
def test_neither_the_target_nor_its_length_nor_padding_shows(model):
    """A window of another size with other text, more padding, and rubbish under it: the same logits."""
    encoder = model is ENCODER_DECODER
    prefixes = [1, 1, 1] if encoder else [2, 5, 3]
    batch = stubs.make_batch(prefixes, [6, 2, 4], 11, encoder=encoder)
    other = stubs.make_batch(prefixes, [3, 5, 7], 11, encoder=encoder)
    tokens = jnp.where(batch.target_mask | other.target_mask | (other.segment_ids == 0), 9, batch.tokens)
    changed = other.replace(tokens=tokens, encoder=batch.encoder)
    expected = logits(batch, model)
    np.testing.assert_allclose(logits(changed, model), expected, atol=1e-5)
    np.testing.assert_allclose(logits(stubs.pad_right(batch, 5), model), expected, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "prompts differ, and so do their lengths"


def test_loss_is_the_cross_entropy_of_the_clipped_length():
    """Lengths 5, 1 and 3 without EOS; with 4 classes the longest counts as 3. Unscored rows take no part."""
    few = stubs.with_length_head(stubs.nano(**stubs.QUICK), classes=4)
    for model, classes in ((MODEL, [5, 1, 3]), (few, [3, 1, 3])):
        terms = stubs.bound(LengthPrediction(), model, BATCH, KEYS)
        log_p = np.asarray(jax.nn.log_softmax(logits(BATCH, model)), np.float64)
        np.testing.assert_allclose(terms.loss_sum, -log_p[np.arange(3), classes].sum(), rtol=1e-5)
        assert terms.weight == 3
        distance = np.abs(log_p.argmax(axis=1) - [5, 1, 3]).mean()
        np.testing.assert_allclose(terms.metrics["length_error"].value, distance, rtol=1e-6)
    alone = BATCH.replace(loss_weights=BATCH.loss_weights.at[1:].set(0))
    terms = stubs.bound(LengthPrediction(), MODEL, alone, KEYS)
    np.testing.assert_allclose(terms.loss_sum, -jax.nn.log_softmax(logits(BATCH))[0, 5], rtol=1e-5)
    assert terms.weight == 1
    filled = stubs.make_batch([2], [6], 11, filler=2)
    np.testing.assert_array_equal(
        stubs.bound(LengthPrediction(), MODEL, filled, KEYS).metrics["length_error"].weight, 1
    )


def test_only_the_head_has_a_gradient():
    _, gradient = stubs.loss_and_grad(LengthPrediction(), MODEL, BATCH, KEYS)
    for part, tree in gradient.items():
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        assert (largest > 0) == (part == "length_head"), part


def test_partial_adamw_is_optax_on_the_trained_part_and_nothing_elsewhere():
    """The frozen part keeps every bit, weight decay included, and no moments of it are stored."""
    rng = np.random.default_rng(0)
    axes = {"body": {"w": ("embed", "mlp")}, "length_head": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}

    def draw():
        shapes = {"body": {"w": (6, 4)}, "length_head": {"kernel": (6, 4), "bias": (4,)}}
        return jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
        )

    params, gradients = draw(), [draw() for _ in range(3)]
    rule = PartialAdamW(weight_decay=0.1, clip_norm=None, trained=("length_head",)).transformation(axes)
    state, ours = rule.init(params), params
    for gradient in gradients:
        direction, state = rule.update(gradient, state, ours)
        ours = jax.tree.map(lambda p, d: p - 0.03 * d, ours, direction)
    np.testing.assert_array_equal(ours["body"]["w"], params["body"]["w"])
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (6 * 4 + 4) + 5
    theirs = optax.adamw(0.03, b2=0.98, weight_decay=0.1, mask={"kernel": True, "bias": False})
    head, state = params["length_head"], theirs.init(params["length_head"])
    for gradient in gradients:
        updates, state = theirs.update(gradient["length_head"], state, head)
        head = optax.apply_updates(head, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours["length_head"], head)


def test_impossible_settings_are_errors():
    with pytest.raises(ConfigError, match="must be an integer >= 2"):
        WithLengthHead(MODEL.architecture, 1)
    with pytest.raises(ConfigError, match="has no length head"):
        length_logits(stubs.nano(**stubs.QUICK), BATCH, "full")
    with pytest.raises(ConfigError, match="at least one part must be trained"):
        PartialAdamW()
    with pytest.raises(ConfigError, match="the network has no part head"):
        PartialAdamW(trained=("head",)).transformation(MODEL.architecture.logical_axes())


def test_the_head_is_one_more_part_of_the_parameters():
    inner = MODEL.architecture.backbone
    assert set(MODEL.architecture.abstract_params()) == {*inner.abstract_params(), "length_head"}
    axes, shapes = MODEL.architecture.logical_axes(), MODEL.architecture.abstract_params()
    jax.tree.map(lambda a, s: np.testing.assert_equal(len(a), s.ndim), axes, shapes, is_leaf=lambda a: type(a) is tuple)
    counts = MODEL.architecture.count_parameters()
    assert counts["total"] == inner.count_parameters()["total"] + counts["length_head"]
