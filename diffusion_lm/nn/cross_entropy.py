"""Losses and token statistics from hidden states, chunk by chunk, without an array [B,T,V] (`nn/chunks.py`)."""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_lm.core.types import TokenStats
from diffusion_lm.nn import sampling
from diffusion_lm.nn.chunks import over_chunks
from diffusion_lm.nn.head import NEVER, Head, logits


@flax.struct.dataclass
class NllTerms:
    """Per-token parts of the training losses, in nats.

    Attributes:
      nll: f32[B,T], -log p(target).
      log_z: f32[B,T], log of the softmax's denominator; z-loss is its square.
      uniform_nll: f32[B,T], mean of -log p over the vocabulary without padding rows, for label smoothing.
    """

    nll: jax.Array
    log_z: jax.Array
    uniform_nll: jax.Array


class Noised(flax.struct.PyTreeNode):
    """A mixture of predictions p with noise: signal * p + uniform tokens + MASK, whose masses sum to 1.

    Attributes:
      signal_BT: f32[B,T] in [0, 1].
      vocab_size: V, static; uniform noise is spread over the ids below it, without MASK if there is a `mask_id`; the
        share of forbidden ids is lost.
      mask_BT: f32[B,T], the mass of MASK, or None if the noise has no MASK.
      uniform_BT: f32[B,T], the mass of uniform noise; None = 1 - signal.
      mask_id: the id of MASK, static; the noise may contain it although predictions may not.
    """

    signal_BT: jax.Array
    vocab_size: int = flax.struct.field(pytree_node=False)
    mask_BT: jax.Array | None = None
    uniform_BT: jax.Array | None = None
    mask_id: int | None = flax.struct.field(pytree_node=False, default=None)


class Ratios(flax.struct.PyTreeNode):
    """The denoising step of score entropy (2310.16834), from predicted ratios r_j = exp(logit_j + log_scale).

    With z the slot's own token, whose ratio is 1 by definition, and S = sum_{j != z} r_j, the next token is

        j != z with weight max(0, gain r_j - loss (1 + S)),    z with weight max(0, own - own_loss S).

    Negative weights occur if the ratios are not those of a distribution; the released code treats them as 0.

    Attributes:
      tokens_BT: i32[B,T], z.
      log_scale_BT: f32[B,T], added to the network's outputs to get the logarithm of a ratio.
      gain_BT: f32[B,T].
      loss_BT: f32[B,T].
      own_BT: f32[B,T].
      own_loss_BT: f32[B,T].
      last_BT: bool[B,T], True if a forbidden token must be replaced in this step.
    """

    tokens_BT: jax.Array
    log_scale_BT: jax.Array
    gain_BT: jax.Array
    loss_BT: jax.Array
    own_BT: jax.Array
    own_loss_BT: jax.Array
    last_BT: jax.Array


def chunked_nll(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    chunk_tokens: int,
    *,
    where_BT: jax.Array | None = None,
    forbidden: tuple[int, ...] = (),
) -> jax.Array:
    """Returns -log p(target) as f32[B,T].

    Args:
      hidden_BTD: after the final norm, in the compute dtype.
      head: the output projection.
      targets_BT: i32[B,T], ids below the vocabulary's size.
      chunk_tokens: most tokens whose logits are held at a time; static.
      where_BT: bool[B,T], the selected slots; 0 elsewhere. None = all.
      forbidden: ids with probability 0, such as MASK if a clean token is never MASK (SUBS, arXiv 2406.07524). A
        forbidden target has an nll of about 1e30.
    """

    def chunk(head, hidden_BTD, targets_BT, saved=None):
        logits_NV = _flat(logits(hidden_BTD, head, forbidden))
        log_z_N = _log_z(logits_NV) if saved is None else _flat(saved)
        nll_N = _normaliser(logits_NV, log_z_N) - _pick(logits_NV, _flat(targets_BT))
        return nll_N.reshape(targets_BT.shape), log_z_N.reshape(targets_BT.shape)

    return over_chunks(chunk, head, (hidden_BTD, targets_BT), chunk_tokens, where_BT, hidden_BTD.shape[-1] // 2)


def chunked_nll_terms(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    chunk_tokens: int,
    *,
    where_BT: jax.Array | None = None,
    forbidden: tuple[int, ...] = (),
) -> NllTerms:
    """Returns the terms of z-loss and label smoothing; arguments as in `chunked_nll`."""

    def chunk(head, hidden_BTD, targets_BT, saved=None):
        logits_NV = _flat(logits(hidden_BTD, head, forbidden))
        log_z_N = _log_z(logits_NV) if saved is None else _flat(saved)
        log_z = _normaliser(logits_NV, log_z_N)
        emitted = logits_NV[:, : head.vocab_size]
        if forbidden:
            allowed = jnp.ones(head.vocab_size, bool).at[jnp.asarray(forbidden)].set(False)
            mean_logit = jnp.where(allowed, emitted, 0.0).sum(axis=-1) / (head.vocab_size - len(set(forbidden)))
        else:
            mean_logit = emitted.mean(axis=-1)
        terms = NllTerms(log_z - _pick(logits_NV, _flat(targets_BT)), log_z, log_z - mean_logit)
        return jax.tree.map(lambda x: x.reshape(targets_BT.shape), (terms, log_z_N))

    return over_chunks(chunk, head, (hidden_BTD, targets_BT), chunk_tokens, where_BT, hidden_BTD.shape[-1] // 2)


def chunked_token_stats(
    hidden_BTD: jax.Array,
    head: Head,
    chunk_tokens: int,
    *,
    where_BT: jax.Array | None = None,
    keys_BT: jax.Array | None = None,
    temperature: float | jax.Array = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    score: jax.Array | None = None,
    forbidden: tuple[int, ...] = (),
    summaries: tuple[str, ...] = (),
    unconditional_BTD: jax.Array | None = None,
    guidance: float = 0.0,
    noised: Noised | None = None,
    ratios: Ratios | None = None,
    embedding_VD: jax.Array | None = None,
) -> TokenStats:
    """Returns per-token summaries of the distribution.

    Args:
      hidden_BTD: after the final norm, in the compute dtype.
      head: the output projection.
      chunk_tokens: most tokens whose logits are held at a time; static.
      where_BT: bool[B,T], the selected slots; zeros elsewhere. None = all.
      keys_BT: one typed PRNG key per token; required if temperature > 0.
      temperature: 0 takes the most likely token; static, as are the next two. It may be f32[B], one positive
        temperature per row, if it changes inside a compiled loop.
      top_k: samples from the k most likely tokens; 0 = all.
      top_p: samples from the smallest set of tokens whose mass reaches p, after temperature and top_k.
      score: i32[B,T], tokens whose log-probability is returned as `target_log_prob`.
      forbidden: ids that are never emitted, such as MASK. Log-probabilities are renormalised without them, but neither
        temperature nor filters apply to them.
      summaries: which of "entropy", "margin" and "tempered_entropy" to compute too; static. The last fills `entropy`
        with that of the distribution at `temperature`, which must not be 0. "proposal_confidence", "proposal_margin"
        and "proposal_entropy" fill `proposal_log_prob`, `margin` and `entropy` with those of the distribution that is
        sampled from, after temperature, top_k and top_p (Dream's ranks); at temperature 0 that is the model's.
      unconditional_BTD: the hidden states of a pass without the conditioning. Every summary and sample is then of the
        guided logits c + guidance (c - u), where c are the logits of `hidden_BTD` and u those of these.
      guidance: strength of the guidance; 0 returns c bit for bit.
      noised: mixes the proposals (after temperature, top_k and top_p) with noise; guidance, samples and summaries then
        use the mixture, as f32 logarithms of probabilities.
      ratios: the logits, after guidance, are logarithms of ratios. Samples are then the tokens that the slot changes
        to, `sample_log_prob` is their log-probability given a change, `target_log_prob` that of no change, and `change`
        is the probability of a change. Temperature, top_k and top_p are not defined for them.
      embedding_VD: [padded V,D]; returns `expected` too: the mean embedding under the distribution of each pass, at the
        temperature of the samples, or 1 if that is 0; without guidance, top_k, top_p and noise.

    Raises:
      ValueError: temperature > 0 without keys.
    """
    # Static: at temperature 0 the program contains no random draw.
    draws = not (isinstance(temperature, int | float) and temperature == 0)
    if draws and keys_BT is None:
        raise ValueError("token_stats needs keys_BT where temperature > 0")
    if isinstance(temperature, jax.Array):
        temperature = temperature[:, None, None]
    embedding_VD = None if embedding_VD is None else embedding_VD.astype(hidden_BTD.dtype)

    def chunk(head, hidden_BTD, keys_BT, score_BT, unconditional_BTD, noised, ratios, saved=None):
        del saved
        passes = [logits(x, head, forbidden) for x in (hidden_BTD, unconditional_BTD) if x is not None]
        # One expected embedding per pass: with guidance the second is that of the unconditional pass.
        expected = None
        if embedding_VD is not None:
            soft = (jax.nn.softmax(x / temperature if draws else x, axis=-1) for x in passes)
            expected = jnp.stack([p.astype(embedding_VD.dtype) @ embedding_VD for p in soft], axis=2)
        if noised is not None:
            filtered = [sampling.filter_logits(x, temperature, top_k, top_p) if draws else x for x in passes]
            passes = [_with_noise(x, noised, passes[0] > 0.5 * NEVER) for x in filtered]
        logits_BTV = passes[0] if len(passes) == 1 else passes[0] + guidance * (passes[0] - passes[1])
        change = stay_log_prob = None
        if ratios is not None:
            logits_BTV, change, stay_log_prob = _changes(logits_BTV, ratios)
        # From here on `logits_BTV` is the distribution that is summarised, and `proposal` the one that is sampled.
        log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
        argmax = sampling.most_likely(logits_BTV)
        proposal = logits_BTV
        if draws and noised is None and ratios is None:
            proposal = sampling.filter_logits(logits_BTV, temperature, top_k, top_p)
        sample = sampling.draw(keys_BT, proposal) if draws else argmax
        target_log_prob = jnp.zeros_like(log_z) if score_BT is None else _pick(logits_BTV, score_BT) - log_z
        if stay_log_prob is not None:
            target_log_prob = stay_log_prob
        entropy = margin = proposal_log_prob = None
        if any(name.startswith("proposal_") for name in summaries):
            log_q = jnp.maximum(jax.nn.log_softmax(proposal, axis=-1), NEVER)
            proposal_log_prob = _pick(log_q, sample) if "proposal_confidence" in summaries else None
            entropy = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1) if "proposal_entropy" in summaries else None
            if "proposal_margin" in summaries:
                top = jnp.exp(jax.lax.top_k(log_q, 2)[0])
                margin = top[..., 0] - top[..., 1]
        if "entropy" in summaries:
            log_p = logits_BTV - log_z[..., None]
            entropy = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, NEVER), axis=-1)
        if "tempered_entropy" in summaries:
            log_p = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
            entropy = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, NEVER), axis=-1)
        if "margin" in summaries:
            top = jnp.exp(jax.lax.top_k(logits_BTV, 2)[0] - log_z[..., None])
            margin = top[..., 0] - top[..., 1]
        log_prob = _pick(logits_BTV, sample) - log_z
        stats = TokenStats(
            argmax=argmax,
            sample=sample,
            sample_log_prob=log_prob,
            target_log_prob=target_log_prob,
            entropy=entropy,
            margin=margin,
            expected=expected,
            change=change,
            proposal_log_prob=proposal_log_prob,
        )
        return stats, ()

    inputs = (hidden_BTD, keys_BT if draws else None, score, unconditional_BTD, noised, ratios)
    return over_chunks(chunk, head, inputs, chunk_tokens, where_BT)


def chunked_map(
    fn: Callable,
    hidden_BTD: jax.Array,
    head: Head,
    inputs: tuple[jax.Array, ...],
    chunk_tokens: int,
    *,
    where_BT: jax.Array | None = None,
    forbidden: tuple[int, ...] = (),
):
    """Maps the logits of each token to values of that token, for losses that need the whole distribution.

    Args:
      fn: `fn(logits, *inputs)`, from f32[b,t,V] over the vocabulary without padding rows and the slices [b,t,...] of
        `inputs` to a tree of arrays [b,t,...]. It must treat tokens independently: chunks are cut along T, and slots
        are reordered.
      hidden_BTD: after the final norm, in the compute dtype.
      head: the output projection.
      inputs: arrays [B,T,...] that `fn` reads in addition to the logits.
      chunk_tokens: most tokens whose logits are held at a time; static.
      where_BT: bool[B,T], the selected slots; 0 elsewhere. None = all.
      forbidden: ids with probability 0; their logit is `NEVER`.

    Returns:
      The result of `fn`, over [B,T].
    """

    def chunk(head, hidden_BTD, *inputs, saved=None):
        del saved
        return fn(logits(hidden_BTD, head, forbidden)[..., : head.vocab_size], *inputs), ()

    return over_chunks(chunk, head, (hidden_BTD, *inputs), chunk_tokens, where_BT, hidden_BTD.shape[-1] // 2)


def _with_noise(logits_BTV: jax.Array, noised: Noised, allowed_BTV: jax.Array) -> jax.Array:
    """Returns log(signal * p + noise) with p = softmax(logits); `NEVER` where it is log 0."""
    log_p = jax.nn.log_softmax(logits_BTV, axis=-1) + jnp.log(noised.signal_BT)[..., None]
    ids = jnp.arange(log_p.shape[-1])
    uniform = jnp.log1p(-noised.signal_BT) if noised.uniform_BT is None else jnp.log(noised.uniform_BT)
    # Uniform noise over clean tokens: MASK has a mass of its own.
    kinds = noised.vocab_size if noised.mask_id is None else noised.vocab_size - 1
    is_noise = (ids < noised.vocab_size) & allowed_BTV
    log_noise = jnp.where(is_noise, (uniform - math.log(kinds))[..., None], NEVER)
    if noised.mask_BT is not None:
        log_noise = jnp.where(ids == noised.mask_id, jnp.log(noised.mask_BT)[..., None], log_noise)
    return jnp.maximum(jnp.logaddexp(jnp.maximum(log_p, NEVER), jnp.maximum(log_noise, NEVER)), NEVER)


MAX_LOG_RATIO = 60.0
"""Log ratios are clipped here, so that their exponentials and the sums of these stay finite in float32."""


def _changes(logits_BTV: jax.Array, ratios: Ratios) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns log weights of the tokens to change to (`NEVER` for z), P(change), and log P(no change).

    Whether the token changes is sampled separately. In one draw over all tokens including z, each change would have a
    probability of the order of (step size) / V, which float32 cannot resolve.
    """
    is_other = jnp.arange(logits_BTV.shape[-1]) != ratios.tokens_BT[..., None]
    log_ratio = jnp.minimum(logits_BTV + ratios.log_scale_BT[..., None], MAX_LOG_RATIO)
    # The output at z is never trained, because its ratio is 1 by definition.
    ratio = jnp.where(is_other, jnp.exp(log_ratio), 0.0)
    total = jnp.sum(ratio, axis=-1, keepdims=True)
    weights = ratios.gain_BT[..., None] * ratio - ratios.loss_BT[..., None] * (1.0 + total)
    weights = jnp.where(is_other & (logits_BTV > 0.5 * NEVER), jnp.maximum(weights, 0.0), 0.0)
    mass = jnp.sum(weights, axis=-1)
    own = jnp.maximum(ratios.own_BT - ratios.own_loss_BT * total[..., 0], 0.0)
    # Forbidden ids have the logit NEVER; half of it separates them from any real logit.
    forbidden = _pick(logits_BTV, ratios.tokens_BT) <= 0.5 * NEVER
    own = jnp.where(ratios.last_BT & forbidden, 0.0, own)
    # If no token has a positive weight and z may not stay, sample from the ratios themselves.
    weights = jnp.where((mass > 0)[..., None], weights, ratio)
    both = jnp.maximum(mass + own, jnp.finfo(jnp.float32).tiny)
    log_weights = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), NEVER)
    change = jnp.where(own > 0, mass / both, 1.0)
    return log_weights, change, jnp.maximum(jnp.log(own / both), NEVER)


def _flat(x_BT: jax.Array) -> jax.Array:
    """Returns [B*T,...]: with one axis of tokens, XLA needs no transposes of the logits around the products."""
    return x_BT.reshape(-1, *x_BT.shape[2:])


def _log_z(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jax.lax.stop_gradient(logits), axis=-1)


@jax.custom_vjp
def _normaliser(logits: jax.Array, log_z: jax.Array) -> jax.Array:
    """Returns `log_z`, which is logsumexp(logits), with its gradient with respect to the logits.

    `log_z` may come from the forward pass; the backward pass then needs no second reduction over the vocabulary.
    """
    del logits
    return log_z


def _normaliser_forward(logits, log_z):
    return log_z, (logits, log_z)


def _normaliser_backward(residuals, g):
    logits, log_z = residuals
    return jnp.exp(logits - log_z[..., None]) * g[..., None], None


_normaliser.defvjp(_normaliser_forward, _normaliser_backward)


@jax.custom_vjp
def _pick(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the logits of the tokens. The gradient is a comparison and not a scatter: one pass over all logits."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def _pick_forward(logits, tokens):
    return _pick(logits, tokens), (logits, tokens)


def _pick_backward(residuals, g):
    logits, tokens = residuals
    return jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], g[..., None], 0.0), None


_pick.defvjp(_pick_forward, _pick_backward)
