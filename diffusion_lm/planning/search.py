"""Searches for settings with which a training step fits: rematerialisation policy, microbatches and mesh."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.planning.accelerators import Accelerator
from diffusion_lm.planning.estimates import estimate
from diffusion_lm.planning.plan import ProgramPlan
from diffusion_lm.training.run import TrainRun

_RECOMPUTES = {"none": 0.0, "dots": 0.05, "dots_no_batch": 0.1, "full": 1 / 3}
"""Approximate fraction of FLOPs that each rematerialisation policy adds to a step; only the order matters."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Settings that fit.

    Attributes:
      run: the run with these settings.
      changes: the changed settings as gin bindings, e.g. `TrainRun.microbatches = 4`.
      plan: the plan of its training step.
      tried: number of programs that were compiled.
    """

    run: TrainRun
    changes: tuple[str, ...]
    plan: ProgramPlan
    tried: int


def recomputed_share(run: TrainRun) -> float:
    """Returns the FLOPs that rematerialisation adds to a step, as a fraction of the model's FLOPs."""
    return _RECOMPUTES[run.model.spec.remat]


def search(
    run: TrainRun,
    accelerator: Accelerator,
    compile_and_read: Callable[[TrainRun], ProgramPlan],
    *,
    limit: int = 8,
    log: Callable[[str], object] = lambda text: None,
) -> SearchResult | None:
    """Returns the cheapest settings that fit, or None if none of the first `limit` compiled candidates fits.

    Candidates are tried from cheap to expensive. Compilation is slow, so a candidate is only compiled if its predicted
    memory fits. The prediction comes from shapes, times the largest ratio of actual to predicted memory so far.

    Args:
      run: the run to change.
      accelerator: the accelerator that it must fit.
      compile_and_read: compiles the training step of a run and returns its plan.
      limit: maximum number of programs to compile.
      log: called with a line of text per compiled candidate.
    """
    available, correction, tried = accelerator.usable_hbm, 1.0, 0
    for candidate, changes in _candidates(run, accelerator.devices):
        predicted = estimate(candidate, accelerator.devices).memory.total
        if predicted * correction > available:
            continue
        if tried == limit:
            return None
        tried += 1
        log(f"try {tried}: {'; '.join(changes) or 'as configured'}")
        plan = compile_and_read(candidate)
        if plan.fits:
            return SearchResult(candidate, changes, plan, tried)
        # If compilation failed, `needed` may be too small, but it is known to exceed what is available.
        correction = max(correction, max(plan.needed, available) / predicted)
    return None


def _candidates(run: TrainRun, devices: int) -> Iterator[tuple[TrainRun, tuple[str, ...]]]:
    """Yields runs that compute the same numbers with their changed settings, sorted by estimated cost."""
    found: list[tuple[tuple[float, int, int], TrainRun, tuple[str, ...]]] = []
    for mesh_rank, (mesh, mesh_changes) in enumerate(_meshes(run, devices)):
        for model in _models(run.model):
            remat = model.spec.remat
            for microbatches in _microbatches(run, mesh, devices):
                bindings = list(mesh_changes)
                if remat != run.model.spec.remat:
                    bindings.append(f"TransformerSpec.remat = {remat!r}")
                if microbatches != run.microbatches:
                    bindings.append(f"TrainRun.microbatches = {microbatches}")
                candidate = dataclasses.replace(run, model=model, mesh=mesh, microbatches=microbatches)
                # Rough weights. Doubling the microbatches makes matrix products smaller, which costs about 3 %. The
                # configured mesh is preferred.
                cost = _RECOMPUTES[remat] + 0.03 * (microbatches.bit_length() - 1) + 0.15 * mesh_rank
                found.append(((cost, mesh_rank, microbatches), candidate, tuple(bindings)))
    for _, candidate, changes in sorted(found, key=lambda row: row[0]):
        yield candidate, changes


def _models(model: Architecture) -> list[Architecture]:
    """Returns the network with each rematerialisation policy; a wrapped network (adapters) is returned unchanged."""
    configured: Any = model  # a frozen dataclass
    if not any(field.name == "spec" for field in dataclasses.fields(configured)):
        return [model]
    specs = [dataclasses.replace(model.spec, remat=remat) for remat in _RECOMPUTES]
    return [dataclasses.replace(configured, spec=spec) for spec in specs]


def _meshes(run: TrainRun, devices: int) -> Sequence[tuple[MeshSpec, tuple[str, ...]]]:
    meshes: list[tuple[MeshSpec, tuple[str, ...]]] = [(run.mesh, ())]
    for tensor in (1, 2, 4, 8):
        mesh = dataclasses.replace(run.mesh, data=run.mesh.data if run.mesh.data > 0 else 1, fsdp=-1, tensor=tensor)
        heads = run.model.spec.num_heads
        fixed = mesh.data * mesh.sequence * tensor
        if devices % fixed or heads % tensor or mesh.sizes(devices) in [one.sizes(devices) for one, _ in meshes]:
            continue
        names = [f"MeshSpec.{axis} = {getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor")
                 if getattr(mesh, axis) != getattr(run.mesh, axis)]  # fmt: skip
        meshes.append((mesh, tuple(names)))
    return meshes


def _microbatches(run: TrainRun, mesh: MeshSpec, devices: int) -> list[int]:
    sizes = mesh.sizes(devices)
    rows = run.batch_size // (sizes["data"] * sizes["fsdp"])
    return [count for count in (1, 2, 4, 8, 16, 32) if count <= max(rows, 1) and run.batch_size % count == 0 and
            (run.batch_size // count) % (sizes["data"] * sizes["fsdp"]) == 0]  # fmt: skip
