"""From hidden states to losses and token statistics without ever holding [B,T,V].

Chunks run along T, so that rows stay on the devices that hold them. The backward pass computes each chunk's logits
again: at 256,000 tokens they are the largest array of a step by far.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.types import TokenStats
from diffusion_lm.nn import sampling

NEVER = -1e30
"""Logit of a token that is never emitted: exp underflows to 0, and products with 0 stay finite unlike with -inf."""


class Head(flax.struct.PyTreeNode):
    """The output projection: logits = scale * h W^T + bias.

    Attributes:
      weight_VD: [padded V,D].
      bias_V: [padded V] or None.
      scale: static factor; 1/sqrt(D) where the weights are the input embedding of the T5 family.
      vocab_size: static; rows from here on only pad the matrix and are never emitted.
      softcap: static; logits become softcap * tanh(logits / softcap).
    """

    weight_VD: jax.Array
    bias_V: jax.Array | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    vocab_size: int = flax.struct.field(pytree_node=False, default=0)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class NllTerms:
    """Per-token parts of the training losses, in nats.

    Attributes:
      nll: f32[B,T], -log p(target).
      log_z: f32[B,T], logarithm of the partition function; z-loss is its square.
      uniform_nll: f32[B,T], mean of -log p over the real vocabulary; label smoothing mixes it in.
    """

    nll: jax.Array
    log_z: jax.Array
    uniform_nll: jax.Array


def logits(hidden_BTD: jax.Array, head: Head, forbidden: tuple[int, ...] = ()) -> jax.Array:
    """Returns f32[B,T,padded V]; the padding rows and `forbidden` ids have the logit `NEVER`."""
    scaled = hidden_BTD if head.scale == 1.0 else hidden_BTD * jnp.asarray(head.scale, hidden_BTD.dtype)
    weight_VD = head.weight_VD.astype(hidden_BTD.dtype)
    out = jnp.einsum("BTD,VD->BTV", scaled, weight_VD, preferred_element_type=jnp.float32)
    if head.bias_V is not None:
        out = out + head.bias_V.astype(jnp.float32)
    if head.softcap is not None:
        out = head.softcap * jnp.tanh(out / head.softcap)
    padded = head.weight_VD.shape[0]
    if head.vocab_size < padded or forbidden:
        ids = jnp.arange(padded)
        never = ids >= head.vocab_size
        for token in forbidden:
            never |= ids == token
        out = jnp.where(never, NEVER, out)
    return out


def chunked_nll(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, chunk_tokens: int) -> jax.Array:
    """Returns -log p(target) as f32[B,T].

    Args:
      hidden_BTD: after the final norm, in the compute dtype.
      head: the output projection.
      targets_BT: i32[B,T], ids below the vocabulary's size.
      chunk_tokens: most tokens whose logits may be held at a time; static.
    """

    def chunk(head, hidden_BTD, targets_BT):
        return _nll(logits(hidden_BTD, head), targets_BT)

    return _over_chunks(chunk, head, (hidden_BTD, targets_BT), chunk_tokens)


def chunked_nll_terms(hidden_BTD: jax.Array, head: Head, targets_BT: jax.Array, chunk_tokens: int) -> NllTerms:
    """Returns the parts from which z-loss and label smoothing are made; arguments as in `chunked_nll`."""

    def chunk(head, hidden_BTD, targets_BT):
        logits_BTV = logits(hidden_BTD, head)
        log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
        mean_logit = logits_BTV[..., : head.vocab_size].mean(axis=-1)
        return NllTerms(_nll(logits_BTV, targets_BT), log_z, log_z - mean_logit)

    return _over_chunks(chunk, head, (hidden_BTD, targets_BT), chunk_tokens)


def chunked_token_stats(
    hidden_BTD: jax.Array,
    head: Head,
    chunk_tokens: int,
    *,
    keys_BT: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    score: jax.Array | None = None,
    forbidden: tuple[int, ...] = (),
) -> TokenStats:
    """Returns per-token summaries of the distribution.

    Args:
      hidden_BTD: after the final norm, in the compute dtype.
      head: the output projection.
      chunk_tokens: most tokens whose logits may be held at a time; static.
      keys_BT: one typed PRNG key per token; needed where temperature > 0.
      temperature: 0 takes the most likely token; static, as are the next two.
      top_k: draws among the k most likely tokens; 0 = all.
      top_p: draws from the smallest set of tokens whose mass reaches p, after temperature and top_k.
      score: i32[B,T], tokens whose log-probability is wanted.
      forbidden: ids that are never emitted (MASK, for one). Log-probabilities are renormalised without them, but not
        tempered and not filtered.

    Raises:
      ValueError: temperature > 0 without keys.
    """
    if temperature > 0 and keys_BT is None:
        raise ValueError("token_stats needs keys_BT where temperature > 0")

    def chunk(head, hidden_BTD, keys_BT, score_BT):
        logits_BTV = logits(hidden_BTD, head, forbidden)
        log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
        argmax = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        if temperature > 0:
            sample = sampling.draw(keys_BT, sampling.filter_logits(logits_BTV, temperature, top_k, top_p))
        else:
            sample = argmax
        target_log_prob = jnp.zeros_like(log_z) if score_BT is None else _pick(logits_BTV, score_BT) - log_z
        return TokenStats(argmax, sample, _pick(logits_BTV, sample) - log_z, target_log_prob)

    keys = keys_BT if temperature > 0 else None
    return _over_chunks(chunk, head, (hidden_BTD, keys, score), chunk_tokens)


def _over_chunks(chunk: Callable, head: Head, inputs, chunk_tokens: int):
    """Maps `chunk(head, *inputs)` over slices of axis 1 of at most `chunk_tokens` tokens (at least one slot)."""
    B, T = inputs[0].shape[:2]
    slots = max(1, chunk_tokens // B)
    if slots >= T:
        return chunk(head, *inputs)
    chunks = -(-T // slots)
    slots = -(-T // chunks)
    head = head.replace(weight_VD=head.weight_VD.astype(inputs[0].dtype))

    def split(x):
        filler = jnp.broadcast_to(x[:, :1], (B, chunks * slots - T, *x.shape[2:]))
        return jnp.moveaxis(jnp.concatenate([x, filler], axis=1).reshape(B, chunks, slots, *x.shape[2:]), 1, 0)

    body = jax.checkpoint(chunk, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    _, out = jax.lax.scan(lambda _, xs: (None, body(head, *xs)), None, jax.tree.map(split, inputs))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, chunks * slots, *y.shape[3:])[:, :T], out)


def _pick(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0]


@jax.custom_vjp
def _nll(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax at the target, whose gradient is one fused pass over the logits instead of a scatter and a sum."""
    return jax.nn.logsumexp(logits_BTV, axis=-1) - _pick(logits_BTV, targets_BT)


def _nll_forward(logits_BTV, targets_BT):
    log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_z - _pick(logits_BTV, targets_BT), (logits_BTV, log_z, targets_BT)


def _nll_backward(residuals, g_BT):
    logits_BTV, log_z, targets_BT = residuals
    is_target = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    return (jnp.exp(logits_BTV - log_z[..., None]) - is_target) * g_BT[..., None], None


_nll.defvjp(_nll_forward, _nll_backward)
