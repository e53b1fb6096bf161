"""The training step: pure, microbatched, sharded, donated, and compiled once for all runs that share it.

The step divides by the batch's global weight once; microbatches, devices and hosts only ever contribute sums, so the
split changes nothing but the order of additions (traps T10, T26 to T28). A loss of several parts (`LossTerms.others`)
is sum_i S_i / W_i with a global weight W_i of each; the weights are summed before the backward pass, since a gradient
that has been added up over parts can no longer be divided part by part.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.architectures.extended import frozen_arrays
from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms, Params
from diffusion_lm.objectives.objective import Objective
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import Placement, replicated, tree_shardings
from diffusion_lm.parallel.xla_options import xla_options
from diffusion_lm.training.optimizers import Optimizer
from diffusion_lm.training.partial import rejoined, trained_part
from diffusion_lm.training.schedules import Constant
from diffusion_lm.training.state import TrainState

Sums = TypeVar("Sums")


@flax.struct.dataclass
class StepStats:
    """What one step reports; all scalars, whole on every device.

    Attributes:
      terms: the batch's loss and metrics as sums.
      grad_norm: f32[], global norm of the gradient before clipping.
      tokens: i32[], tokens of the main stream that are not padding.
    """

    terms: LossTerms
    grad_norm: jax.Array
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run; runs that differ only in data, schedule, seed or length share one.

    Attributes:
      mesh: the devices.
      state_shardings: a `TrainState` of shardings: where each array lies.
      abstract_state: shapes and dtypes of the state, with their shardings.
      init: `key -> TrainState`, from fresh parameters.
      adopt: `params -> TrainState`, from copies of given parameters (the caller's are not donated).
      step: `(state, batch, root key, learning rate f32[]) -> (state, StepStats)`; donates the state.
    """

    mesh: Mesh
    state_shardings: Any
    abstract_state: TrainState
    init: Callable[[jax.Array], TrainState]
    adopt: Callable[[Params], TrainState]
    step: Callable[[TrainState, Batch, jax.Array, Any], tuple[TrainState, StepStats]]


def make_program(
    architecture: Architecture,
    objective: Objective,
    optimizer: Optimizer,
    *,
    mesh: MeshSpec,
    rules: LogicalRules,
    microbatches: int = 1,
    ema_decay: float | None = None,
    devices: tuple[jax.Device, ...] | None = None,
    xla_option_sets: tuple[str, ...] = (),
) -> Program:
    """Returns the program of these settings, the same one for equal settings in a process.

    The schedule is no part of it: learning rates are arguments of the step. `devices` are those of all processes unless
    others are given, to compile for and not to run on. `xla_option_sets` are names of `parallel/xla_options.py`.
    """
    rule = dataclasses.replace(optimizer, schedule=Constant(1.0))  # type: ignore[type-var]
    return _program(architecture, objective, rule, mesh, rules, microbatches, ema_decay, devices, xla_option_sets)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=16)
def _program(
    architecture: Architecture,
    objective: Objective,
    optimizer: Optimizer,
    mesh_spec: MeshSpec,
    rules: LogicalRules,
    microbatches: int,
    ema_decay: float | None,
    devices: tuple[jax.Device, ...] | None,
    xla_option_sets: tuple[str, ...],
) -> Program:
    mesh = mesh_spec.build(devices)
    axes, frozen = architecture.logical_axes(), frozen_arrays(architecture)
    rule = optimizer.transformation(trained_part(axes, frozen))

    def adopt(params: Params) -> TrainState:
        copy = functools.partial(jax.tree.map, jnp.copy)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=copy(params),
            opt_state=rule.init(trained_part(params, frozen)),
            ema=None if ema_decay is None else copy(params),
        )

    abstract = jax.eval_shape(adopt, architecture.abstract_params())
    shardings = _state_shardings(abstract, axes, rules, mesh)
    step = functools.partial(
        train_step,
        architecture=architecture,
        objective=objective,
        rule=rule,
        mesh=mesh,
        rules=rules,
        params_shardings=trained_part(shardings.params, frozen),
        frozen=frozen,
        microbatches=microbatches,
        ema_decay=ema_decay,
    )
    return Program(
        mesh=mesh,
        state_shardings=shardings,
        abstract_state=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        ),
        init=jax.jit(lambda key: adopt(architecture.init(key)), out_shardings=shardings),
        adopt=jax.jit(adopt, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, replicated(mesh)),
            compiler_options=xla_options(xla_option_sets, mesh.devices.flat[0].platform),
        ),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    root: jax.Array,
    learning_rate: jax.Array,
    *,
    architecture: Architecture,
    objective: Objective,
    rule: optax.GradientTransformation,
    mesh: Mesh,
    rules: LogicalRules,
    params_shardings: Any,
    frozen: frozenset[str],
    microbatches: int,
    ema_decay: float | None,
) -> tuple[TrainState, StepStats]:
    """Returns the state after one update and what the batch looked like to the state before it.

    Arrays whose paths are in `frozen` are not differentiated: they keep every bit, and have neither gradient nor
    optimizer state (`params_shardings` are those of the others). A batch in which nothing is scored changes nothing but
    the step counter (trap T15).
    """
    constrain = Placement(mesh, rules)
    learned = trained_part(state.params, frozen)
    keys = StreamKeys(root=root, step=state.step)

    def terms_of(params: Params, part: Batch) -> LossTerms:
        bound = BoundModel(architecture, rejoined(state.params, params), constrain)
        return objective.loss(bound, part, keys, train=True)

    weights: tuple[jax.Array, ...] | None = None
    if objective.needs().several_weights:
        # Weights follow from the batch and its noise alone: the compiler drops the forward passes of this sum.
        weights = sum_over_microbatches(lambda part: terms_of(learned, part).weights, batch, microbatches, mesh, rules)

    def loss(params: Params, part: Batch) -> tuple[jax.Array, LossTerms]:
        terms = terms_of(params, part)
        if weights is None:
            _check_one_weight(objective, terms)
            return terms.loss_sum, terms
        return terms.share_of(weights), terms

    def gradient_of(part: Batch) -> tuple[Params, LossTerms]:
        gradient, terms = jax.grad(loss, has_aux=True)(learned, part)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        return jax.lax.with_sharding_constraint(gradient, params_shardings), terms

    gradient, terms = sum_over_microbatches(gradient_of, batch, microbatches, mesh, rules)
    scored = terms.scored
    if weights is None:
        gradient = jax.tree.map(lambda g: g / jnp.where(scored, terms.weight, 1.0), gradient)
    grad_norm = jnp.where(scored, optax.tree.norm(gradient), 0.0)

    with jax.named_scope("optimizer"):
        direction, opt_state = rule.update(gradient, state.opt_state, learned)
        learned = jax.tree.map(
            lambda p, u: (p - learning_rate * u.astype(jnp.float32)).astype(p.dtype), learned, direction
        )
        ema = state.ema
        if ema is not None and ema_decay is not None:
            decay = ramped_decay(ema_decay, state.step)
            mean = jax.tree.map(
                lambda e, p: (decay * e + (1.0 - decay) * p).astype(e.dtype), trained_part(ema, frozen), learned
            )
            ema = rejoined(ema, mean)
    updated = TrainState(step=state.step, params=rejoined(state.params, learned), opt_state=opt_state, ema=ema)
    kept = jax.tree.map(lambda new, old: jnp.where(scored, new, old), updated, state)
    stats = StepStats(terms=terms, grad_norm=grad_norm, tokens=jnp.sum(batch.segment_ids > 0, dtype=jnp.int32))
    return kept.replace(step=state.step + 1), stats


def ramped_decay(limit: float, step: jax.Array) -> jax.Array:
    """Returns f32[], the decay of the moving average at the update after `step` i32[] others: min(limit, (1+n)/(10+n)).

    The average starts from the initial parameters. At a constant decay of 0.9999 they would make up 37 % of it after
    10,000 updates; with the ramp (that of MDLM's and SEDD's code) they are below 1e-12 of it after 100. It is a
    function of the step alone, so a resumed run has the average of the undisturbed one.
    """
    updates = step.astype(jnp.float32)
    return jnp.minimum(limit, (1.0 + updates) / (10.0 + updates))


def sum_over_microbatches(
    one: Callable[[Batch], Sums], batch: Batch, microbatches: int, mesh: Mesh, rules: LogicalRules
) -> Sums:
    """Returns the sums of `one(part)`, any tree of arrays, over equal parts of the batch, one part at a time.

    Row i goes to part i mod microbatches: the rows of one device are spread over all parts, so none has to travel.
    """
    if microbatches == 1:
        return one(batch)

    def split(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, rules.mesh_axes("batch"))
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, spec))

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), zeros, parts)
    return sums


def _check_one_weight(objective: Objective, terms: LossTerms) -> None:
    require(
        not terms.others,
        f"{type(objective).__name__} returns parts with weights of their own and its needs() do not say so",
        where="Needs.several_weights",
        fix="Set several_weights=True in needs().",
    )


def _state_shardings(abstract: TrainState, axes: Any, rules: LogicalRules, mesh: Mesh) -> Any:
    """Shards the parameters by the rules, whatever in the optimizer mirrors a parameter like it, and nothing else."""
    params = tree_shardings(axes, abstract.params, rules, mesh)
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract.params), jax.tree.leaves(params), strict=True
        )
    }

    def mirror(path, leaf):
        for param_path, (shape, sharding) in by_path.items():
            length = len(param_path)
            if leaf.shape == shape and any(path[i : i + length] == param_path for i in range(len(path) - length + 1)):
                return sharding
        return replicated(mesh)

    return abstract.replace(  # type: ignore[attr-defined]
        step=replicated(mesh),
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(mirror, abstract.opt_state),
        ema=None if abstract.ema is None else params,
    )


def enable_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` across processes; call it before anything is compiled."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
