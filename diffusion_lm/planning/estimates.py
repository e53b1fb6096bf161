"""Estimates FLOPs and memory of a training run from shapes, without allocating arrays, compiling or reading data."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import ShardingRow, batch_divisor, sharding_table
from diffusion_lm.training.metrics import train_flops_per_token
from diffusion_lm.training.optimizers import decay_mask
from diffusion_lm.training.partial import trained_part
from diffusion_lm.training.run import TrainRun


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parameters of a network on a mesh.

    Attributes:
      parameters: parameter count by part of the network, without the total.
      total_parameters: their sum.
      trained_parameters: number of parameters that are not frozen.
      devices: number of devices.
      mesh: size of each mesh axis.
      rows: one row per array: shape, logical axes, sharding, bytes per device.
      decays: name of each array -> whether weight decay applies to it.
      frozen: names of the arrays that are not trained.
    """

    parameters: dict[str, int]
    total_parameters: int
    trained_parameters: int
    devices: int
    mesh: dict[str, int]
    rows: list[ShardingRow]
    decays: dict[str, bool]
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device.

    Attributes:
      parameters: one shard of the parameters.
      ema: one shard of the moving average of the parameters; 0 without one.
      optimizer: one shard of the optimizer state.
      gradients: one shard of the float32 gradients; twice that with microbatches (current gradient and running sum).
      activations: residuals that the forward passes of one microbatch save for the backward pass, and one chunk of
        logits; an estimate from matrix shapes and the rematerialisation policy.
    """

    parameters: int
    ema: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all fields, bytes."""
        return self.parameters + self.ema + self.optimizer + self.gradients + self.activations


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of one training run.

    Attributes:
      layout: parameters and shardings.
      forward_flops_per_token: matmul FLOPs of one forward pass per token.
      train_flops_per_token: matmul FLOPs of one step per token: three times the forward FLOPs for each forward pass of
        the objective, less for frozen weights.
      passes: forward passes per step.
      tokens_per_step: tokens of the main stream in a batch, padding included.
      encoder_tokens_per_step: tokens of the encoder in a batch, padding included.
      memory: bytes per device.
    """

    layout: Layout
    forward_flops_per_token: float
    train_flops_per_token: float
    passes: int
    tokens_per_step: int
    encoder_tokens_per_step: int
    memory: MemoryEstimate

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of one step, over all devices."""
        return self.train_flops_per_token * self.tokens_per_step


def layout(model: Architecture, mesh: MeshSpec, rules: LogicalRules, devices: int | None = None) -> Layout:
    """Returns the layout of the parameters of `model` on `devices` devices (default: the fewest the mesh allows).

    Raises:
      ConfigError: the mesh does not fit this number of devices.
    """
    devices = devices or smallest_device_count(mesh)
    sizes = mesh.sizes(devices)
    axes = model.logical_axes()
    counts = dict(model.count_parameters())
    total = counts.pop("total", sum(counts.values()))
    frozen, rows = model.frozen_arrays(), sharding_table(axes, model.abstract_params(), rules, _abstract_mesh(sizes))
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(value)
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(axes))
    }
    return Layout(
        parameters=counts,
        total_parameters=total,
        trained_parameters=total - sum(math.prod(row.shape) for row in rows if row.name in frozen),
        devices=devices,
        mesh=sizes,
        rows=rows,
        decays={name: decay and name not in frozen for name, decay in decays.items()},
        frozen=tuple(sorted(frozen)),
    )


def _abstract_mesh(sizes: dict[str, int]) -> Any:
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def smallest_device_count(mesh: MeshSpec) -> int:
    """Returns the smallest number of devices that a mesh allows; an axis of size -1 counts as 1."""
    return math.prod(size for size in dataclasses.astuple(mesh) if size != -1)


def estimate(run: TrainRun, devices: int | None = None) -> Estimate:
    """Returns the cost of `run` on `devices` devices (default: the fewest that its mesh allows).

    Raises:
      ConfigError: the mesh does not fit this number of devices.
    """
    placed = layout(run.model, run.mesh, run.rules, devices)
    needs, forward = run.objective.needs(), _forward_flops(run)
    return Estimate(
        layout=placed,
        forward_flops_per_token=forward,
        train_flops_per_token=_train_flops(run),
        passes=needs.passes,
        tokens_per_step=run.batch_size * run.data.row_length,
        encoder_tokens_per_step=run.batch_size * (run.data.encoder_length or 0),
        memory=_memory(run, placed, needs.passes - needs.frozen_passes),
    )


def train_flops_per_step(run: TrainRun) -> float:
    """Returns the matmul FLOPs of one training step over all devices; a backward pass counts as two forward passes."""
    return _train_flops(run) * run.batch_size * run.data.row_length


def _train_flops(run: TrainRun) -> float:
    return train_flops_per_token(run.model, run.objective, run.data.row_length, run.data.encoder_length)


def _forward_flops(run: TrainRun) -> float:
    return run.model.flops_per_token(run.data.row_length, run.data.encoder_length or None)


def _memory(run: TrainRun, placed: Layout, passes: int) -> MemoryEstimate:
    rows, axes = placed.rows, run.model.logical_axes()
    parameters = sum(row.bytes_per_device for row in rows)
    # Gradients are float32 for any parameter dtype.
    frozen = frozenset(placed.frozen)
    gradients = sum(row.bytes_per_device // jnp.dtype(row.dtype).itemsize * 4 for row in rows if row.name not in frozen)
    # Optimizer states have the shapes of parameters, so they get the sharding of a parameter of the same shape.
    share = {row.shape: row.bytes_per_device / (math.prod(row.shape) * jnp.dtype(row.dtype).itemsize) for row in rows}
    rule = run.optimizer.transformation(trained_part(axes, frozen))
    state = jax.eval_shape(rule.init, trained_part(run.model.abstract_params(), frozen))
    optimizer = sum(
        math.ceil(leaf.size * leaf.dtype.itemsize * share.get(tuple(leaf.shape), 1.0))
        for leaf in jax.tree.leaves(state)
    )
    return MemoryEstimate(
        parameters=parameters,
        ema=0 if run.ema_decay is None else parameters,
        optimizer=optimizer,
        gradients=gradients * (1 if run.microbatches == 1 else 2),
        activations=_activations(run, placed.mesh, passes),
    )


def _activations(run: TrainRun, sizes: dict[str, int], passes: int) -> int:
    spec = run.model.spec
    rows = math.ceil(run.batch_size / run.microbatches / batch_divisor(run.rules, _abstract_mesh(sizes)))
    item, tensor = jnp.dtype(spec.dtype).itemsize, sizes["tensor"]
    length = math.ceil(run.data.row_length / sizes["sequence"])
    source = math.ceil((run.data.encoder_length or 0) / sizes["sequence"])
    decoder = spec.num_layers * length * _saved_per_token(spec, run.data.row_length, item, tensor)
    if source:
        decoder += (
            spec.num_layers * length * _saved_per_token(spec, run.data.encoder_length or 0, item, tensor, mlp=False)
        )
        decoder += spec.encoder_layers * source * _saved_per_token(spec, run.data.encoder_length or 0, item, tensor)
    chunk = min(spec.logits_chunk, rows * length)
    # One chunk of logits and its gradient, both float32.
    logits = 2 * 4 * chunk * spec.padded_vocab_size // tensor
    return int(rows * passes * decoder + logits)


def _saved_per_token(spec: TransformerSpec, keys: int, item: int, tensor: int, *, mlp: bool = True) -> float:
    """Returns the bytes per token that one block saves for the backward pass.

    Args:
      spec: the `TransformerSpec`.
      keys: number of tokens that each token attends to.
      item: bytes per element of the compute dtype.
      tensor: size of the tensor-parallel axis.
      mlp: whether the block has a feed-forward layer.
    """
    width = spec.model_dim
    heads = (spec.num_heads * spec.head_dim + 2 * spec.kv_heads * spec.head_dim) / tensor
    gates = 2 if spec.mlp in ("geglu", "swiglu") else 1
    hidden = gates * spec.mlp_dim / tensor if mlp else 0.0
    scores = 4.0 * spec.num_heads * keys / tensor
    outputs = 2 * width + heads + hidden
    saved = {
        "full": width * item,
        "dots_no_batch": (width + outputs) * item,
        "dots": (width + outputs + spec.num_heads * spec.head_dim / tensor) * item + scores,
        # Also norms, activation and gate product, and the float32 softmax in addition to the scores.
        "none": (3 * width + 2 * outputs) * item + 2 * scores,
    }
    return saved[spec.remat]


def describe_rules(rules: LogicalRules) -> dict[str, str]:
    """Returns, as text, the mesh axes that each logical axis is sharded over."""
    found = {}
    for field in dataclasses.fields(rules):
        value = getattr(rules, field.name)
        found[field.name] = "-" if value is None else value if isinstance(value, str) else "+".join(value)
    return found
