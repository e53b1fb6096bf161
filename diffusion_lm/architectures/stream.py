"""One stream through embedding, blocks and head: what single-stream networks and encoder-decoders share."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_lm.core.errors import require
from diffusion_lm.core.rng import fold_in_each, stream_number
from diffusion_lm.core.types import Params
from diffusion_lm.nn import stack
from diffusion_lm.nn.attention_mask import AttentionMask, DenseMask, SymbolicMask
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.head import Head
from diffusion_lm.nn.inputs import EncoderState, ForwardInputs
from diffusion_lm.nn.layers import Context, row_dropout
from diffusion_lm.nn.masks import Segments, SlidingWindow, same_segment
from diffusion_lm.nn.time_conditioning import (
    init_time_conditioning,
    run_time_conditioning,
    time_conditioning_axes,
    time_conditioning_flops,
)
from diffusion_lm.nn.transformer import TransformerSpec

# Dropout sites outside the blocks; far above any layer index, which is folded into the same keys.
_EMBEDDING_SITE, _OUTPUT_SITE, _ENCODER_SITE = 1 << 20, (1 << 20) + 1, (1 << 20) + 2


def named_key(key: jax.Array, name: str) -> jax.Array:
    """Returns the initialisation key of a named part, so that parts shared by two architectures start out equal."""
    return jax.random.fold_in(key, stream_number(name))


def init_stream(spec: TransformerSpec, key: jax.Array, layers: int, has_cross: bool = False) -> dict[str, Any]:
    """Returns the parameters of one stream without token embedding: blocks, norms, positions."""
    dtype = jnp.dtype(spec.param_dtype)
    params: dict[str, Any] = {
        "blocks": stack.init_stack(spec, named_key(key, "blocks"), layers, has_cross),
    }
    params |= {name: stack.init_norm(spec) for name in _norms(spec)}
    if _has_stack_bias(spec):
        shape = (spec.relative_buckets, spec.num_heads)
        initializer = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        params["relative_bias"] = initializer(named_key(key, "relative_bias"), shape, dtype)
    if spec.position == "learned":
        shape = (spec.position_rows, spec.model_dim)
        params["positions"] = spec.embedding_std * jax.random.normal(named_key(key, "positions"), shape, dtype)
    return params


def stream_axes(spec: TransformerSpec, has_cross: bool = False) -> dict[str, Any]:
    """Returns the logical axes of `init_stream`'s tree."""
    axes: dict[str, Any] = {"blocks": stack.stack_axes(spec, has_cross)} | {
        name: stack.norm_axes(spec) for name in _norms(spec)
    }
    if _has_stack_bias(spec):
        axes["relative_bias"] = ("relative_buckets", "heads")
    if spec.position == "learned":
        axes["positions"] = ("positions", "embed")
    return axes


def _has_stack_bias(spec: TransformerSpec) -> bool:
    return spec.position == "relative_bias" and not spec.relative_per_layer


def _norms(spec: TransformerSpec) -> tuple[str, ...]:
    """Returns the names of a stream's norms outside its blocks."""
    present = {"embedding_norm": spec.embedding_norm, "final_norm": spec.has_final_norm}
    return tuple(name for name, is_there in present.items() if is_there)


def init_head(spec: TransformerSpec, key: jax.Array) -> dict[str, Any]:
    """Returns the parameters of the output projection under their name; empty if it is only the embedding."""
    head: dict[str, Any] = {}
    if not spec.tied_embeddings:
        head["tokens"] = init_tokens(spec, key, "head", spec.model_dim**-0.5)
    if spec.head_bias:
        head["bias"] = jnp.zeros((spec.padded_vocab_size,), jnp.dtype(spec.param_dtype))
    if spec.head_transform:
        head["transform"] = stack.init_head_transform(spec, named_key(key, "head_transform"))
    return {"head": head} if head else {}


def head_axes(spec: TransformerSpec) -> dict[str, Any]:
    """Returns the logical axes of `init_head`'s tree."""
    head: dict[str, Any] = {} if spec.tied_embeddings else {"tokens": ("vocab", "embed")}
    if spec.head_bias:
        head["bias"] = ("vocab",)
    if spec.head_transform:
        head["transform"] = stack.head_transform_axes(spec)
    return {"head": head} if head else {}


def init_conditioning(spec: TransformerSpec, key: jax.Array) -> dict[str, Any]:
    """Returns the parameters of self-conditioning and time conditioning under their names."""
    params: dict[str, Any] = {}
    if spec.self_conditioning:
        params["self_conditioning"] = stack.init_self_conditioning(spec, named_key(key, "self_conditioning"))
    if spec.time_conditioning:
        params["time_conditioning"] = init_time_conditioning(spec, named_key(key, "time_conditioning"))
    return params


def conditioning_axes(spec: TransformerSpec) -> dict[str, Any]:
    """Returns the logical axes of `init_conditioning`'s tree."""
    axes: dict[str, Any] = {}
    if spec.self_conditioning:
        axes["self_conditioning"] = stack.self_conditioning_axes(spec)
    if spec.time_conditioning:
        axes["time_conditioning"] = time_conditioning_axes()
    return axes


def init_tokens(spec: TransformerSpec, key: jax.Array, name: str, std: float) -> jax.Array:
    """Returns a random [padded V,D] matrix for the embedding or the head."""
    shape = (spec.padded_vocab_size, spec.model_dim)
    return std * jax.random.normal(named_key(key, name), shape, jnp.dtype(spec.param_dtype))


def head_of(spec: TransformerSpec, params: Params) -> Head:
    """Returns the output projection, which is the embedding if tied."""
    head = params.get("head", {})
    return Head(
        weight_VD=params["embed"]["tokens"] if spec.tied_embeddings else head["tokens"],
        bias_V=head.get("bias"),
        transform=head.get("transform"),
        run_transform=stack.RunHeadTransform(spec) if spec.head_transform else None,
        scale=spec.logit_scale,
        vocab_size=spec.vocab_size,
        softcap=spec.logit_softcap,
    )


def run_stream(
    spec: TransformerSpec, embedding_VD: jax.Array, params: Params, inputs: ForwardInputs
) -> tuple[jax.Array, KVCache | None]:
    """Runs tokens through embedding, blocks and final norm.

    Args:
      spec: the network's shape.
      embedding_VD: the token embedding.
      params: from `init_stream`, and the conditioning layers of `init_conditioning`.
      inputs: of the forward pass; an encoder's source must be encoded already.

    Returns:
      Hidden states [B,Q,D] and the cache.

    Raises:
      ConfigError: the stream is longer than the learned positions, or the network has no layer for an input.
    """
    constrain, encoder = inputs.constrain, inputs.encoder
    length, copies = inputs.segment_ids.shape[1], inputs.visibility.copies
    require(
        spec.max_positions is None or length // copies <= spec.max_positions,
        f"max_positions={spec.max_positions}: the stream has {length // copies} tokens",
        where="TransformerSpec.max_positions",
        fix="Shorten the rows, or increase max_positions.",
    )
    dropout_keys = inputs.dropout_keys if spec.has_dropout else None
    x = _embed(spec, embedding_VD, params, inputs)
    x = row_dropout(x, spec.dropout_rate, dropout_keys, _EMBEDDING_SITE)
    x = constrain(x, ("batch", "length", "activation_embed"))

    mask = _attention_mask(spec, inputs)
    if _has_stack_bias(spec):
        mask = mask.with_relative_bias(
            params["relative_bias"],
            bidirectional=spec.relative_bidirectional,
            max_distance=spec.relative_max_distance,
        )
    window_mask = None
    if spec.window is not None:
        windowed = mask.restrict(SlidingWindow(spec.window, copies))
        # Without a list of layers, all of them have the window.
        mask, window_mask = (windowed, None) if spec.window_layers is None else (mask, windowed)
    state = encoder if isinstance(encoder, EncoderState) else None
    cross = None if state is None else state.cross
    context = Context(
        mask=mask,
        window_mask=window_mask,
        positions=inputs.positions,
        memory_BSD=state.memory_BSD if state is not None and cross is None else None,
        memory_mask=None if state is None else DenseMask(same_segment(inputs.q_segments, state.segment_ids)),
        dropout_keys=dropout_keys,
        constrain=constrain,
    )
    x, cache = stack.run_stack(spec, params["blocks"], x, context, cache=inputs.cache, cross=cross)
    if spec.has_final_norm:
        x = stack.run_norm(spec, params["final_norm"], x)
    return row_dropout(x, spec.dropout_rate, dropout_keys, _OUTPUT_SITE), cache


def _attention_mask(spec: TransformerSpec, inputs: ForwardInputs) -> AttentionMask:
    """Returns the mask of self-attention, in the representation that the attention implementation reads."""
    visibility = inputs.visibility & Segments(inputs.segment_ids)
    length = inputs.segment_ids.shape[1]
    # The kernel evaluates the expression itself, but only where the queries are all slots of the row.
    if spec.attention == "flash" and inputs.cache is None:
        return SymbolicMask(visibility, length)
    return DenseMask.of(visibility, inputs.q_idx, length)


def _embed(spec: TransformerSpec, embedding_VD: jax.Array, params: Params, inputs: ForwardInputs) -> jax.Array:
    """Returns [B,Q,D]: embedded tokens, what the conditioning layers add to them, and learned positions."""
    x = jnp.take(embedding_VD, inputs.tokens, axis=0, mode="clip").astype(spec.compute_dtype)
    if spec.scaled_embeddings:
        # The factor is rounded to the compute dtype, as in the training of the released models.
        x = x * jnp.asarray(spec.model_dim**0.5, x.dtype)
    if inputs.self_condition is not None:
        require(
            spec.self_conditioning,
            "self_conditioning=False: the network has no layer that reads a previous prediction",
            where="TransformerSpec.self_conditioning",
            fix="Set it to True, or disable self-conditioning in the objective or the sampler.",
        )
        signal, layer = inputs.self_condition, params["self_conditioning"]
        x = x + stack.run_self_conditioning(spec, layer, signal, inputs.constrain)
    if inputs.time is not None:
        require(
            spec.time_conditioning,
            "time_conditioning=False: the network has no layer that reads a time",
            where="TransformerSpec.time_conditioning",
            fix="Set it to True.",
        )
        x = x + run_time_conditioning(spec, params["time_conditioning"], inputs.time)
    if spec.position == "learned":
        rows = inputs.positions + spec.position_offset
        x = x + jnp.take(params["positions"], rows, axis=0, mode="clip").astype(x.dtype)
    return stack.run_norm(spec, params["embedding_norm"], x) if spec.embedding_norm else x


def encoder_dropout_keys(keys: jax.Array | None) -> jax.Array | None:
    """Returns the dropout keys of the encoder, which differ from the decoder's."""
    return None if keys is None else fold_in_each(keys, jnp.full(keys.shape, _ENCODER_SITE))


def empty_cache(spec: TransformerSpec, batch: int, length: int) -> KVCache:
    """Returns an empty cache of the (decoder) stack."""
    return KVCache.empty(spec.num_layers, batch, length, spec.kv_heads, spec.head_dim, spec.compute_dtype)


def block_flops(spec: TransformerSpec, context_length: float, memory_length: float | None = None) -> float:
    """Returns forward matmul FLOPs of one block per token that attends to `context_length` tokens.

    With `memory_length` the block has cross-attention. The projections of the memory are counted by the caller, because
    they are per memory token.
    """
    D, HE, KE = spec.model_dim, spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = 2 * D * (2 * HE + 2 * KE) + 4 * HE * context_length
    cross = 0.0 if memory_length is None else 2 * D * 2 * HE + 4 * HE * memory_length
    return attention + cross + _mlp_flops(spec)


def conditioning_flops(spec: TransformerSpec) -> float:
    """Returns forward matmul FLOPs per token of self-conditioning and time conditioning."""
    prediction = _mlp_flops(spec) if spec.self_conditioning else 0.0
    return prediction + (time_conditioning_flops(spec) if spec.time_conditioning else 0.0)


def logit_flops(spec: TransformerSpec) -> float:
    """Returns forward FLOPs of the logits of one token."""
    transform = 2.0 * spec.model_dim**2 if spec.head_transform else 0.0
    return transform + 2.0 * spec.model_dim * spec.padded_vocab_size


def count(params: Params) -> dict[str, int]:
    """Returns the number of parameters per top-level part and their "total"; padding rows are included."""
    names = {"embed": "embedding"}
    counts = {names.get(part, part): sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    return counts | {"total": sum(counts.values())}


def _mlp_flops(spec: TransformerSpec) -> float:
    return 2.0 * spec.model_dim * spec.mlp_dim * (3 if spec.gated else 2)


def abstract_key() -> jax.Array:
    """Returns an abstract PRNG key, without using a device."""
    return jax.eval_shape(lambda: jax.random.key(0))
