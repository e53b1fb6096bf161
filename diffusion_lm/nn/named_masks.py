"""The attention visibilities that configurations select by name."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import ConfigError, near_names, require
from diffusion_lm.core.segments import segment_sum
from diffusion_lm.nn.masks import BlindConditioning, Block, Causal, Conditioning, Full, Groups, Visibility

VISIBILITY_NAMES = ("causal", "full", "prefix", "prefix_blind", "causal_prefix")
BLOCK_NAMES = ("blocks:N", "example_blocks:N")
_BLOCKS = re.compile(r"(example_)?blocks:([1-9][0-9]*)")


class NamedBlocks(NamedTuple):
    """The parsed name of a block visibility.

    Attributes:
      size: tokens per block.
      first_block: where block 0 starts: "target", at the first target slot, or "example", at slot 0.
    """

    size: int
    first_block: str

    def starts(self, target_mask: jax.Array) -> jax.Array:
        """Returns i32[B], the slot at which block 0 of each row starts."""
        if self.first_block == "example":
            return jnp.zeros(target_mask.shape[0], jnp.int32)
        return jnp.argmax(target_mask, axis=1).astype(jnp.int32)


def named_blocks(name: str) -> NamedBlocks | None:
    """Returns the parsed name of a block visibility, or None for any other name."""
    match = _BLOCKS.fullmatch(str(name))
    return NamedBlocks(int(match[2]), "example" if match[1] else "target") if match else None


def is_visibility(name: str) -> bool:
    """Says whether `named_visibility` knows `name`."""
    return name in VISIBILITY_NAMES or named_blocks(name) is not None


def check_visibility(name: str, where: str) -> None:
    """Raises `ConfigError` unless `name` is a visibility; `where` is the gin parameter."""
    require(
        is_visibility(name),
        f"visibility={name!r}: not one of the choices{near_names(str(name), VISIBILITY_NAMES)}",
        where=where,
        fix=f"Use one of {', '.join((*VISIBILITY_NAMES, *BLOCK_NAMES))}.",
    )


def noise_share(noisy: jax.Array, target_mask: jax.Array, visibility: str) -> jax.Array:
    """Returns f32[B,T], the fraction of target tokens that are noise, per row or per block of a block visibility.

    Args:
      noisy: bool[B,T].
      target_mask: bool[B,T], as in `named_visibility`.
      visibility: name of the visibility.
    """
    blocks = named_blocks(visibility)
    ids = jnp.zeros(target_mask.shape, jnp.int32)
    if blocks is not None:
        place = jnp.arange(target_mask.shape[1])[None] - blocks.starts(target_mask)[:, None]
        ids = jnp.maximum(place, 0) // blocks.size
    # A row or block without target tokens has the fraction 0.
    total = segment_sum(target_mask.astype(jnp.float32), ids)
    return segment_sum((noisy & target_mask).astype(jnp.float32), ids) / jnp.maximum(total, 1.0)


def named_visibility(name: str, target_mask: jax.Array) -> Visibility:
    """Returns the visibility of a name.

    Args:
      name: "causal" (left to right), "full" (bidirectional), "prefix" (bidirectional over the conditioning, causal
        over the target), "prefix_blind" (bidirectional, but conditioning does not attend to the target) or
        "causal_prefix" (causal over the conditioning, whose hidden states equal those of an autoregressive pass, and
        bidirectional over the target). For decoders of block diffusion: "blocks:N" and "example_blocks:N", where a
        token attends to its own block of N tokens and to earlier blocks. "blocks" start at the first target token,
        with the conditioning as one block before them. "example_blocks" start at the first token of the row, so one
        block may hold the end of the conditioning and the beginning of the target.
      target_mask: bool[B,T], as in `Batch`; rows must not be packed if there are blocks.

    Raises:
      ConfigError: for any other name.
    """
    match name:
        case "causal":
            return Causal()
        case "full":
            return Full()
        case "prefix":
            return Causal() | Conditioning(~target_mask)
        case "prefix_blind":
            return Full() & BlindConditioning(~target_mask)
        case "causal_prefix":
            # Conditioning slots are groups in their order; all target slots share the last group.
            length = target_mask.shape[1]
            return Groups(jnp.where(target_mask, length, jnp.arange(length)), "not_later")
    blocks = named_blocks(name)
    if blocks is not None:
        return Block(blocks.size, blocks.starts(target_mask))
    raise ConfigError(
        f"visibility={name!r}: there is no such visibility{near_names(name, VISIBILITY_NAMES)}",
        where="visibility",
        fix=f"Use one of {', '.join((*VISIBILITY_NAMES, *BLOCK_NAMES))}.",
    )
