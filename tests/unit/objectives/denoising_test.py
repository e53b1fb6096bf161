import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Full
from diffusion_lm.noise.process import Absorbing
from diffusion_lm.noise.weighting import Flat
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.normalisers import normalised
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.objectives.token_losses import weighted_sum

KEYS = StreamKeys.create(1, 3)


def recorded(objective, model, batch):
    """The loss and the tokens of each pass."""
    seen, names = [], []

    @dataclasses.dataclass(frozen=True)
    class Recorder(stubs.BoundModel):
        def __call__(self, tokens, **inputs):
            seen.append(tokens)
            names.append(type(inputs["visibility"]).__name__)
            return super().__call__(tokens, **inputs)

    def run(params, batch):
        return objective.loss(Recorder(model.architecture, params), batch, KEYS), tuple(seen)

    terms, canvases = jax.jit(run)(model.params, batch)
    return terms, [np.asarray(canvas) for canvas in canvases], names


def noisy_canvas(objective, batch, keys=KEYS):
    t = objective.time.draw(keys, batch.example_ids)
    return objective.process.corrupt(keys, batch, t, vocab_size=stubs.VOCAB).tokens


def test_the_two_terms_are_those_of_the_paper():
    """L1 + L2 by hand on a network whose prediction is a function of the token at the same position."""
    table = np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB)).astype(np.float32) * 2
    batch = stubs.make_batch([3, 2], [6, 5], 9, filler=2)
    objective = Sundae()
    terms = objective.loss(stubs.table_model(table, by_token=True), batch, KEYS)

    target, x = np.asarray(batch.target_mask), np.asarray(batch.tokens)
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1))
    x_c = np.asarray(noisy_canvas(objective, batch))
    x_1 = np.where(target, table.argmax(axis=-1)[x_c], x)
    l1, l2 = -log_p[x_c, x][target], -log_p[x_1, x][target]
    np.testing.assert_allclose(terms.loss_sum, l1.sum() + l2.sum(), rtol=1e-5)
    assert terms.weight == target.sum(), "every target token once, PAD in the window included"
    real = (x != stubs.PAD)[target]
    assert not real.all()
    np.testing.assert_allclose(terms.metrics["nll_per_token"].value, l1.mean(), rtol=1e-5)
    np.testing.assert_allclose(terms.metrics["nll_per_real_token"].value, l1[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(terms.metrics["unrolled_nll_per_real_token"].value, l2[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(terms.metrics["prediction_accuracy"].value, (x_1 == x)[target][real].mean(), rtol=1e-5)


def test_T34_prompt_must_stay_clean():
    """The conditioning enters every pass as it is, and carries no loss."""
    batch = stubs.make_batch([3, 4], [6, 5], 10)
    terms, canvases, visibilities = recorded(Sundae(unrolls=2), stubs.nano(), batch)
    assert visibilities == ["Full"] * 3
    outside = ~np.asarray(batch.target_mask)
    for tokens in canvases:
        np.testing.assert_array_equal(tokens[outside], np.asarray(batch.tokens)[outside])
    assert (canvases[0] != canvases[1]).any()
    assert terms.weight == batch.target_mask.sum()


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.thorough), 1.0])
def test_no_gradient_flows_through_the_unrolled_choice(temperature):
    model, batch = stubs.nano(), stubs.make_batch([3, 4], [6, 5], 10)
    objective = Sundae(unroll_temperature=temperature)
    _, canvases, _ = recorded(objective, model, batch)

    @jax.jit
    @jax.grad
    def by_hand(params):
        bound = stubs.BoundModel(model.architecture, params)
        total = 0.0
        for canvas in canvases:
            hidden = bound(
                jnp.asarray(canvas), visibility=Full(), positions=batch.positions, segment_ids=batch.segment_ids
            )
            total += (bound.nll(hidden, batch.tokens) * batch.loss_weights).sum()
        return total

    _, grads = stubs.loss_and_grad(objective, model, batch, KEYS)
    stubs.assert_close(grads, by_hand(model.params), scaled=1e-4)


def test_a_sampled_unroll_follows_the_model_and_not_its_argmax():
    table = np.zeros((stubs.VOCAB, stubs.VOCAB), np.float32)
    table[:, 7] = 1.0
    batch = stubs.make_batch([2] * 40, [10] * 40, 12)
    for temperature, low, high in ((0.0, 1.0, 1.0), (1.0, 0.02, 0.15)):
        objective = Sundae(unroll_temperature=temperature)
        _, canvases, _ = recorded(objective, stubs.table_model(table, by_token=True), batch)
        share = (canvases[1][np.asarray(batch.target_mask)] == 7).mean()
        assert low <= share <= high


def test_T31_noisy_validation():
    """Evaluation draws the same noise whenever it is made, spread over the times; training does not."""
    model, batch = stubs.nano(), stubs.make_batch([3, 4], [6, 5], 10)
    objective = Sundae(evaluation_draws=3)
    other_step = StreamKeys.create(1, 999)
    first = stubs.bound(objective, model, batch, KEYS)
    jax.tree.map(np.testing.assert_array_equal, first, stubs.bound(objective, model, batch, other_step))
    losses = [stubs.loss_and_grad(objective, model, batch, keys)[0].loss_sum for keys in (KEYS, other_step)]
    assert losses[0] != losses[1]
    assert first.weight == batch.loss_weights.sum(), "draws are averaged"
    assert first.metrics["nll_per_real_token"].weight == first.weight
    assert first.variance > 0
    assert objective.bound_kind == "pseudo"


def test_dropout_is_on_in_training_only():
    model, batch = stubs.nano(dropout_rate=0.3), stubs.make_batch([3, 4], [6, 5], 10)
    train, evaluate = (
        jax.jit(lambda batch, train=train: Sundae().loss(model, batch, KEYS, train=train).loss_sum)(batch)
        for train in (True, False)
    )
    assert train != evaluate
    still = stubs.BoundModel(stubs.nano().architecture, model.params)
    np.testing.assert_allclose(evaluate, stubs.loss_and_grad(Sundae(), still, batch, KEYS)[0].loss_sum, rtol=1e-6)


def test_T21_shift_off_by_one():
    """With the AR alignment the state before a token predicts it: a table of slots says which slot was read."""
    table = np.zeros((9, stubs.VOCAB), np.float32)
    batch = stubs.make_batch([3, 2], [5, 6], 9)
    tokens, target = np.asarray(batch.tokens), np.asarray(batch.target_mask)
    for slot in range(8):
        table[slot, tokens[0, slot + 1]] = 50.0
    row = stubs.rows_of(batch, [0])
    assert target[0, 3:8].all()
    assert Sundae(alignment=Shifted()).loss(stubs.table_model(table), row, KEYS).loss < 1e-6
    assert Sundae().loss(stubs.table_model(table), row, KEYS).loss > 50


def test_the_prediction_of_a_shifted_model_lands_on_the_token_it_predicts():
    table = np.zeros((9, stubs.VOCAB), np.float32)
    batch = stubs.make_batch([3], [5], 9)
    table[np.arange(9), np.arange(9) + 10] = 50.0
    for temperature in (0.0, 0.5):
        objective = Sundae(alignment=Shifted(), unroll_temperature=temperature)
        _, canvases, _ = recorded(objective, stubs.table_model(table), batch)
        np.testing.assert_array_equal(canvases[1][0, 3:8], np.arange(2, 7) + 10)


def test_encoder_decoder_encodes_once_for_both_passes():
    model = stubs.nano_encoder_decoder()
    batch = stubs.make_batch([1, 1], [6, 5], 8, encoder=True)
    encoded = []

    @dataclasses.dataclass(frozen=True)
    class Watched(stubs.BoundModel):
        def encode(self, inputs, **rest):
            encoded.append(inputs)
            return super().encode(inputs, **rest)

    def run(params, batch):
        return Sundae().loss(Watched(model.architecture, params), batch, KEYS).loss_sum

    loss = jax.jit(run)
    first = loss(model.params, batch)
    assert len(encoded) == 1
    other = batch.replace(encoder=batch.encoder.replace(tokens=batch.encoder.tokens[::-1]))
    assert first != loss(model.params, other), "the source matters"


def test_needs_counts_the_passes():
    assert Sundae().needs().passes == 2
    assert Sundae(unrolls=0).needs().passes == 1
    assert not Sundae().needs().mask_token
    assert Sundae(visibility="prefix").needs().visibility == "prefix"


@pytest.mark.parametrize("fields", [{"visibility": "bidirectional"}, {"unrolls": -1}, {"unroll_temperature": -0.1}])
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        Sundae(**fields)


@pytest.mark.parametrize("normaliser", ["scored", "replaced", "example"])
def test_the_second_loss_is_a_mean_of_its_own(normaliser):
    """D3PM's L_lambda is the plain cross-entropy per scored token (or example), however the first loss is divided."""
    batch = stubs.make_batch([2, 3], [8, 6], 10)
    model = stubs.table_model(np.random.default_rng(0).normal(size=(10, stubs.VOCAB)))
    plain = MaskedDiffusion(Absorbing(), weighting=Flat(), normaliser=normaliser)
    both = dataclasses.replace(plain, auxiliary=0.5)
    every = normalised("example" if normaliser == "example" else "scored", batch.loss_weights, None, batch)
    # The table does not look at the noise, so the cross-entropy of all tokens is known; MASK, which the
    # first loss gives no probability, is the row's least likely token by far.
    model = stubs.table_model(np.where(np.arange(stubs.VOCAB) == stubs.SPECIAL.mask, -60.0, model.architecture.table))
    first, mixed = (one.loss(model, batch, KEYS).loss for one in (plain, both))
    nll = -jax.nn.log_softmax(model.architecture.table)[batch.positions, batch.tokens]
    second = weighted_sum(nll, every[0]) / every[1]
    np.testing.assert_allclose(mixed, first + 0.5 * second, rtol=1e-5)
    assert both.needs().several_weights == (normaliser == "replaced")
