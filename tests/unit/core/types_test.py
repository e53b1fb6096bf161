import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError, near_names, require
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import LossTerms, WeightedMean


def _terms(values, weights) -> LossTerms:
    values, weights = jnp.asarray(values), jnp.asarray(weights)
    total = jnp.sum(values * weights)
    return LossTerms(total, weights.sum(), {"nll": WeightedMean(total, weights.sum())})


def test_T10_terms_add_up_over_ragged_microbatches():
    values, weights = np.arange(6.0), np.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    whole = _terms(values, weights)
    parts = _terms(values[:4], weights[:4]) + _terms(values[4:], weights[4:])
    np.testing.assert_allclose(parts.loss, whole.loss)
    np.testing.assert_allclose(parts.metrics["nll"].value, whole.metrics["nll"].value)
    mean_of_means = (_terms(values[:4], weights[:4]).loss + _terms(values[4:], weights[4:]).loss) / 2
    assert abs(float(mean_of_means - whole.loss)) > 0.1


def test_T15_nothing_scored_is_zero_with_finite_gradients():
    def loss(x):
        return WeightedMean(x * 0.0, jnp.zeros(())).value

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(2.0))
    assert value == 0
    assert np.isfinite(gradient)


@pytest.mark.parametrize("field", ["pad_id", "eos_id", "bos_id", "mask_id"])
@pytest.mark.parametrize("token", [-1, 10])
def test_special_token_outside_the_vocabulary_is_refused(field, token):
    with pytest.raises(ConfigError, match=f"{field}={token}: not an id of a vocabulary of 10 tokens"):
        SpecialTokens(10, **{field: token})


def test_error_is_one_sentence_that_says_what_where_and_what_to_do():
    with pytest.raises(ConfigError) as caught:
        require(False, "batch_size = 3 is odd", where="TrainRun.batch_size", fix="Use an even number.")
    assert str(caught.value) == "batch_size = 3 is odd (TrainRun.batch_size). Use an even number."
    assert isinstance(caught.value, ValueError)
    require(True, "never said")


def test_near_names():
    assert near_names("stpes", ["steps", "seed", "data"]) == "; did you mean steps?"
    assert near_names("zzz", ["steps"]) == ""


def test_parts_with_weights_of_their_own_are_divided_by_them():
    """Ragged microbatches again, of two parts: 1/2 + 10/4, whatever the split."""
    first = LossTerms(jnp.float32(1.0), jnp.float32(2.0), {}, (WeightedMean(jnp.float32(4.0), jnp.float32(1.0)),))
    second = LossTerms(jnp.float32(0.0), jnp.float32(0.0), {}, (WeightedMean(jnp.float32(6.0), jnp.float32(3.0)),))
    assert (first + second).loss == 0.5 + 2.5
    weights = (first + second).weights
    assert [float(weight) for weight in weights] == [2.0, 4.0]
    assert first.share_of(weights) + second.share_of(weights) == 0.5 + 2.5
    assert first.scored
    assert second.scored, "nothing of the first part, something of the second"
    assert not LossTerms(jnp.float32(0.0), jnp.float32(0.0)).scored
