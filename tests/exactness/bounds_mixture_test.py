import jax
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.denoising import Denoising
from diffusion_lm.objectives.mixture import Constant, Mixture, Ramp

BATCH = stubs.make_batch([2, 3], [8, 6], 10)
MODEL = stubs.table_model(np.random.default_rng(0).normal(size=(10, stubs.VOCAB)))


def mix(*weights, parts=(Autoregressive(), Autoregressive("prefix")), primary="a"):
    return Mixture(("a", "b"), parts, weights, primary)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (10, 0.0), (25, 0.75), (30, 1.0), (99, 1.0)])
def test_weights_follow_the_step(step, share):
    keys = StreamKeys.create(0, step)
    single = Autoregressive().loss(MODEL, BATCH, keys)
    mixed = mix(Constant(0.5), Ramp(0.0, 2.0, 10, 30)).loss(MODEL, BATCH, keys)
    np.testing.assert_allclose(mixed.loss_sum, (0.5 + 2.0 * share) * single.loss_sum, rtol=1e-6)
    assert mixed.weight == single.weight
    np.testing.assert_allclose(mixed.metrics["b/nll_per_real_token"].value, single.metrics["nll_per_real_token"].value)


def test_a_mixture_of_one_part_is_that_part():
    only = Mixture(("a",), (Autoregressive(),), (Constant(),), "a")
    keys = StreamKeys.create(0)
    expected = Autoregressive().bound(MODEL, BATCH, keys)
    assert only.bound(MODEL, BATCH, keys).loss_sum == expected.loss_sum
    assert only.bound_kind == "exact"
    assert only.alignment == Autoregressive().alignment


def test_parts_have_noise_of_their_own_and_the_primary_names_the_bound():
    parts = (Denoising(unrolls=0), Denoising(unrolls=0))
    model = stubs.table_model(np.random.default_rng(0).normal(size=(stubs.VOCAB, stubs.VOCAB)), by_token=True)
    metrics = mix(Constant(), Constant(), parts=parts).loss(model, BATCH, StreamKeys.create(0)).metrics
    assert metrics["a/nll_per_token"].value != metrics["b/nll_per_token"].value
    both = mix(Constant(), Constant(), parts=(Denoising(), Autoregressive()), primary="b")
    assert both.bound_kind == "exact"
    assert both.needs().passes == 3
    found = both.bound(model, BATCH, StreamKeys.create(0))
    np.testing.assert_allclose(found.loss, Autoregressive().bound(model, BATCH, StreamKeys.create(0)).loss)
    assert jax.tree.structure(found) is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: mix(Constant()),
        lambda: mix(Constant(), Constant(), primary="c"),
        lambda: Mixture((), (), (), "a"),
        lambda: Constant(-1.0),
        lambda: Ramp(0.0, 1.0, 5, 5),
    ],
)
def test_impossible_settings_are_errors(make):
    with pytest.raises(ConfigError):
        make()
