"""Flash attention for TPUs with any visibility and with T5's bias; neither scores nor masks are stored.

JAX's splash attention needs masks that are known at compile time, and has no bias. Here the kernel evaluates the
visibility expression of `nn/masks.py` from one value per slot, so that the prefix may end at a different slot in every
row. T5's relative bias is read from its diagonals. Tiles without any allowed pair are skipped. On other platforms
`nn/attention.py` computes the same function densely.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffusion_lm.nn import flash_kernels
from diffusion_lm.nn.flash_kernels import LANES, Leaf, Spec
from diffusion_lm.nn.masks import Visibility

TILES = (512, 256, 128)
"""Tile sizes, for queries and keys: the first that divides the row length, padded to whole lanes, is used."""
ROWS = 4
"""Maximum number of rows of the batch that share a tile of the bias."""


def fits(length: int, copies: int, has_bias: bool) -> bool:
    """Whether rows can be cut into tiles: copies with a bias must be whole lanes long; all else can be padded."""
    return not has_bias or copies == 1 or length // copies % LANES == 0


def flash_forward(
    q_BQHE: jax.Array,
    k_BTKE: jax.Array,
    v_BTKE: jax.Array,
    visibility: Visibility,
    diagonals: jax.Array | None = None,
    *,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `attention.attend`, [B,T,H,E], and f32[B,H,T], the logsumexp of each query's scores.

    Args:
      q_BQHE: queries, scaled; [B,T,H,E].
      k_BTKE: keys, K dividing H.
      v_BTKE: values.
      visibility: which of the T slots attend to which.
      diagonals: f32[H,2L], L = T / copies, or None: see `embeddings.relative_diagonals`.
      softcap: as in `attend`.
      interpret: run the kernel as plain JAX, on any platform.
    """
    call = _Call.of(q_BQHE, k_BTKE, visibility, diagonals, softcap, interpret)
    B, H, T, E = call.q_shape
    rows, tile = call.spec.rows, call.spec.tile
    out, logsumexp = call.run(
        flash_kernels.forward,
        keys_first=False,
        inputs=[("q", q_BQHE), ("k", k_BTKE), ("k", v_BTKE)],
        outputs=[("q", (B, H, T, E), v_BTKE.dtype), ("row", (B, H, 1, T), jnp.float32)],
        scratch=[(rows, 1, tile), (rows, 1, tile), (rows, E, tile)],
    )
    length = q_BQHE.shape[1]
    return jnp.moveaxis(out[:, :, :length], 1, 2), logsumexp[:, :, 0, :length]


def flash_backward(
    q_BQHE: jax.Array,
    k_BTKE: jax.Array,
    v_BTKE: jax.Array,
    visibility: Visibility,
    diagonals: jax.Array | None,
    out_BQHE: jax.Array,
    logsumexp_BHQ: jax.Array,
    cotangent_BQHE: jax.Array,
    *,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Returns the gradients of queries, keys, values and diagonals; arguments as in `flash_forward`."""
    call = _Call.of(q_BQHE, k_BTKE, visibility, diagonals, softcap, interpret)
    B, H, T, E = call.q_shape
    rows, tile, length = call.spec.rows, call.spec.tile, q_BQHE.shape[1]
    delta_BHQ = jnp.einsum("BQHE,BQHE->BHQ", out_BQHE, cotangent_BQHE, preferred_element_type=jnp.float32)
    inputs = [
        ("q", q_BQHE),
        ("k", k_BTKE),
        ("k", v_BTKE),
        ("q", cotangent_BQHE),
        ("row", logsumexp_BHQ),
        ("row", delta_BHQ),
    ]
    (dq,) = call.run(
        flash_kernels.backward_queries,
        keys_first=False,
        inputs=inputs,
        outputs=[("q", (B, H, T, E), q_BQHE.dtype)],
        scratch=[(rows, E, tile)],
    )
    outputs: list[Any] = [("head_k", (B, H, T, E), k_BTKE.dtype), ("head_k", (B, H, T, E), v_BTKE.dtype)]
    scratch: list[tuple[int, ...]] = [(rows, tile, E), (rows, tile, E)]
    if diagonals is not None:
        assert call.diagonals is not None
        outputs.append(("diagonals", call.diagonals.shape, jnp.float32))
        scratch.insert(0, (tile, tile))
    dk, dv, *rest = call.run(
        flash_kernels.backward_keys, keys_first=True, inputs=inputs, outputs=outputs, scratch=scratch
    )

    def of_keys(gradient: jax.Array, like: jax.Array) -> jax.Array:
        K = like.shape[2]
        grouped = gradient.reshape(B, K, H // K, T, E).sum(2, dtype=jnp.float32)
        return jnp.moveaxis(grouped[:, :, :length], 1, 2).astype(like.dtype)

    d_diagonals = call.of_diagonals(rest[0]) if diagonals is not None else None
    return jnp.moveaxis(dq[:, :, :length], 1, 2), of_keys(dk, k_BTKE), of_keys(dv, v_BTKE), d_diagonals


class _Call(NamedTuple):
    """One call of attention, with operands in the layout of the kernels.

    Attributes:
      spec: the static settings.
      q_shape: (B, H, T, E), with T padded to whole tiles.
      group: number of query heads that share a key/value head.
      occupied: i32[B / rows, T / tile, T / tile], queries first; 1 if any pair of the tile is allowed.
      leaves: the arrays of the visibility as kernel operands, each with its kind (a key of `_block`).
      diagonals: f32[H,1,2T] in the order of the kernels, or None.
      of_diagonals: maps a gradient of `diagonals` to the gradient of the caller's diagonals.
      interpret: run the kernels as plain JAX.
    """

    spec: Spec
    q_shape: tuple[int, int, int, int]
    group: int
    occupied: jax.Array
    leaves: list[tuple[str, jax.Array]]
    diagonals: jax.Array | None
    of_diagonals: Callable[[jax.Array], jax.Array]
    interpret: bool

    @classmethod
    def of(cls, q_BQHE, k_BTKE, visibility, diagonals, softcap, interpret) -> "_Call":
        """Chooses the tile sizes and converts the operands."""
        (B, length, H, E), copies = q_BQHE.shape, visibility.copies
        whole = -(-length // LANES) * LANES
        # A tile with a bias must lie inside one copy, because distances jump at the border of two copies.
        divided = whole if diagonals is None else whole // copies
        tile = next(tile for tile in TILES if divided % tile == 0)
        rows = next(rows for rows in range(min(ROWS, B), 0, -1) if B % rows == 0)
        leaves, treedef = jax.tree.flatten(visibility)
        allowed = jnp.broadcast_to(visibility.dense(None, length), (B, length, length))
        allowed = jnp.pad(allowed, ((0, 0), (0, whole - length), (0, whole - length)))
        # Computed densely once per call; the kernels then skip tiles in which nothing is allowed.
        tiles = whole // tile
        occupied = allowed.reshape(B // rows, rows, tiles, tile, tiles, tile).any((1, 3, 5)).astype(jnp.int32)
        spec = Spec(
            rows=rows,
            tile=tile,
            num_keys=length,
            copies=copies,
            softcap=softcap,
            has_bias=diagonals is not None,
            leaves=tuple(Leaf(leaf.ndim == 3, leaf.dtype == jnp.bool_) for leaf in leaves),
            treedef=treedef,
        )
        prepared = [operand for leaf in leaves for operand in _leaf_operands(leaf, B, length, whole)]
        shape, group = (B, H, whole, E), H // k_BTKE.shape[2]
        reordered, transpose = jax.vjp(lambda one: _kernel_order(one, whole // copies), diagonals)
        return cls(spec, shape, group, occupied, prepared, reordered, lambda one: transpose(one)[0], interpret)

    def run(self, kernel, *, keys_first: bool, inputs, outputs, scratch) -> Any:
        """Calls a kernel.

        Args:
          kernel: a function of `flash_kernels`.
          keys_first: the grid's inner loop runs over queries instead of keys.
          inputs: pairs of a kind (a key of `_block`) and an array in the caller's layout.
          outputs: triples of a kind, shape and dtype.
          scratch: shapes of f32 scratch buffers.
        """
        B, H, whole, _ = self.q_shape
        tiles = whole // self.spec.tile
        operands = [(kind, _heads_first(array, whole)) for kind, array in inputs] + self.leaves
        if self.diagonals is not None:
            operands.append(("diagonals", self.diagonals))
        return pl.pallas_call(
            functools.partial(kernel, spec=self.spec),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(H, B // self.spec.rows, tiles, tiles),
                in_specs=[self._block(kind, array.shape, keys_first) for kind, array in operands],
                out_specs=[self._block(kind, shape, keys_first) for kind, shape, _ in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")
            ),
            interpret=self.interpret,
            name=f"flash_{kernel.__name__}",
        )(self.occupied, *(array for _, array in operands))

    def _block(self, kind: str, shape: tuple[int, ...], keys_first: bool) -> pl.BlockSpec:
        rows, tile, group = self.spec.rows, self.spec.tile, self.group
        one = shape[0] == 1  # one matrix for all rows of the batch
        block, index = {
            "q": ((rows, None, tile, shape[-1]), lambda h, b, i, j: (b, h, i, 0)),
            "k": ((rows, None, tile, shape[-1]), lambda h, b, i, j: (b, jax.lax.div(h, group), j, 0)),
            "head_k": ((rows, None, tile, shape[-1]), lambda h, b, i, j: (b, h, j, 0)),
            "row": ((rows, None, 1, tile), lambda h, b, i, j: (b, h, 0, i)),
            "slots_q": ((rows, 1, tile), lambda h, b, i, j: (b, 0, i)),
            "slots_k": ((rows, 1, tile), lambda h, b, i, j: (b, 0, j)),
            "pairs": ((1 if one else rows, tile, tile), lambda h, b, i, j: (0 if one else b, j, i)),
            "diagonals": ((None, 1, shape[-1]), lambda h, b, i, j: (h, 0, 0)),
        }[kind]
        if keys_first:
            return pl.BlockSpec(block, lambda h, b, j, i, _: index(h, b, i, j))
        return pl.BlockSpec(block, lambda h, b, i, j, _: index(h, b, i, j))


def _heads_first(array: jax.Array, whole: int) -> jax.Array:
    """Returns [B,H,whole,E] from [B,T,H,E], and [B,H,1,whole] from [B,H,T], padded with zeros."""
    if array.ndim == 3:
        return jnp.pad(array, ((0, 0), (0, 0), (0, whole - array.shape[2])))[:, :, None]
    return jnp.pad(jnp.moveaxis(array, 1, 2), ((0, 0), (0, 0), (0, whole - array.shape[1]), (0, 0)))


def _leaf_operands(leaf: jax.Array, batch: int, length: int, whole: int) -> list[tuple[str, jax.Array]]:
    """Returns an array of a visibility as operands: per row or slot for queries and keys, per pair with keys first."""
    leaf, fill = leaf.astype(jnp.int32), (0, whole - length)
    if leaf.ndim == 3:
        return [("pairs", jnp.pad(jnp.swapaxes(leaf, 1, 2), ((0, 0), fill, fill)))]
    if leaf.ndim == 1:
        leaf = leaf[:, None]
    slots = jnp.pad(jnp.broadcast_to(leaf, (batch, length)), ((0, 0), fill))[:, None]
    return [("slots_q", slots), ("slots_k", slots)]


def _kernel_order(diagonals: jax.Array | None, whole: int) -> jax.Array | None:
    """Returns f32[H,1,2*whole]: entry i is the bias of key - query = whole - i, and 0 for padding.

    Args:
      diagonals: f32[H,2L], distances 0 to L - 1, then -L to -1; or None.
      whole: slots of a copy, padded.
    """
    if diagonals is None:
        return None
    length = diagonals.shape[1] // 2
    # From the largest distance down to the smallest.
    falling = jnp.concatenate([diagonals[:, length - 1 :: -1], diagonals[:, :length:-1]], axis=1)
    return jnp.pad(falling, ((0, 0), (whole - length + 1, whole - length)))[:, None]
