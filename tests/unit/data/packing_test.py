import numpy as np
import pytest

from diffusion_lm.data.packing import PackingPlan, pack


@pytest.mark.parametrize("streams", [1, 2])
def test_every_example_once_and_no_row_overflows(streams):
    draw = np.random.default_rng(0)
    costs = draw.integers(1, 65, (2000, streams))
    capacity = np.full(streams, 64)
    plan = pack(costs, capacity, draw.permutation(2000))
    assert sorted(plan.members) == list(range(2000))
    rows = [plan.row(row) for row in range(plan.rows)]
    assert sum(map(len, rows)) == 2000
    assert all(len(row) > 0 and (costs[row].sum(axis=0) <= capacity).all() for row in rows)


def test_little_is_lost():
    draw = np.random.default_rng(1)
    costs = draw.integers(1, 40, (5000, 1))
    plan = pack(costs, np.array([128]), draw.permutation(5000))
    assert costs.sum() / (plan.rows * 128) > 0.97


def test_single_rows():
    plan = PackingPlan.single(3)
    assert plan.rows == 3
    assert [plan.row(row).tolist() for row in range(3)] == [[0], [1], [2]]
