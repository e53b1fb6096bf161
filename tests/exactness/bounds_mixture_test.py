import jax
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import WeightedMean
from diffusion_lm.noise.weighting import Flat
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.length_prediction import LengthPrediction
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.mixture import ConstantFactor, Mixture, RampFactor
from diffusion_lm.objectives.rdm import Rdm
from diffusion_lm.objectives.sundae import Sundae

BATCH = stubs.make_batch([2, 3], [8, 6], 10)
MODEL = stubs.table_model(np.random.default_rng(0).normal(size=(10, stubs.VOCAB)))


def mix(*weights, parts=(Autoregressive(), Autoregressive("prefix")), primary="a"):
    return Mixture(("a", "b"), parts, weights, primary)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (10, 0.0), (25, 0.75), (30, 1.0), (99, 1.0)])
def test_weights_follow_the_step(step, share):
    keys = StreamKeys.create(0, step)
    single = Autoregressive().loss(MODEL, BATCH, keys)
    mixed = mix(ConstantFactor(0.5), RampFactor(0.0, 2.0, 10, 30)).loss(MODEL, BATCH, keys)
    np.testing.assert_allclose(mixed.loss, (0.5 + 2.0 * share) * single.loss, rtol=1e-6)
    assert mixed.weight == single.weight
    np.testing.assert_allclose(mixed.metrics["b/nll_per_real_token"].value, single.metrics["nll_per_real_token"].value)


def test_a_mixture_of_one_part_is_that_part():
    only = Mixture(("a",), (Autoregressive(),), (ConstantFactor(),), "a")
    keys = StreamKeys.create(0)
    expected = Autoregressive().bound(MODEL, BATCH, keys)
    assert only.bound(MODEL, BATCH, keys).loss_sum == expected.loss_sum
    assert only.bound_kind == "exact"
    assert only.alignment == Autoregressive().alignment


def test_parts_have_noise_of_their_own_and_the_primary_names_the_bound():
    parts = (Sundae(unrolls=0), Sundae(unrolls=0))
    model = stubs.table_model(np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB)), by_token=True)
    metrics = mix(ConstantFactor(), ConstantFactor(), parts=parts).loss(model, BATCH, StreamKeys.create(0)).metrics
    assert metrics["a/nll_per_token"].value != metrics["b/nll_per_token"].value
    both = mix(ConstantFactor(), ConstantFactor(), parts=(Sundae(), Autoregressive()), primary="b")
    assert both.bound_kind == "exact"
    assert both.needs().passes == 3
    found = both.bound(model, BATCH, StreamKeys.create(0))
    np.testing.assert_allclose(found.loss, Autoregressive().bound(model, BATCH, StreamKeys.create(0)).loss)
    assert jax.tree.structure(found) is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: mix(ConstantFactor()),
        lambda: mix(ConstantFactor(), ConstantFactor(), primary="c"),
        lambda: Mixture((), (), (), "a"),
        lambda: ConstantFactor(-1.0),
        lambda: RampFactor(0.0, 1.0, 5, 5),
    ],
)
def test_impossible_settings_are_errors(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    "other",
    [
        Rdm(),
        MaskedDiffusion(weighting=Flat(), normaliser="replaced"),
        MaskedDiffusion(normaliser="example"),
    ],
    ids=["rdm", "replaced", "example"],
)
def test_each_part_keeps_the_value_that_it_has_alone(other):
    """An autoregressive loss of 1.579 stays 1.579 next to a part that counts examples (RDM) or replaced tokens."""
    parts, keys = (other, Autoregressive()), StreamKeys.create(0)
    mixed = mix(ConstantFactor(0.5), ConstantFactor(2.0), parts=parts).loss(MODEL, BATCH, keys)
    # Noise of a part is keyed by its number.
    alone = [only(part, number).loss(MODEL, BATCH, keys).loss for number, part in enumerate(parts)]
    np.testing.assert_allclose(mixed.loss, 0.5 * alone[0] + 2.0 * alone[1], rtol=1e-5)
    assert mixed.weights[0] != mixed.weights[1]
    swapped = mix(ConstantFactor(0.5), ConstantFactor(2.0), parts=parts, primary="b").loss(MODEL, BATCH, keys)
    np.testing.assert_allclose(swapped.loss, mixed.loss, rtol=1e-6)


def only(part, number):
    """The part with weight 1 among others of weight 0."""
    weights = [ConstantFactor(float(i == number)) for i in range(2)]
    parts = [Autoregressive(), Autoregressive()]
    parts[number] = part
    return Mixture(("a", "b"), parts, weights, "ab"[number])


def test_a_mixture_in_a_mixture_keeps_its_weights():
    inner = mix(ConstantFactor(), ConstantFactor(3.0), parts=(MaskedDiffusion(normaliser="example"), Autoregressive()))
    outer = Mixture(("x", "y"), (Autoregressive(), inner), (ConstantFactor(), ConstantFactor(0.5)), "x")
    keys = StreamKeys.create(0)
    terms = outer.loss(MODEL, BATCH, keys)
    ar = Autoregressive().loss(MODEL, BATCH, keys).loss
    diffusion = WeightedMean(2.0 * terms.others[0].total, terms.others[0].weight).value
    np.testing.assert_allclose(terms.loss, ar + 0.5 * (diffusion + 3.0 * ar), rtol=1e-5)
    np.testing.assert_allclose(terms.others[0].weight, 2, rtol=1e-6, err_msg="examples")
    assert len(terms.others) == 2


def test_a_mixture_needs_what_its_parts_need():
    needs = mix(ConstantFactor(), ConstantFactor(), parts=(Autoregressive(), LengthPrediction())).needs()
    assert needs.one_example_per_row
    assert not needs.mask_token
    assert mix(ConstantFactor(), ConstantFactor(), parts=(Autoregressive(), MaskedDiffusion())).needs().mask_token
