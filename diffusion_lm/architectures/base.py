"""The interface between networks and all code above them: plain dicts of parameters in, hidden states out."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax

from diffusion_lm.core.axes import AxesTree
from diffusion_lm.core.types import EncoderInputs, Params, TokenStats
from diffusion_lm.nn import cross_entropy
from diffusion_lm.nn.cache import KVCache
from diffusion_lm.nn.constrain import Constrain, no_constraint
from diffusion_lm.nn.head import Head, logits
from diffusion_lm.nn.inputs import EncoderState as EncoderState
from diffusion_lm.nn.inputs import ForwardInputs
from diffusion_lm.nn.masks import Visibility
from diffusion_lm.nn.stack import layers_apart
from diffusion_lm.nn.transformer import TransformerSpec


@flax.struct.dataclass
class Hidden:
    """The result of a forward pass.

    Attributes:
      values_BTD: [B,Q,D] after the final norm, in the compute dtype. `BoundModel` computes losses, samples or logits
        from it.
      cache: the cache with the new tokens written, or None if none was given.
    """

    values_BTD: jax.Array
    cache: KVCache | None = None


class Architecture(Protocol):
    """A network as pure functions of its parameters. Implementations are frozen dataclasses with value equality."""

    def __hash__(self) -> int: ...

    @property
    def spec(self) -> TransformerSpec:
        """The shape of the network."""

    @property
    def needs_encoder(self) -> bool:
        """Whether `hidden` needs an encoder's stream."""

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters as a nested dict of `spec.param_dtype` arrays; jit-able."""

    def abstract_params(self) -> Params:
        """Returns shapes and dtypes of the parameters without allocating them."""

    def logical_axes(self) -> AxesTree:
        """Returns the tree of `init` with the logical axes of each array in its place."""

    def hidden(self, params: Params, inputs: ForwardInputs) -> Hidden:
        """Runs the network up to its final norm."""

    def head(self, params: Params) -> Head:
        """Returns the output projection."""

    def embedding(self, params: Params) -> jax.Array:
        """Returns the (decoder's) token embedding, [padded V,D]."""

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Returns an empty cache for `length` slots."""

    def encode(
        self,
        params: Params,
        inputs: EncoderInputs,
        *,
        dropout_keys: jax.Array | None = None,
        constrain: Constrain = no_constraint,
        project: bool = True,
    ) -> EncoderState:
        """Encodes the source; with `project` also computes the cross-attention keys and values of all layers."""

    def count_parameters(self) -> dict[str, int]:
        """Returns the number of parameters per part, and their "total"; padding rows of the vocabulary are included."""

    def frozen_arrays(self) -> frozenset[str]:
        """Returns the paths of the arrays that are not trained, such as `blocks/mlp/up`; empty for a plain network."""

    def flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns forward matmul FLOPs per token of the main stream, including attention scores and logits.

        Args:
          context_length: length of the main stream.
          encoder_length: length of the encoder's stream, whose work is divided by the tokens of the main stream; None =
            that of the main stream. Ignored by single-stream networks.
        """

    def saved_flops_per_token(self, context_length: int, encoder_length: int | None = None) -> float:
        """Returns the FLOPs per token that a backward pass saves because frozen matrices need no gradient."""


@dataclasses.dataclass(frozen=True)
class BoundModel:
    """An architecture with its parameters: the view of a network that objectives and samplers have.

    Attributes:
      architecture: the network.
      params: its parameters.
      constrain: pins activations to the mesh.
    """

    architecture: Architecture
    params: Params
    constrain: Constrain = no_constraint

    @property
    def spec(self) -> TransformerSpec:
        """The network's shape."""
        return self.architecture.spec

    def __call__(
        self,
        tokens: jax.Array,
        *,
        visibility: Visibility,
        positions: jax.Array,
        segment_ids: jax.Array,
        encoder: EncoderInputs | EncoderState | None = None,
        self_condition: jax.Array | None = None,
        time: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> Hidden:
        """Runs one forward pass; arguments as in `ForwardInputs`."""
        inputs = ForwardInputs(
            tokens=tokens,
            visibility=visibility,
            positions=positions,
            segment_ids=segment_ids,
            encoder=encoder,
            self_condition=self_condition,
            time=time,
            cache=cache,
            dropout_keys=dropout_keys,
            constrain=self.constrain,
        )
        return self.architecture.hidden(self.params, inputs)

    def for_loops(self) -> "BoundModel":
        """Returns the same network with unstacked layers, which is faster inside the loop of a sampler."""
        if self.spec.scan_layers:  # a scan over layers needs them stacked
            return self
        blocks = layers_apart(self.params["blocks"])
        return dataclasses.replace(self, params={**self.params, "blocks": blocks})

    def encode(
        self, inputs: EncoderInputs, *, dropout_keys: jax.Array | None = None, project: bool = True
    ) -> EncoderState:
        """Encodes the source once, for several forward passes of the decoder.

        Args:
          inputs: the source.
          dropout_keys: key[B] of the dropout, or None.
          project: compute the cross-attention keys and values of all layers too, as decoding wants it; in training they
            would be stored until the backward pass.
        """
        return self.architecture.encode(
            self.params, inputs, dropout_keys=dropout_keys, constrain=self.constrain, project=project
        )

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Returns an empty cache for `length` slots."""
        return self.architecture.init_cache(batch, length)

    def nll(
        self, hidden: Hidden, targets: jax.Array, *, where: jax.Array | None = None, forbidden: tuple[int, ...] = ()
    ) -> jax.Array:
        """Returns -log p(target) as f32[B,T] in nats, without an array [B,T,V].

        Args:
          hidden: from a forward pass.
          targets: i32[B,T].
          where: bool[B,T], the selected slots; 0 elsewhere. None = all.
          forbidden: ids with probability 0.
        """
        return self._over_tokens(cross_entropy.chunked_nll, hidden, targets, where, forbidden)

    def nll_terms(
        self, hidden: Hidden, targets: jax.Array, *, where: jax.Array | None = None, forbidden: tuple[int, ...] = ()
    ) -> cross_entropy.NllTerms:
        """Returns -log p(target), log Z and the mean -log p over the vocabulary, for z-loss and label smoothing."""
        return self._over_tokens(cross_entropy.chunked_nll_terms, hidden, targets, where, forbidden)

    def _over_tokens(
        self, terms: Callable, hidden: Hidden, targets: jax.Array, where: jax.Array | None, forbidden: tuple[int, ...]
    ) -> Any:
        def one(head: Head, tokens: tuple[jax.Array, jax.Array, jax.Array | None]) -> Any:
            hidden_BTD, targets_BT, where_BT = tokens
            return terms(hidden_BTD, head, targets_BT, self.spec.logits_chunk, where_BT=where_BT, forbidden=forbidden)

        # Per device: partitioned as a whole, the loop over chunks would sum the head's gradient in every iteration.
        with jax.named_scope("cross_entropy"):
            return self.constrain.per_device(one, self._head(), (hidden.values_BTD, targets, where))

    def token_stats(
        self,
        hidden: Hidden,
        *,
        where: jax.Array | None = None,
        keys_BT: jax.Array | None = None,
        temperature: float | jax.Array = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        score: jax.Array | None = None,
        forbidden: tuple[int, ...] = (),
        summaries: tuple[str, ...] = (),
        unconditional: Hidden | None = None,
        guidance: float = 0.0,
        noised: cross_entropy.Noised | None = None,
        ratios: cross_entropy.Ratios | None = None,
        expected: bool = False,
    ) -> TokenStats:
        """Returns argmax, sample, log-probabilities and `summaries` per token; see `cross_entropy.chunked_token_stats`.

        With `expected`, returns the mean embedding of the predicted token too, the input `self_condition`.
        """
        return cross_entropy.chunked_token_stats(
            hidden.values_BTD,
            self._head(),
            self.spec.logits_chunk,
            where_BT=where,
            keys_BT=keys_BT,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            score=score,
            forbidden=forbidden,
            summaries=summaries,
            unconditional_BTD=None if unconditional is None else unconditional.values_BTD,
            guidance=guidance,
            noised=noised,
            ratios=ratios,
            embedding_VD=self._embedding() if expected else None,
        )

    def map_logits(
        self,
        fn: Callable,
        hidden: Hidden,
        inputs: tuple[jax.Array, ...],
        *,
        where: jax.Array | None = None,
        forbidden: tuple[int, ...] = (),
    ) -> Any:
        """Returns `fn(logits, *inputs)` per token without an array [B,T,V]; see `cross_entropy.chunked_map`."""
        return cross_entropy.chunked_map(
            fn,
            hidden.values_BTD,
            self._head(),
            inputs,
            self.spec.logits_chunk,
            where_BT=where,
            forbidden=forbidden,
        )

    def logits(self, hidden: Hidden) -> jax.Array:
        """Returns f32[B,T,V] without padding rows: for tests, beam search and small vocabularies."""
        return logits(hidden.values_BTD, self._head())[..., : self.spec.vocab_size]

    def _embedding(self) -> jax.Array:
        return self.constrain(self.architecture.embedding(self.params), ("vocab", "activation_embed"))

    def _head(self) -> Head:
        head = self.architecture.head(self.params)
        # The width is gathered once here instead of in every chunk.
        return head.replace(weight_VD=self.constrain(head.weight_VD, ("vocab", "activation_embed")))
