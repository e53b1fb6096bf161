"""Statistics of measurements and the order in which they are taken; no test here depends on how fast anything is."""

import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation.timing import Spread, alternate, speed_ratio, spread


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_spread_has_numpys_quantiles(count):
    values = np.random.default_rng(count).uniform(1.0, 2.0, count)
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    found = spread(values.tolist())
    np.testing.assert_allclose([found.low, found.median, found.high], [low, median, high], rtol=1e-12)
    assert (found.least, found.most, found.count) == (values.min(), values.max(), count)


def test_nothing_measured_is_an_error():
    with pytest.raises(ConfigError, match="nothing was measured"):
        spread([])


def test_ratio_is_taken_round_by_round():
    """A machine that becomes three times as slow half-way changes the medians and no ratio."""
    ours, theirs = [1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0, 6.0]
    assert speed_ratio(ours, theirs) == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 5)


def test_ratio_above_one_means_that_ours_is_faster():
    assert speed_ratio([1.0], [4.0]).median == 4.0


def test_ratio_needs_rounds_of_both():
    with pytest.raises(ValueError, match="zip"):
        speed_ratio([1.0, 2.0], [1.0])


def test_calls_are_made_in_turns():
    order = []

    def call(name):
        def one(number):
            order.append((name, number))
            return float(len(order))

        return one

    assert alternate([call("a"), call("b")], 3) == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
