"""Compiles the three programs of a run for devices that are not present: training step, likelihood bound, decoding.

Shapes, shardings and donation are those of a real run; the training step is the one of `training/step.py`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded, LossTerms, Params
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.shardings import Placement, batch_shardings, replicated, tree_shardings
from diffusion_lm.samplers.sampler import Sampler
from diffusion_lm.training.run import TrainRun


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled but not run.

    Attributes:
      name: `train`, `bound` or `decode`.
      executable: JAX's compiled program; None if it does not fit or the devices cannot share the batch.
      refusal: error message if `executable` is None, else empty.
      seconds: seconds to trace, lower and compile.
    """

    name: str
    executable: jax.stages.Compiled | None
    refusal: str
    seconds: float


def train(run: TrainRun, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles a training step of `run` for `devices`, with the state donated.

    If the batch cannot be sharded over the devices, the result has a `refusal` instead of a program.
    """
    error = _batch_error("train", run, devices)
    if error is not None:
        return error
    train_step = run.train_step(tuple(devices))
    batch = _placed(run.data.abstract_batch(run.batch_size), run, train_step.mesh)
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(train_step.mesh))
    return _compile(
        "train",
        lambda: train_step.compiled.lower(train_step.abstract_state, batch, _key(train_step.mesh), rate),
    )


def bound(run: TrainRun, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles the likelihood bound of one batch, without gradients; see `train` for refusals."""
    error = _batch_error("bound", run, devices)
    if error is not None:
        return error
    mesh = run.mesh.build(devices)

    def program(params: Params, batch: Batch, root: jax.Array) -> LossTerms:
        model = BoundModel(run.model, params, Placement(mesh, run.rules))
        return run.objective.bound(model, batch, StreamKeys(root=root, step=jnp.int32(0)))

    batch = _placed(run.data.abstract_batch(run.batch_size), run, mesh)
    return _compile("bound", lambda: jax.jit(program).lower(_params(run, mesh), batch, _key(mesh)))


def decode(run: TrainRun, sampler: Sampler, prompts: int, devices: Sequence[jax.Device]) -> Compiled:
    """Compiles `sampler` on `prompts` rows of the run's shape."""
    mesh = run.mesh.build(devices)
    prompt = _placed(run.data.abstract_batch(prompts), run, mesh)
    program = _generation(run.model, sampler, Placement(mesh, run.rules))
    return _compile("decode", lambda: program.lower(_params(run, mesh), prompt, _key(mesh)))


def decode_alone(architecture: Architecture, sampler: Sampler, prompt: Batch, device: jax.Device) -> Compiled:
    """Compiles `sampler` on `prompt`, of which only the shapes matter, for one device: what a speed study times."""
    mesh = MeshSpec().build([device])
    abstract = jax.tree.map(
        lambda leaf: _with_sharding(leaf, replicated(mesh)), (architecture.abstract_params(), prompt)
    )
    program = _generation(architecture, sampler, no_constraint)
    return _compile("decode", lambda: program.lower(*abstract, _key(mesh)))


def _generation(architecture: Architecture, sampler: Sampler, constrain: Constrain) -> jax.stages.Wrapped:
    def program(params: Params, prompt: Batch, root: jax.Array) -> Decoded:
        model = BoundModel(architecture, params, constrain).for_loops()
        return sampler.generate(model, prompt, StreamKeys(root=root, step=jnp.int32(0)))

    return jax.jit(program)


def _params(run: TrainRun, mesh: Mesh) -> Params:
    abstract = run.model.abstract_params()
    shardings = tree_shardings(run.model.logical_axes(), abstract, run.rules, mesh)
    return jax.tree.map(_with_sharding, abstract, shardings)


def _batch_error(name: str, run: TrainRun, devices: Sequence[jax.Device]) -> Compiled | None:
    """Returns a `Compiled` with a refusal if the devices cannot share a batch, else None."""
    try:
        run.check_mesh(devices)
    except ConfigError as error:
        return Compiled(name, None, str(error), 0.0)
    return None


def _placed(batch: Batch, run: TrainRun, mesh: Mesh) -> Batch:
    return jax.tree.map(_with_sharding, batch, batch_shardings(batch, run.rules, mesh))


def _with_sharding(leaf: jax.ShapeDtypeStruct | jax.Array, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _with_sharding(_abstract_key(), replicated(mesh))


@functools.cache
def _abstract_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _compile(name: str, lower: Callable[[], jax.stages.Lowered]) -> Compiled:
    started = time.perf_counter()
    lowered = lower()
    # JAX can write programs for absent devices to the compilation cache but cannot read them back.
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        executable, refusal = lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        executable, refusal = None, str(error)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return Compiled(name, executable, refusal, time.perf_counter() - started)
