"""Traps of published code in the losses of masked and uniform noise: each faulty variant would fail its test."""

import dataclasses

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import tiny_worlds as tiny

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Shifted
from diffusion_lm.nn.masks import Causal
from diffusion_lm.noise.process import Corrupted, Uniform
from diffusion_lm.noise.schedules import Linear
from diffusion_lm.noise.time_sampling import DiscreteTime
from diffusion_lm.noise.weighting import Flat, FlatOnReplaced, InverseRate, LinearDecay
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.rdm import Rdm
from diffusion_lm.objectives.sundae import Sundae

KEYS = tiny.KEYS
MASK = 4
WORLD = tiny.World(V=3, L=3)
MASKED = MaskedDiffusion()


@dataclasses.dataclass(frozen=True)
class CleanCanvas(Uniform):
    """Marks every target token as replaced and replaces none: the mask indicator of an autoregressive model."""

    def corrupt(self, keys, batch, t_BT, *, vocab_size):
        return Corrupted(batch.tokens, batch.target_mask)


def test_diffullama_with_causal_visibility_every_token_masked_and_weight_1_is_autoregression():
    """The unification that the paper argues by: mask indicator, weight and attention are all that differ."""
    model, batch = stubs.nano(), stubs.make_batch([3, 2], [6, 5], 9)
    diffusion = MaskedDiffusion(
        CleanCanvas(), weighting=FlatOnReplaced(), normaliser="replaced", alignment=Shifted(), visibility="causal"
    )
    terms, grads = stubs.loss_and_grad(diffusion, model, batch, KEYS)
    expected, expected_grads = stubs.loss_and_grad(Autoregressive(), model, batch, KEYS)
    # Two programs: what they add is the same, the order in which they add it is the compiler's.
    np.testing.assert_allclose(terms.loss_sum, expected.loss_sum, rtol=1e-6)
    assert terms.weight == expected.weight
    stubs.assert_close(grads, expected_grads, scaled=2e-6)


def test_T21_one_masked_token_is_the_next_token():
    """A window of one token, really masked, 1/t included: the shifted causal denoiser has AR's loss."""
    model, batch = stubs.nano(), stubs.make_batch([3, 5], [1, 1], 6)
    diffusion = MaskedDiffusion(weighting=InverseRate(), alignment=Shifted(), visibility="causal", time=DiscreteTime(1))
    terms, _ = stubs.loss_and_grad(diffusion, model, batch, KEYS)
    expected, _ = stubs.loss_and_grad(Autoregressive(), model, batch, KEYS)
    # AR gives MASK a share of the softmax and diffusion does not; without that share they agree.
    hidden = model(batch.tokens, visibility=Causal(), positions=batch.positions, segment_ids=batch.segment_ids)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    shares = model.nll(hidden, targets) - model.nll(hidden, targets, forbidden=(MASK,))
    share = sum(shares[row, slot - 1] for row, slot in ((0, 3), (1, 5)))
    assert share > 1e-4
    np.testing.assert_allclose(terms.loss_sum, expected.loss_sum - share, rtol=1e-5)


def test_T09_padding_in_denominator():
    """An example's loss with its own length as denominator, alone and beside a longer one that pads it."""
    objective = dataclasses.replace(MASKED, normaliser="example", weighting=LinearDecay())
    pair = stubs.make_batch([2, 2], [3, 9], 12)
    alone = stubs.pad_right(jax.tree.map(lambda x: x[:1, :6], pair), 6)
    table = np.random.default_rng(0).normal(size=(12, stubs.VOCAB))
    model = stubs.table_model(table)
    loss = jax.jit(lambda batch: objective.loss(model, batch, KEYS))
    both, short, long = (loss(batch) for batch in (pair, alone, stubs.rows_of(pair, [1])))
    assert short.weight == pytest.approx(1)
    np.testing.assert_allclose(both.loss_sum, short.loss_sum + long.loss_sum, rtol=1e-5)
    packed = loss(stubs.packed(pair))
    np.testing.assert_allclose(packed.loss_sum, both.loss_sum, rtol=1e-5)
    assert packed.weight == pytest.approx(2)


@pytest.mark.parametrize("normaliser", ["scored", "replaced", "example"])
def test_T15_nothing_masked(normaliser):
    """A step in which nothing happens to be masked: 0 and finite gradients under every denominator, no 0/0."""
    objective = dataclasses.replace(
        MASKED,
        process=tiny.Patterns(rows=((False,) * 4,)),
        normaliser=normaliser,
        time=tiny.GivenTimes(),
    )
    batch = WORLD.batch([(0, 1, 2)], times=[1e-3])

    def loss(params):
        terms = objective.loss(BoundModel(WORLD.model.architecture, params), batch, KEYS)
        return terms.loss, terms

    (value, terms), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(WORLD.model.params)
    assert value == terms.loss_sum == 0
    assert (grads["table"] == 0).all()
    assert all(np.isfinite(metric.value) for metric in terms.metrics.values())
    if normaliser == "replaced":
        assert terms.weight == 0
        assert jnp.isnan(terms.loss_sum / terms.weight), "the variant without a guard"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_T16_carry_over_and_mask_logit(smoothing):
    """MASK's logit has no effect, and what is known has no loss; without SUBS and carry-over both would."""
    objective = dataclasses.replace(
        MASKED,
        process=tiny.Patterns(rows=((False, True, False, True),)),
        time=tiny.GivenTimes(),
        weighting=Flat(),
        label_smoothing=smoothing,
    )
    batch, model = WORLD.batch([(0, 1, 2)], times=[0.5]), WORLD.model

    @jax.jit
    def loss(table):
        return objective.loss(BoundModel(model.architecture, {"table": table}), batch, KEYS).loss_sum

    table = model.params["table"]
    plain = loss(table)
    np.testing.assert_allclose(loss(table.at[:, :, WORLD.mask_id].add(7.0)), plain, rtol=1e-6)
    np.testing.assert_allclose(loss(table.at[:, 2, 0].add(7.0)), plain, rtol=1e-6)
    assert abs(loss(table.at[:, 1, 0].add(7.0)) - plain) > 0.1
    canvas = batch.tokens.at[:, 1].set(WORLD.mask_id).at[:, 3].set(WORLD.mask_id)
    hidden = model(canvas, visibility=Causal(), positions=batch.positions, segment_ids=batch.segment_ids)
    with_mask, without = model.nll(hidden, batch.tokens), model.nll(hidden, batch.tokens, forbidden=(3,))
    assert (with_mask[0, 1:] > without[0, 1:] + 1e-3).all(), "the variant that gives MASK a probability"
    if not smoothing:
        np.testing.assert_allclose(plain, without[0, 1] + without[0, 3], rtol=1e-5)


def test_T17_uniform_noise_needs_clean_positions():
    """SUNDAE scores intact tokens; a loss on replaced ones only never teaches that a token may be right."""
    model = stubs.table_model(np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB)), by_token=True)
    batch = stubs.make_batch([2], [8], 10)
    noisy = Uniform().corrupt(KEYS, batch, jnp.full((1, 10), 0.5), vocab_size=stubs.VOCAB)
    intact = np.asarray(batch.target_mask & (noisy.tokens == batch.tokens))[0]
    assert 2 <= intact.sum() <= 6

    def gradient(objective):
        def loss(nudge):
            return objective.loss(Nudged(model.architecture, model.params, nudge=nudge), batch, KEYS).loss_sum

        return np.abs(np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((1, 10, stubs.VOCAB)))))[0].sum(axis=-1)

    fields = {"process": Uniform(Half()), "time": DiscreteTime(1)}
    replaced_only = MaskedDiffusion(weighting=FlatOnReplaced(), **fields)
    assert (gradient(Sundae(unrolls=0, **fields))[intact] > 0).all()
    assert (gradient(replaced_only)[intact & ~np.asarray(noisy.replaced)[0]] == 0).all(), "the faulty variant"


@dataclasses.dataclass(frozen=True)
class Half(Linear):
    """Half of the tokens at every time."""

    def alpha(self, t):
        return jnp.full_like(t, 0.5)


@dataclasses.dataclass(frozen=True)
class Nudged(BoundModel):
    """A model whose logits are moved by `nudge`, to differentiate with respect to them."""

    nudge: jax.Array | None = None

    def __call__(self, tokens, **inputs):
        hidden = BoundModel(self.architecture, self.params)(tokens, **inputs)
        return hidden.replace(values_BTD=hidden.values_BTD + self.nudge)

    def _head(self):
        return self.architecture.head(self.params)


def test_nested_views_hold_each_other_unless_their_times_are_equal():
    """RDM's coupled draws: each view alone has the law of a single one."""
    batch = stubs.make_batch([2] * 300, [9] * 300, 11)
    objective = Rdm(time=DiscreteTime(4), weighting=LinearDecay(steps=4))
    t = objective.time.draw(KEYS, batch.example_ids)
    (t, first), (s, second) = objective.nested_canvases(t, stubs.VOCAB, batch, KEYS)
    a, b = np.asarray(first.replaced), np.asarray(second.replaced)
    t, s = np.asarray(t), np.asarray(s)
    assert (b[s < t] <= a[s < t]).all()
    assert (a[t < s] <= b[t < s]).all()
    equal = (t == s) & np.asarray(batch.target_mask) & (t < 1)
    assert equal.any()
    assert 0.05 < (a != b)[equal].mean() < 0.6, "equal times: independent masks, or one draw would be had twice"
    target = np.asarray(batch.target_mask)
    for level in (0.25, 0.5, 0.75):
        here = target & (s == level)
        assert abs(b[here].mean() - level) < 4 * (level * (1 - level) / here.sum()) ** 0.5


def test_rdm_keeps_eos_clean_and_unscored():
    table = np.random.default_rng(0).normal(size=(10, stubs.VOCAB))
    batch = stubs.make_batch([2], [7], 10)
    objective = Rdm(time=DiscreteTime(1), weighting=LinearDecay(1))
    terms = objective.loss(stubs.table_model(table), batch, KEYS)
    np.testing.assert_allclose(terms.metrics["nll_per_token"].weight, 6, err_msg="seven target tokens, one of them EOS")
    changed = table.copy()
    changed[8] += np.arange(stubs.VOCAB)
    assert objective.loss(stubs.table_model(changed), batch, KEYS).loss_sum == terms.loss_sum
