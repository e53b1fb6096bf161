"""The search for settings that fit, with a fake compiler that computes memory by a formula."""

import dataclasses

import pytest

from diffusion_lm.planning import search
from diffusion_lm.planning.accelerators import parse
from diffusion_lm.planning.plan import ProgramPlan

V5E = parse("v5e-8")


@dataclasses.dataclass
class Compiler:
    """Reports `memory(run)` bytes and records its calls."""

    memory: object
    asked: list = dataclasses.field(default_factory=list)

    def __call__(self, run):
        needed = self.memory(run)
        self.asked.append((run.model.spec.remat, run.microbatches, run.mesh.tensor))
        fits = needed <= V5E.usable_hbm
        return ProgramPlan("train", fits, None, "", int(needed), (), (), None, 0.0, 1, 0.0)


@pytest.fixture
def run():
    from training_stubs import small_run

    from diffusion_lm.parallel.mesh import MeshSpec

    return small_run(batch_size=64, mesh=MeshSpec())


def test_the_configured_settings_are_tried_first(run):
    compiler = Compiler(lambda run: 1)
    found = search.search(run, V5E, compiler)
    assert found.changes == ()
    assert found.tried == 1


def test_the_cheapest_that_fits_is_found(run):
    """Less rematerialisation is tried first, and microbatches are tried before full recomputation."""
    need = {"none": 4.0, "dots": 3.0, "dots_no_batch": 1.5, "full": 0.5}
    compiler = Compiler(lambda run: V5E.usable_hbm * need[run.model.spec.remat] / run.microbatches)
    found = search.search(run, V5E, compiler, limit=20)
    assert found is not None
    assert need[found.run.model.spec.remat] / found.run.microbatches <= 1
    assert found.run.model.spec.remat != "full", "microbatches are cheaper than a third more arithmetic"
    assert all(change.split(" = ")[0] in ("TransformerSpec.remat", "TrainRun.microbatches") for change in found.changes)


def test_it_stops_at_the_limit(run):
    compiler = Compiler(lambda run: V5E.usable_hbm * 1000)
    assert search.search(run, V5E, compiler, limit=3) is None
    assert len(compiler.asked) <= 3
