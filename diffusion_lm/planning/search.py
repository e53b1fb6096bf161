"""Finds settings under which a training step fits: rematerialisation, microbatches and mesh, the cheapest first."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusion_lm.planning.accelerators import Accelerator
from diffusion_lm.planning.estimates import estimate
from diffusion_lm.planning.plan import ProgramPlan
from diffusion_lm.training.run import TrainRun

_RECOMPUTES = {"none": 0.0, "dots": 0.05, "dots_no_batch": 0.1, "full": 1 / 3}
"""Share of a step's FLOPs that each policy adds, roughly; the order is what matters."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Settings that fit.

    Attributes:
      run: the run with them.
      changes: as gin bindings, `TrainRun.microbatches = 4`.
      plan: of its training step.
      tried: programs that were compiled on the way.
    """

    run: TrainRun
    changes: tuple[str, ...]
    plan: ProgramPlan
    tried: int


def recomputed_share(run: TrainRun) -> float:
    """Returns the FLOPs that rematerialisation adds to a step, as a share of the model's own."""
    return _RECOMPUTES[run.model.spec.remat]


def search(
    run: TrainRun,
    accelerator: Accelerator,
    compile_and_read: Callable[[TrainRun], ProgramPlan],
    *,
    limit: int = 8,
    log: Callable[[str], Any] = lambda text: None,
) -> Found | None:
    """Returns the cheapest settings that fit, or None where none of the first `limit` does.

    The memory of each candidate is predicted from shapes, corrected by what the compiler needed for the ones before, so
    that only those that may well fit are compiled.

    Args:
      run: where to start; its own settings come first if they are among the cheapest.
      accelerator: what it must fit.
      compile_and_read: compiles and reads the training step of a run.
      limit: programs to compile at most.
      log: told about each.
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
            return Found(candidate, changes, plan, tried)
        correction = max(correction, max(plan.needed, available) / predicted)
    return None


def _candidates(run: TrainRun, devices: int) -> Iterator[tuple[TrainRun, tuple[str, ...]]]:
    """Yields runs that compute the same numbers, the cheaper first: mesh as given before others, then less recomputing,
    then fewer microbatches."""
    found: list[tuple[tuple[Any, ...], TrainRun, tuple[str, ...]]] = []
    for mesh_rank, (mesh, mesh_changes) in enumerate(_meshes(run, devices)):
        for model in _models(run.model):
            remat = model.spec.remat
            for microbatches in _microbatches(run, mesh, devices):
                changes = list(mesh_changes)
                if remat != run.model.spec.remat:
                    changes.append(f"TransformerSpec.remat = {remat!r}")
                if microbatches != run.microbatches:
                    changes.append(f"TrainRun.microbatches = {microbatches}")
                candidate = dataclasses.replace(run, model=model, mesh=mesh, microbatches=microbatches)
                # Each doubling of the microbatches costs about as much as a little recomputing: smaller matrices.
                cost = _RECOMPUTES[remat] + 0.03 * (microbatches.bit_length() - 1) + 0.15 * mesh_rank
                found.append(((cost, mesh_rank, microbatches), candidate, tuple(changes)))
    for _, candidate, said in sorted(found, key=lambda row: row[0]):
        yield candidate, said


def _models(model: Any) -> list[Any]:
    """The network under each policy; a network around another (adapters) only as it is."""
    if not any(field.name == "spec" for field in dataclasses.fields(model)):
        return [model]
    return [dataclasses.replace(model, spec=dataclasses.replace(model.spec, remat=remat)) for remat in _RECOMPUTES]


def _meshes(run: TrainRun, devices: int) -> Sequence[tuple[Any, tuple[str, ...]]]:
    meshes: list[tuple[Any, tuple[str, ...]]] = [(run.mesh, ())]
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


def _microbatches(run: TrainRun, mesh: Any, devices: int) -> list[int]:
    sizes = mesh.sizes(devices)
    rows = run.batch_size // (sizes["data"] * sizes["fsdp"])
    return [count for count in (1, 2, 4, 8, 16, 32) if count <= max(rows, 1) and run.batch_size % count == 0 and
            (run.batch_size // count) % (sizes["data"] * sizes["fsdp"]) == 0]  # fmt: skip
