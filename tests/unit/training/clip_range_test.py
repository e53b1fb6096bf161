"""BD3-LM's search for the range of mask rates: variances in closed form, the choice, its way into training and back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from training_stubs import ONE_DEVICE, RaggedRows, nano, small_run, stack

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation.clip_range import ClipRangeSearch
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.block_diffusion import BlockDiffusion, MaskRates
from diffusion_lm.training.checkpoint import CheckpointPolicy
from diffusion_lm.training.loop import train

OBJECTIVE = BlockDiffusion(block_size=4, rates=MaskRates(stratified=False))


@dataclasses.dataclass(frozen=True)
class HeldOut(RaggedRows):
    """Rows with an evaluation split: one batch."""

    def with_encoder(self, encoder):
        return self

    def eval_batches(self, batch_size, limit=None):
        yield stack([self.row(1000 + i) for i in range(batch_size)]), []


def search(**changes):
    fields = dict(data=HeldOut(mask_id=3), objective=OBJECTIVE, batch_size=8, widths=(0.5,), spacing=0.25, every=2)
    return ClipRangeSearch(**(fields | changes))


def test_candidates_are_those_of_the_release():
    """Widths from 0.5 to 0.9 at a spacing of 0.05, from 0 up to where the range ends at 1, and the whole range."""
    found = search(widths=(0.5, 0.6, 0.7, 0.8, 0.9), spacing=0.05).ranges
    assert len(found) == 1 + 11 + 9 + 7 + 5 + 3
    assert found[0] == (0.001, 1.0)
    assert {(0.3, 0.8), (0.45, 0.95), (0.5, 1.0), (0.001, 0.5)} <= {(round(a, 3), round(b, 3)) for a, b in found}
    assert all(0 < low <= high <= 1 for low, high in found)


def test_the_range_of_least_variance_is_chosen():
    """A network that knows nothing has the least variance where most is masked; the chosen one is the least of all."""
    model = nano()
    values = search().run(BoundModel(model, model.init(jax.random.key(0))), 2)
    variances = {name: value for name, value in values.items() if name.startswith("variance")}
    assert len(variances) == 4
    assert (values["low"], values["high"]) == (0.5, 1.0)
    assert values["variance/0.5-1"] == min(variances.values())
    assert values == search().run(BoundModel(model, model.init(jax.random.key(0))), 4), "frozen noise"
    adjusted = search().adjusted(OBJECTIVE, values)
    assert adjusted == dataclasses.replace(OBJECTIVE, rates=MaskRates(0.5, 1.0, stratified=False))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: search(widths=(1.5,)), "widths"),
        (lambda: search(spacing=0.0), "spacing"),
        (lambda: search(objective=Autoregressive()), "no range of mask rates"),
        (lambda: search(objective=dataclasses.replace(OBJECTIVE, weighting="flat")), "weighting"),
        (lambda: search().adjusted(Autoregressive(), {"low": 0.5, "high": 1.0}), "no range of mask rates"),
    ],
)
def test_impossible_searches_are_errors(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def _losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.mark.thorough
def test_training_continues_with_the_chosen_range_and_so_does_a_resumed_run(tmp_path):
    """Steps 0 and 1 have the whole range; then all is masked at 0.5 to 1, also after a restart at step 3."""
    settings = dict(
        model=nano(num_layers=1, scan_layers=False), objective=OBJECTIVE, mesh=ONE_DEVICE, log_every=1, batch_size=4,
        data=RaggedRows(mask_id=3), checkpoint=CheckpointPolicy(every=3), ema_decay=0.5,
    )  # fmt: skip
    run = small_run(steps=5, evaluations=(search(),), **settings)
    whole = train(run, tmp_path / "whole")
    plain = train(small_run(steps=5, **settings), tmp_path / "plain")
    searched, fixed = _losses(tmp_path / "whole"), _losses(tmp_path / "plain")
    assert [searched[step] == fixed[step] for step in (1, 2, 3)] == [True, True, False]
    assert not np.array_equal(whole.params["embed"]["tokens"], plain.params["embed"]["tokens"])

    @dataclasses.dataclass(frozen=True)
    class Failing(RaggedRows):
        fail_at: int | None = dataclasses.field(default=None, compare=False)

    stopped = dataclasses.replace(run, data=Failing(mask_id=3, fail_at=3))
    with pytest.raises(OSError):
        train(stopped, tmp_path / "resumed")
    resumed = train(dataclasses.replace(run, data=Failing(mask_id=3)), tmp_path / "resumed")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_a_search_is_part_of_what_a_run_is():
    """Other evaluations are not: they change no number of the training."""
    run = small_run(objective=OBJECTIVE, data=RaggedRows(mask_id=3))
    assert dataclasses.replace(run, evaluations=(search(),)).identity() != run.identity()
    other = dataclasses.replace(run, evaluations=(search(every=3),))
    assert other.identity() != dataclasses.replace(run, evaluations=(search(),)).identity()
