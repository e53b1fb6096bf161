import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Causal
from diffusion_lm.noise.process import Corrupted, Uniform
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.sundae import Sundae

KEYS = StreamKeys.create(1, 3)


def test_loss_is_the_cross_entropy_of_the_next_token():
    table = np.random.default_rng(0).normal(size=(9, stubs.VOCAB)).astype(np.float32)
    batch = stubs.make_batch([3, 2], [6, 5], 9, filler=1)
    terms = Autoregressive().loss(stubs.table_model(table), batch, KEYS)
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1))
    tokens = np.asarray(batch.tokens)
    where = list(zip(*np.nonzero(np.asarray(batch.target_mask)), strict=True))
    nll = np.array([-log_p[i - 1, tokens[b, i]] for b, i in where])
    real = np.array([tokens[b, i] for b, i in where]) != stubs.PAD
    np.testing.assert_allclose(terms.loss_sum, nll.sum(), rtol=1e-5)
    assert terms.weight == 11
    np.testing.assert_allclose(terms.metrics["nll_per_real_token"].value, nll[real].mean(), rtol=1e-5)


def test_z_loss_and_label_smoothing_shape_training_and_not_evaluation():
    table = np.random.default_rng(0).normal(size=(9, stubs.VOCAB)).astype(np.float32) + 2
    model, batch = stubs.table_model(table), stubs.make_batch([3], [6], 9)
    plain, shaped = Autoregressive(), Autoregressive(z_loss=0.1, label_smoothing=0.2)
    logits, target = jnp.asarray(table[2:8]), np.asarray(batch.tokens)[0, 3:9]
    soft = 0.8 * jax.nn.one_hot(target, stubs.VOCAB) + 0.2 / stubs.VOCAB
    expected = -(soft * jax.nn.log_softmax(logits)).sum() + 0.1 * (jax.nn.logsumexp(logits, axis=-1) ** 2).sum()
    np.testing.assert_allclose(shaped.loss(model, batch, KEYS).loss_sum, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_allclose, shaped.bound(model, batch, KEYS), plain.bound(model, batch, KEYS))
    np.testing.assert_allclose(
        shaped.loss(model, batch, KEYS).metrics["nll_per_real_token"].value, plain.bound(model, batch, KEYS).loss
    )
    assert plain.bound_kind == "exact"


def test_T21_shift_off_by_one():
    """A shifted denoiser under a causal mask, one position corrupted, sees there what an AR model does: bit for bit."""

    @dataclasses.dataclass(frozen=True)
    class OneToken(Uniform):
        slot: int = 0

        def corrupt(self, keys, batch, t_BT, *, vocab_size):
            at = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]) == self.slot, batch.tokens.shape)
            return Corrupted(jnp.where(at, 39, batch.tokens), at)

    model, batch = stubs.nano(), stubs.make_batch([3, 3], [6, 6], 9)
    for slot in (3, 5, 8):
        only = (jnp.arange(9) == slot).astype(jnp.float32)
        scored = batch.replace(loss_weights=batch.loss_weights * only)
        denoiser = Sundae(OneToken(slot=slot), alignment=Shifted(), visibility="causal", unrolls=0)
        got, expected = (
            jax.jit(lambda batch, loss=one.loss: loss(model, batch, KEYS).loss_sum)(scored)
            for one in (denoiser, Autoregressive())
        )
        np.testing.assert_array_equal(got, expected)


def test_prefix_visibility_lets_the_conditioning_see_itself_and_nothing_of_the_target():
    batch = stubs.make_batch([4, 4], [5, 5], 9)
    model = stubs.nano()
    target_change = batch.replace(tokens=batch.tokens.at[:, 8].set(7))
    prefix_change = batch.replace(tokens=batch.tokens.at[:, 3].set(7))
    first_only = {"loss_weights": batch.loss_weights * (jnp.arange(9) == 4)}

    def first_token_loss(batch, visibility):
        objective = Autoregressive(visibility=visibility)
        return stubs.loss_and_grad(objective, model, batch.replace(**first_only), KEYS)[0].loss_sum

    assert first_token_loss(batch, "prefix") == first_token_loss(target_change, "prefix")
    assert first_token_loss(batch, "prefix") != first_token_loss(prefix_change, "prefix")
    assert first_token_loss(batch, "prefix") != first_token_loss(batch, "causal")


def test_the_causal_objective_agrees_with_full_logits():
    model, batch = stubs.nano(), stubs.make_batch([3, 4], [6, 5], 10)
    hidden = model(batch.tokens, visibility=Causal(), positions=batch.positions, segment_ids=batch.segment_ids)
    log_p = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    total = sum(
        -log_p[b, i - 1, batch.tokens[b, i]] for b, i in zip(*np.nonzero(np.asarray(batch.target_mask)), strict=True)
    )
    np.testing.assert_allclose(stubs.loss_and_grad(Autoregressive(), model, batch, KEYS)[0].loss_sum, total, rtol=1e-5)


@pytest.mark.parametrize("fields", [{"visibility": "casual"}, {"z_loss": -1.0}, {"label_smoothing": 1.0}])
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        Autoregressive(**fields)
