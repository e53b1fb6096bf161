"""The mask of one attention layer together with its relative position bias, as one type with two representations.

Implementations that hold all scores read arrays (`DenseMask`). Kernels that compute scores tile by tile evaluate the
visibility themselves (`SymbolicMask`). The layout of the bias belongs to the representation, so the two cannot be
mixed up.
"""

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.nn.embeddings import relative_bias, relative_diagonals, toeplitz
from diffusion_lm.nn.masks import Rows, Visibility


class AttentionMask:
    """Which keys each query attends to, and the bias of its scores. Base of `DenseMask` and `SymbolicMask`."""

    def dense(self) -> "DenseMask":
        """Returns the same mask as arrays."""
        raise NotImplementedError

    def restrict(self, visibility: Visibility) -> "AttentionMask":
        """Returns the mask of the pairs that `visibility` allows too; the bias stays."""
        raise NotImplementedError

    def where(self, condition: jax.Array, other: "AttentionMask") -> "AttentionMask":
        """Returns this mask if bool[] `condition` holds, else `other`, which has the same representation and bias."""
        raise NotImplementedError

    def with_relative_bias(self, table: jax.Array, *, bidirectional: bool, max_distance: int) -> "AttentionMask":
        """Returns the mask with T5's relative position bias; arguments as in `embeddings.relative_bias`."""
        raise NotImplementedError


@flax.struct.dataclass
class DenseMask(AttentionMask):
    """A mask written out for every pair of a query and a key.

    Attributes:
      allowed: bool[B|1,Q,T], True where the query attends to the key.
      bias: f32[B|1,H,Q,T], added to the scores; None = no bias.
      q_idx: i32[B,Q], the slots of the queries, for relative distances; None = all slots in order.
      copies: copies of a row that lie next to each other and share their distances; static.
    """

    allowed: jax.Array
    bias: jax.Array | None = None
    q_idx: jax.Array | None = None
    copies: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def of(cls, visibility: Visibility, q_idx: jax.Array | None, num_keys: int) -> "DenseMask":
        """Evaluates a visibility for the queries at `q_idx`, over T = `num_keys` keys."""
        return cls(visibility.dense(q_idx, num_keys), q_idx=q_idx, copies=visibility.copies)

    def dense(self) -> "DenseMask":
        """Returns the mask itself."""
        return self

    def restrict(self, visibility: Visibility) -> "DenseMask":
        """Returns the mask of the pairs that `visibility` allows too."""
        allowed = self.allowed & visibility.dense(self.q_idx, self.allowed.shape[-1])
        return self.replace(allowed=allowed)  # type: ignore[attr-defined]

    def where(self, condition: jax.Array, other: AttentionMask) -> "DenseMask":
        """Returns one of two masks, chosen at run time."""
        assert isinstance(other, DenseMask)
        return self.replace(allowed=jnp.where(condition, self.allowed, other.allowed))  # type: ignore[attr-defined]

    def with_relative_bias(self, table: jax.Array, *, bidirectional: bool, max_distance: int) -> "DenseMask":
        """Returns the mask with the bias f32[B|1,H,Q,T]."""
        length = self.allowed.shape[-1] // self.copies
        bias = relative_bias(table, self.q_idx, length, bidirectional=bidirectional, max_distance=max_distance)
        # The same slot of two copies has distance 0, so every pair of copies has the same bias.
        bias = jnp.tile(bias, (1, 1, self.copies, self.copies)) if self.copies > 1 else bias
        return self.replace(bias=bias)  # type: ignore[attr-defined]


@flax.struct.dataclass
class SymbolicMask(AttentionMask):
    """A mask as an expression that the attention kernel evaluates; queries and keys are all T slots in order.

    Attributes:
      visibility: which slots attend to which.
      length: T; static.
      diagonals: f32[H,2L], L = T / copies: the bias of each relative distance (`embeddings.relative_diagonals`), shared
        by all copies of a row; None = no bias.
    """

    visibility: Visibility
    length: int = flax.struct.field(pytree_node=False)
    diagonals: jax.Array | None = None

    def dense(self) -> DenseMask:
        """Evaluates visibility and bias for all pairs of slots."""
        copies, bias = self.visibility.copies, None
        if self.diagonals is not None:
            bias = jnp.tile(toeplitz(self.diagonals), (copies, copies))[None]
        return DenseMask(self.visibility.dense(None, self.length), bias, copies=copies)

    def restrict(self, visibility: Visibility) -> "SymbolicMask":
        """Returns the mask of the pairs that `visibility` allows too."""
        return self.replace(visibility=self.visibility & visibility)  # type: ignore[attr-defined]

    def where(self, condition: jax.Array, other: AttentionMask) -> "SymbolicMask":
        """Returns an expression that equals one of the two, chosen at run time."""
        assert isinstance(other, SymbolicMask)
        # A kernel cannot branch between expressions, but it can evaluate a flag that is the same for all pairs.
        this, rest = self.visibility & Rows(condition[None]), other.visibility & Rows(~condition[None])
        return self.replace(visibility=this | rest)  # type: ignore[attr-defined]

    def with_relative_bias(self, table: jax.Array, *, bidirectional: bool, max_distance: int) -> "SymbolicMask":
        """Returns the mask with the bias as diagonals."""
        length = self.length // self.visibility.copies
        diagonals = relative_diagonals(table, length, bidirectional=bidirectional, max_distance=max_distance)
        return self.replace(diagonals=diagonals)  # type: ignore[attr-defined]
