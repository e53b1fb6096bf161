"""The training step: pure, microbatched, sharded, donated, and compiled once for all runs that share it.

The loss is a sum over scored tokens divided by the global weight of the batch:

    loss = sum over microbatches of S_m / sum over microbatches of W_m

Microbatches, devices and hosts only contribute sums, and the step divides once, so the split changes nothing but the
order of additions (traps T10, T26 to T28). A loss of several parts (`LossTerms.others`) is sum_i S_i / W_i with a
global weight W_i per part. These weights are summed before the backward pass, because a gradient that is already summed
over parts can no longer be divided part by part.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_lm.architectures.base import Architecture, BoundModel
from diffusion_lm.core.axes import AxesTree
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
    """The statistics of one step; all scalars, replicated on every device.

    Attributes:
      terms: the batch's loss and metrics as sums.
      grad_norm: f32[], global norm of the gradient before clipping.
      tokens: i32[], tokens of the main stream that are not padding.
    """

    terms: LossTerms
    grad_norm: jax.Array
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One update of the parameters as a pure function, with its settings and its compiled form.

    A call runs the compiled update: `(state, batch, root key, learning rate) -> (state, StepStats)`. It donates the
    state. The learning rate is an argument, so the schedule of the optimizer is not part of the settings; runs that
    differ only in data, schedule, seed or length share one compiled program (`shared`).

    Attributes:
      architecture: the network.
      objective: the loss.
      optimizer: the update rule; its schedule is replaced by a constant.
      mesh_spec: number of devices per mesh axis.
      rules: logical axis -> mesh axes.
      microbatches: equal parts of the batch that are run one after the other.
      ema_decay: limit of the decay of the moving average; None = no average.
      devices: None = those of all processes; others only to compile for them and not to run on them.
      xla_option_sets: names of `parallel/xla_options.py`.
    """

    architecture: Architecture
    objective: Objective
    optimizer: Optimizer
    mesh_spec: MeshSpec
    rules: LogicalRules
    microbatches: int = 1
    ema_decay: float | None = None
    devices: tuple[jax.Device, ...] | None = None
    xla_option_sets: tuple[str, ...] = ()

    def __post_init__(self):
        # Steps of runs that differ in their schedules must be equal.
        rule = dataclasses.replace(self.optimizer, schedule=Constant(1.0))  # type: ignore[type-var]
        object.__setattr__(self, "optimizer", rule)

    def shared(self) -> "TrainStep":
        """Returns the first object of this process with equal settings, whose compiled functions are reused."""
        return _first_equal(self)

    def __call__(
        self, state: TrainState, batch: Batch, root: jax.Array, learning_rate: jax.typing.ArrayLike
    ) -> tuple[TrainState, StepStats]:
        """Runs the compiled `update`; the buffers of `state` are donated."""
        return self.compiled(state, batch, root, learning_rate)

    def update(
        self, state: TrainState, batch: Batch, root: jax.Array, learning_rate: jax.Array
    ) -> tuple[TrainState, StepStats]:
        """Returns the state after one update, and the statistics of the batch under the parameters before it.

        Frozen arrays are not differentiated: they keep every bit, and have neither gradient nor optimizer state. A
        batch without a scored token changes nothing but the step counter (trap T15).

        Args:
          state: parameters, optimizer state and step counter.
          batch: the global batch.
          root: root key of the noise and the dropout.
          learning_rate: f32[].
        """
        gradient, terms = self._gradient(state, batch, root)
        scored = terms.scored
        grad_norm = jnp.where(scored, optax.tree.norm(gradient), 0.0)
        learned = trained_part(state.params, self._frozen)
        with jax.named_scope("optimizer"):
            direction, opt_state = self._rule.update(gradient, state.opt_state, learned)
            # In float32: in bfloat16 the product of a small learning rate would be rounded before the subtraction.
            learned = jax.tree.map(
                lambda p, u: (p - learning_rate * u.astype(jnp.float32)).astype(p.dtype), learned, direction
            )
            ema = self._averaged(state, learned)
        updated = TrainState(step=state.step, params=rejoined(state.params, learned), opt_state=opt_state, ema=ema)
        # Without a scored token the gradient is 0, but decay and moments would still change the state.
        after = jax.tree.map(lambda new, old: jnp.where(scored, new, old), updated, state)
        stats = StepStats(terms=terms, grad_norm=grad_norm, tokens=jnp.sum(batch.segment_ids > 0, dtype=jnp.int32))
        return after.replace(step=state.step + 1), stats

    def _gradient(self, state: TrainState, batch: Batch, root: jax.Array) -> tuple[Params, LossTerms]:
        """Returns the float32 gradient of the loss with respect to the trained arrays, and the sums of the batch."""
        constrain, frozen = Placement(self.mesh, self.rules), self._frozen
        shardings = trained_part(self.state_shardings.params, frozen)
        learned = trained_part(state.params, frozen)
        keys = StreamKeys(root=root, step=state.step)

        def terms_of(params: Params, part: Batch) -> LossTerms:
            model = BoundModel(self.architecture, rejoined(state.params, params), constrain)
            return self.objective.loss(model, part, keys, train=True)

        def summed(one: Callable[[Batch], Sums]) -> Sums:
            return sum_over_microbatches(one, batch, self.microbatches, self.mesh, self.rules)

        weights: tuple[jax.Array, ...] | None = None
        if self.objective.needs().several_weights:
            # Weights depend on the batch and its noise only, so the compiler removes the forward passes of this sum.
            weights = summed(lambda part: terms_of(learned, part).weights)

        def loss(params: Params, part: Batch) -> tuple[jax.Array, LossTerms]:
            terms = terms_of(params, part)
            if weights is None:
                _check_one_weight(self.objective, terms)
                return terms.loss_sum, terms
            return terms.share_of(weights), terms

        def gradient_of(part: Batch) -> tuple[Params, LossTerms]:
            gradient, terms = jax.grad(loss, has_aux=True)(learned, part)
            # Accumulated in float32 and sharded like the parameters, so that no device holds a whole gradient.
            gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
            return jax.lax.with_sharding_constraint(gradient, shardings), terms

        gradient, terms = summed(gradient_of)
        if weights is None:
            # The only division by the weight, after all sums: it is global over microbatches, devices and hosts.
            gradient = jax.tree.map(lambda g: g / jnp.where(terms.scored, terms.weight, 1.0), gradient)
        return gradient, terms

    def _averaged(self, state: TrainState, learned: Params) -> Params | None:
        """Returns the moving average after the trained arrays became `learned`; None if the run keeps none."""
        if state.ema is None or self.ema_decay is None:
            return state.ema
        decay = ramped_decay(self.ema_decay, state.step)
        mean = jax.tree.map(
            lambda e, p: (decay * e + (1.0 - decay) * p).astype(e.dtype), trained_part(state.ema, self._frozen), learned
        )
        return rejoined(state.ema, mean)

    def _fresh_state(self, params: Params) -> TrainState:
        """Returns the state of step 0 with copies of the parameters: the step donates its state, not the caller's."""
        copy = functools.partial(jax.tree.map, jnp.copy)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=copy(params),
            opt_state=self._rule.init(trained_part(params, self._frozen)),
            ema=None if self.ema_decay is None else copy(params),
        )

    @functools.cached_property
    def compiled(self) -> jax.stages.Wrapped:
        """The jitted `update`; `lower` compiles it for abstract arguments."""

        # A function of this name, because profiles and `plan` show it: jit(train_step).
        def train_step(state, batch, root, learning_rate):
            return self.update(state, batch, root, learning_rate)

        return jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(self.state_shardings, replicated(self.mesh)),
            compiler_options=xla_options(self.xla_option_sets, self.mesh.devices.flat[0].platform),
        )

    @functools.cached_property
    def init(self) -> Callable[[jax.Array], TrainState]:
        """The jitted `key -> state` from fresh parameters."""
        return jax.jit(lambda key: self._fresh_state(self.architecture.init(key)), out_shardings=self.state_shardings)

    @functools.cached_property
    def adopt(self) -> Callable[[Params], TrainState]:
        """The jitted `params -> state` from copies of given parameters."""
        return jax.jit(self._fresh_state, out_shardings=self.state_shardings)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.mesh_spec.build(self.devices)

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        """A `TrainState` with the sharding of each array in its place."""
        return _state_shardings(self._shapes, self.architecture.logical_axes(), self.rules, self.mesh)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """A `TrainState` of shapes and dtypes with their shardings."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes,
            self.state_shardings,
        )

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._fresh_state, self.architecture.abstract_params())

    @functools.cached_property
    def _rule(self) -> optax.GradientTransformation:
        return self.optimizer.transformation(trained_part(self.architecture.logical_axes(), self._frozen))

    @functools.cached_property
    def _frozen(self) -> frozenset[str]:
        """Paths of the arrays that are not trained."""
        return self.architecture.frozen_arrays()


@functools.lru_cache(maxsize=16)
def _first_equal(step: TrainStep) -> TrainStep:
    return step


def ramped_decay(limit: float, step: jax.Array) -> jax.Array:
    """Returns f32[], the decay of the moving average at the update after n = `step` others: min(limit, (1+n)/(10+n)).

    The average starts from the initial parameters. With a constant decay of 0.9999 their share would still be 37 %
    after 10,000 updates; with the ramp (that of MDLM's and SEDD's code) it is below 1e-12 after 100. The decay is a
    function of the step alone, so a resumed run has the same average as an uninterrupted one.
    """
    updates = step.astype(jnp.float32)
    return jnp.minimum(limit, (1.0 + updates) / (10.0 + updates))


def sum_over_microbatches(
    one: Callable[[Batch], Sums], batch: Batch, microbatches: int, mesh: Mesh, rules: LogicalRules
) -> Sums:
    """Returns the sum of `one(part)`, any tree of arrays, over equal parts of the batch, which run one after the other.

    Row i goes to part i mod microbatches. The rows of each device are spread over all parts, so no row changes devices.
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
        f"{type(objective).__name__}.loss returned several weights, but needs().several_weights is False",
        where="Needs.several_weights",
        fix="Set several_weights=True in needs().",
    )


def _state_shardings(shapes: TrainState, axes: AxesTree, rules: LogicalRules, mesh: Mesh) -> TrainState:
    """Returns the shardings of a state: parameters by the rules, moments like their parameters, all else replicated."""
    params = tree_shardings(axes, shapes.params, rules, mesh)
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes.params), jax.tree.leaves(params), strict=True
        )
    }

    def mirrored(path, leaf):
        # A moment has the shape of its parameter, and the parameter's path somewhere inside its own.
        for param_path, (shape, sharding) in by_path.items():
            length = len(param_path)
            if leaf.shape == shape and any(path[i : i + length] == param_path for i in range(len(path) - length + 1)):
                return sharding
        return replicated(mesh)

    return shapes.replace(  # type: ignore[attr-defined]
        step=replicated(mesh),
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(mirrored, shapes.opt_state),
        ema=None if shapes.ema is None else params,
    )


def enable_compile_cache(folder: str) -> None:
    """Stores compiled programs in `folder` across processes; call it before anything is compiled."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
