import numpy as np
import pytest

from diffusion_lm.data import counted
from diffusion_lm.data.order import Order


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_permute_is_a_permutation_for_every_key(size):
    for seed in range(3):
        where = counted.permute(np.arange(size), size, counted.key("x", seed))
        assert sorted(where) == list(range(size))


def test_permute_is_uniform_over_places():
    places = [int(counted.permute(np.array([3]), 10, counted.key("x", seed))[0]) for seed in range(4000)]
    assert np.abs(np.bincount(places, minlength=10) - 400).max() < 100  # standard deviation 19


def test_hash_does_not_change_between_versions():
    assert counted.key("data_order", 0, 0, 0)[0] == counted.key("data_order", 0, 0, 0)[0]
    assert counted.mix(np.array([0, 1], np.uint64)).tolist() == [16294208416658607535, 10451216379200822465]


def test_every_row_once_an_epoch_and_epochs_differ():
    order = Order((7, 12), None, seed=0, shuffle=True)
    sources, rows, epochs = order.places(np.arange(57))
    per_epoch = [list(zip(sources[epochs == e], rows[epochs == e], strict=True)) for e in range(3)]
    everything = sorted((s, r) for s, n in ((0, 7), (1, 12)) for r in range(n))
    assert all(sorted(epoch) == everything for epoch in per_epoch)
    assert per_epoch[0] != per_epoch[1] != per_epoch[2]
    assert per_epoch[0] != [(s, r) for s, r in everything]


def test_weights_hold_everywhere_and_each_source_has_its_own_epochs():
    order = Order((5, 1000), (0.25, 0.75), seed=0, shuffle=True)
    sources, rows, epochs = order.places(np.arange(12_000))
    share = np.cumsum(sources == 0)
    assert np.abs(share - 0.25 * np.arange(1, 12_001)).max() <= 1.5
    small, small_epochs = rows[sources == 0], epochs[sources == 0]
    for epoch in range(20):
        assert sorted(small[small_epochs == epoch]) == list(range(5))
    large = rows[sources == 1]
    assert sorted(large[:1000]) == list(range(1000))


def test_a_position_does_not_depend_on_what_was_asked_before():
    order = Order((50, 30), (2.0, 1.0), seed=3, shuffle=True)
    whole = np.stack(order.places(np.arange(400)))
    np.testing.assert_array_equal(np.stack(order.places(np.array([399, 17]))), whole[:, [399, 17]])


def test_without_shuffle_the_stored_order_repeats():
    _, rows, epochs = Order((3,), None, seed=0, shuffle=False).places(np.arange(7))
    assert rows.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 2]
