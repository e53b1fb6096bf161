"""The kernels of `nn/flash.py`: one tile of scores at a time, with keys as rows and queries as columns.

In this layout, reductions over keys run over sublanes, which is cheap on a TPU, and the running values of each query
(maximum, total, logsumexp) are row vectors. A program handles one head, one tile of queries, one tile of keys and a few
rows of the batch, which share the tile of the bias.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from diffusion_lm.nn.masks import QueryKey, Visibility

LANES = 128
HIDDEN = -1e30
MAXIMUM_FLOOR = -1e29
"""Lower bound of the maximum of a query's scores: the weights of a query without allowed keys underflow to 0."""


class Leaf(NamedTuple):
    """How an array of a visibility is passed to the kernels.

    Attributes:
      pairs: [B|1,T,Q], one value per pair of slots; else two operands, [B,1,Q] and [B,1,T], one value per slot.
      is_bool: whether the array is boolean; it is passed as i32.
    """

    pairs: bool
    is_bool: bool


class Spec(NamedTuple):
    """The static settings of one call of attention.

    Attributes:
      rows: rows of the batch per program.
      tile: number of queries per tile, and of keys.
      num_keys: T, before padding to whole tiles.
      copies: copies of a row that lie next to each other and share the bias of their distances.
      softcap: as in `attention.attend`.
      has_bias: whether there are diagonals.
      leaves: the arrays of the visibility.
      treedef: the visibility without its arrays.
    """

    rows: int
    tile: int
    num_keys: int
    copies: int
    softcap: float | None
    has_bias: bool
    leaves: tuple[Leaf, ...]
    treedef: jax.tree_util.PyTreeDef

    @property
    def leaf_operands(self) -> int:
        """Number of operands for the arrays of the visibility."""
        return sum(1 if leaf.pairs else 2 for leaf in self.leaves)


class _Tile:
    """The scores of one tile, [keys,queries], row by row of the batch."""

    def __init__(self, spec: Spec, q_ref, k_ref, operands: Sequence[Any], query_tile, key_tile):
        self.spec, self.q_ref, self.k_ref = spec, q_ref, k_ref
        self.shape = (spec.tile, spec.tile)
        self.query_tile, self.key_tile = query_tile, key_tile
        self.leaf_refs = operands[: spec.leaf_operands]
        self.diagonals_ref: Any = operands[-1] if spec.has_bias else None
        self.bias = self._bias() if spec.has_bias else None

    def scores(self, row) -> tuple[jax.Array, jax.Array | None]:
        """Returns f32 scores, `HIDDEN` where masked, and the derivative of the soft cap, or None without one."""
        raw = _dot(self.k_ref[row], self.q_ref[row], 1, 1)
        slope = None
        if self.spec.softcap is not None:
            capped = jnp.tanh(raw / self.spec.softcap)
            raw, slope = self.spec.softcap * capped, 1.0 - capped * capped
        if self.bias is not None:
            raw = raw + self.bias
        return jnp.where(self._allowed(row), raw, HIDDEN), slope

    def _allowed(self, row) -> jax.Array:
        """Returns bool[keys,queries]: the visibility of this tile, with padding keys excluded."""
        q_idx = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1) + self.query_tile * self.spec.tile
        kv_idx = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0) + self.key_tile * self.spec.tile
        refs, leaves = iter(self.leaf_refs), []
        for leaf in self.spec.leaves:
            if leaf.pairs:
                ref = next(refs)
                # One matrix for all rows of the batch is stored once.
                pair = ref[jnp.minimum(row, ref.shape[0] - 1)]
                values = (pair, pair)
            else:
                of_queries, of_keys = next(refs)[row], next(refs)[row, 0]
                values = (
                    jnp.broadcast_to(of_queries, self.shape),
                    jnp.broadcast_to(jnp.expand_dims(of_keys, -1), self.shape),
                )
            # Boolean arrays are passed as i32.
            leaves.append(QueryKey(*(value != 0 for value in values)) if leaf.is_bool else QueryKey(*values))
        expression: Visibility = jax.tree.unflatten(self.spec.treedef, leaves)
        return expression.mask_mod(q_idx, kv_idx, self.spec.num_keys) & (kv_idx < self.spec.num_keys)

    @property
    def window(self) -> Any:
        """The slice of the diagonals that this tile needs: 2 * `tile` of them, from the largest distance down.

        Diagonal i of 2L is the bias of key - query = L - i. Entry [c, r] of the tile is number `tile` + r - c of the
        slice.
        """
        spec, length = self.spec, self.diagonals_ref.shape[-1] // 2
        query, key = self.query_tile * spec.tile, self.key_tile * spec.tile
        for copy in range(1, spec.copies):
            query = query - jnp.where(self.query_tile * spec.tile >= copy * length, length, 0)
            key = key - jnp.where(self.key_tile * spec.tile >= copy * length, length, 0)
        return pl.ds(pl.multiple_of(length - spec.tile - key + query, LANES), 2 * spec.tile)

    def _bias(self) -> jax.Array:
        # Row c of the tile is the slice shifted by c: one strided roll instead of a gather.
        tile = self.spec.tile
        diagonals = jnp.broadcast_to(self.diagonals_ref[:, self.window], (tile, 2 * tile))
        return pltpu.roll(diagonals, 0, 1, stride=1, stride_axis=0)[:, tile:]


def forward(occupied_ref, q_ref, k_ref, v_ref, *refs, spec: Spec) -> None:
    """Grid: head, rows, query tile, key tile. FlashAttention's accumulation over key tiles (arXiv 2205.14135)."""
    *operands, out_ref, logsumexp_ref, maximum_ref, total_ref, sum_ref = refs
    at = (pl.program_id(1), pl.program_id(2), pl.program_id(3))

    @pl.when(at[2] == 0)
    def _():
        maximum_ref[...] = jnp.full_like(maximum_ref, MAXIMUM_FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(occupied_ref[at] > 0)
    def _():
        tile = _Tile(spec, q_ref, k_ref, operands, at[1], at[2])

        def add(row, _):
            scores, _ = tile.scores(row)
            before = maximum_ref[row]
            maximum = jnp.maximum(before, scores.max(axis=0, keepdims=True))
            # What earlier tiles have summed is rescaled to the new maximum.
            weights, rescale = jnp.exp(scores - maximum), jnp.exp(before - maximum)
            maximum_ref[row] = maximum
            total_ref[row] = rescale * total_ref[row] + weights.sum(axis=0, keepdims=True)
            value = v_ref[row]
            sum_ref[row] = rescale * sum_ref[row] + _dot(value, weights.astype(value.dtype), 0, 0)
            return 0

        jax.lax.fori_loop(0, spec.rows, add, 0)

    @pl.when(at[2] == pl.num_programs(3) - 1)
    def _():
        def write(row, _):
            total = total_ref[row]
            # A query without allowed keys gets 0.
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out_ref[row] = (sum_ref[row] / total).T.astype(out_ref.dtype)
            logsumexp_ref[row] = jnp.where(some, maximum_ref[row] + jnp.log(total), 0.0)
            return 0

        jax.lax.fori_loop(0, spec.rows, write, 0)


def backward_queries(occupied_ref, q_ref, k_ref, v_ref, do_ref, logsumexp_ref, delta_ref, *refs, spec: Spec) -> None:
    """Grid: head, rows, query tile, key tile. dQ (arXiv 2307.08691, algorithm 2)."""
    *operands, dq_ref, sum_ref = refs
    at = (pl.program_id(1), pl.program_id(2), pl.program_id(3))

    @pl.when(at[2] == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(occupied_ref[at] > 0)
    def _():
        tile = _Tile(spec, q_ref, k_ref, operands, at[1], at[2])

        def add(row, _):
            _, d_scores, slope = _differentiated(tile, row, v_ref, do_ref, logsumexp_ref, delta_ref)
            d_scores = d_scores if slope is None else d_scores * slope
            key = k_ref[row]
            sum_ref[row] += _dot(key, d_scores.astype(key.dtype), 0, 0)
            return 0

        jax.lax.fori_loop(0, spec.rows, add, 0)

    @pl.when(at[2] == pl.num_programs(3) - 1)
    def _():
        def write(row, _):
            dq_ref[row] = sum_ref[row].T.astype(dq_ref.dtype)
            return 0

        jax.lax.fori_loop(0, spec.rows, write, 0)


def backward_keys(occupied_ref, q_ref, k_ref, v_ref, do_ref, logsumexp_ref, delta_ref, *refs, spec: Spec) -> None:
    """Grid: head, rows, key tile, query tile. dK and dV of each query head, and the gradient of the diagonals."""
    operands, outputs = refs[: spec.leaf_operands + spec.has_bias], refs[spec.leaf_operands + spec.has_bias :]
    dk_ref, dv_ref, *of_bias = outputs
    *of_bias, k_sum_ref, v_sum_ref = of_bias
    rows, key_tile, query_tile = pl.program_id(1), pl.program_id(2), pl.program_id(3)

    @pl.when(query_tile == 0)
    def _():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    if spec.has_bias:
        d_diagonals_ref, d_bias_ref = of_bias

        # The gradient of the diagonals is summed over the whole grid of a head.
        @pl.when((rows == 0) & (key_tile == 0) & (query_tile == 0))
        def _():
            d_diagonals_ref[...] = jnp.zeros_like(d_diagonals_ref)

    @pl.when(occupied_ref[rows, query_tile, key_tile] > 0)
    def _():
        tile = _Tile(spec, q_ref, k_ref, operands, query_tile, key_tile)
        if spec.has_bias:
            d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

        def add(row, _):
            weights, d_scores, slope = _differentiated(tile, row, v_ref, do_ref, logsumexp_ref, delta_ref)
            if spec.has_bias:
                d_bias_ref[...] += d_scores
            d_scores = d_scores if slope is None else d_scores * slope
            query, cotangent = q_ref[row], do_ref[row]
            v_sum_ref[row] += _dot(weights.astype(cotangent.dtype), cotangent, 1, 0)
            k_sum_ref[row] += _dot(d_scores.astype(query.dtype), query, 1, 0)
            return 0

        jax.lax.fori_loop(0, spec.rows, add, 0)
        if spec.has_bias:
            d_diagonals_ref[:, tile.window] += _diagonal_sums(d_bias_ref[...])

    @pl.when(query_tile == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = k_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = v_sum_ref[...].astype(dv_ref.dtype)


def _differentiated(tile: _Tile, row, v_ref, do_ref, logsumexp_ref, delta_ref):
    """Returns the weights, the gradient of the scores after cap and bias, and the slope of the cap or None."""
    scores, slope = tile.scores(row)
    weights = jnp.exp(scores - logsumexp_ref[row])
    d_weights = _dot(v_ref[row], do_ref[row], 1, 1)
    return weights, weights * (d_weights - delta_ref[row]), slope


def _diagonal_sums(tile: jax.Array) -> jax.Array:
    """Returns f32[1,2*tile], the sums of the tile's diagonals, numbered as in `_Tile.window`.

    Row c must be shifted left by c before the rows are added. The lower half of the rows is shifted by half their
    number and added to the upper half, until one row is left.
    """
    rows, length = tile.shape[0], 2 * tile.shape[0]
    sums = jnp.concatenate([jnp.zeros_like(tile), tile], axis=1)
    while rows > 1:
        rows //= 2
        sums = sums[:rows] + pltpu.roll(sums[rows:], length - rows, 1)
    return sums


def _dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """Returns the f32 product of two matrices, contracted over an axis of each."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
