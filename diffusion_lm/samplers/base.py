"""The interface of samplers and what all of them share: the window, where a target ends, checks of settings."""

from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.real_tokens import text_tokens
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.nn.named_masks import BLOCK_NAMES, VISIBILITY_NAMES, is_visibility
from diffusion_lm.noise.contract import Contract

Model = Any
"""A `BoundModel` (architectures/base.py): an architecture with its parameters. Tests hand in tables instead."""


class Sampler(Protocol):
    """A frozen dataclass, configured by one gin file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __hash__(self) -> int: ...

    @property
    def contract(self) -> Contract:
        """What it decodes; `noise.contract.mismatches` compares it with what a network was trained for."""
        ...

    def generate(self, model: Model, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target window of each row.

        Args:
          model: the network with its parameters.
          prompt: conditioning, then a window of target slots (`target_mask`) that holds PAD; rows may differ in the
            length of both and are padded on the right. Never packed.
          keys: the draws of a row depend on these and on its `row_ids` alone, never on its neighbours.

        Returns:
          The decoded rows; jit-able as one program.
        """
        ...


@flax.struct.dataclass
class Window:
    """The target windows of a prompt batch.

    Attributes:
      starts: i32[B], the first target slot of each row.
      sizes: i32[B], how many target slots follow; 0 for a row that only fills up the batch.
    """

    starts: jax.Array
    sizes: jax.Array

    @classmethod
    def of(cls, prompt: Batch) -> "Window":
        """Returns the windows of `prompt`."""
        return cls(
            starts=jnp.argmax(prompt.target_mask, axis=1).astype(jnp.int32),
            sizes=jnp.sum(prompt.target_mask, axis=1, dtype=jnp.int32),
        )


def emptied(prompt: Batch, pad_id: int) -> jax.Array:
    """Returns the prompt's tokens with PAD in the whole target window, so that no reference text can leak."""
    return jnp.where(prompt.target_mask, pad_id, prompt.tokens)


def ended_before(tokens: jax.Array, target_mask: jax.Array, eos_id: int, pad_id: int) -> jax.Array:
    """Returns i32[B,T], how many EOS or PAD tokens the target has before each slot."""
    ends = (target_mask & ((tokens == eos_id) | (tokens == pad_id))).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def cut_at_end(tokens: jax.Array, target_mask: jax.Array, eos_id: int, pad_id: int) -> jax.Array:
    """Returns the tokens with PAD after the first EOS or PAD of each target; that EOS itself stays."""
    return jnp.where(target_mask & (ended_before(tokens, target_mask, eos_id, pad_id) > 0), pad_id, tokens)


def target_lengths(tokens: jax.Array, target_mask: jax.Array, eos_id: int, pad_id: int) -> jax.Array:
    """Returns i32[B], the generated tokens before the first EOS or PAD, which do not count (trap T55)."""
    cut = cut_at_end(tokens, target_mask, eos_id, pad_id)
    return jnp.sum(text_tokens(cut, target_mask, pad_id, eos_id), axis=1, dtype=jnp.int32)


def check_choice(value: str, choices: tuple[str, ...], where: str) -> None:
    """Raises `ConfigError` unless `value` is one of `choices`."""
    require(value in choices, f"{value!r} is not known here", where=where, fix=f"Choose one of {', '.join(choices)}.")


def check_draw(temperature: float, top_k: int, top_p: float, where: str) -> None:
    """Raises `ConfigError` for impossible settings of a categorical draw."""
    require(
        temperature >= 0,
        f"temperature = {temperature} is negative",
        where=f"{where}.temperature",
        fix="0.0 takes the most likely token.",
    )
    require(
        top_k >= 0 and int(top_k) == top_k,
        f"top_k = {top_k} is no number of tokens",
        where=f"{where}.top_k",
        fix="0 keeps all tokens.",
    )
    require(0 < top_p <= 1, f"top_p = {top_p} lies outside (0, 1]", where=f"{where}.top_p", fix="1.0 keeps all tokens.")


def check_visibility(value: str, where: str) -> None:
    """Raises `ConfigError` unless `value` names a visibility."""
    if not is_visibility(value):
        check_choice(value, (*VISIBILITY_NAMES, *BLOCK_NAMES), where)
