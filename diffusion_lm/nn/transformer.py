"""The shape of a network: model families differ only in these fields."""

import dataclasses

import jax.numpy as jnp

from diffusion_lm.core.checks import check_choice, check_count, check_probability
from diffusion_lm.core.errors import require
from diffusion_lm.nn.attention import IMPLEMENTATIONS
from diffusion_lm.nn.remat import POLICIES
from diffusion_lm.nn.rope import DynamicRope, RopeScaling

_CHOICES = {
    "mlp": ("geglu", "swiglu", "gelu", "relu"),
    "gelu": ("tanh", "exact"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "both"),
    "position": ("relative_bias", "rope", "learned", "none"),
    "attention_scale": ("none", "inverse_sqrt"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": tuple(POLICIES),
    "attention": IMPLEMENTATIONS,
}


@dataclasses.dataclass(frozen=True)
class TransformerSpec:
    """A transformer. The defaults are T5 v1.1 (arXiv 2002.05202); LLaMA is `position="rope"`, `mlp="swiglu"`,
    `attention_scale="inverse_sqrt"`, `tied_embeddings=False` and fewer `num_kv_heads`. `interop/name_maps/` has the
    settings of the families whose released checkpoints can be imported.

    Attributes:
      vocab_size: number of tokens in the vocabulary.
      num_layers: number of blocks in the (decoder) stack.
      model_dim: width D of the residual stream.
      num_heads: number of query heads H.
      head_dim: size E of one head; H * E need not equal D.
      mlp_dim: width F of the feed-forward layer (of each of the two halves of a gated one).
      num_kv_heads: number of key/value heads K, a divisor of H; None = H.
      mlp: "geglu" and "swiglu" are gated (GELU, SiLU); "gelu" and "relu" are not.
      gelu: the "tanh" approximation (T5, GPT-2) or the "exact" function by erf (BERT, RoBERTa).
      norm: "rmsnorm" or "layernorm".
      norm_eps: added to the variance.
      norm_placement: "pre" normalises the input of each layer and, once, the output of the stack; "post" normalises
        the sum of each layer and its input (BERT, RoBERTa), without a final norm; "both" is "pre" with another norm
        on the output of each layer (Gemma 2).
      norm_around_one: the scales of the norms are stored as scale - 1, and start at 0 (Gemma).
      embedding_norm: a norm after the sum of token and position embeddings (BERT, RoBERTa).
      first_attention_norm: whether the first block has a norm before its attention. Without one (ModernBERT) its
        attention reads the embeddings after `embedding_norm`, and its row of the stacked scale is never read.
      position: "relative_bias" (T5, see `relative_per_layer`), "rope", "learned" or "none".
      rope_theta: base of RoPE's wavelengths.
      rope_scaling: how RoPE's frequencies are scaled for long streams, see `nn/rope.py`; None = not scaled.
      window: sliding window: a token attends to keys at a distance below this number, in both directions if the
        visibility allows both (Mistral); None = no window.
      window_layers: indices of the layers (of each stack) that have the window; None = all layers.
      window_rope_theta: base of RoPE in those layers, without scaling; None = `rope_theta` (Gemma 3 has its own).
      relative_buckets: number of rows of the relative-bias table.
      relative_max_distance: distance from which relative positions share a bucket.
      relative_bidirectional: separate buckets for future distances. Also on for causal models, where it costs half of
        the buckets: a diffusion stage can then start from an AR checkpoint and change only loss and visibility. With
        unidirectional buckets every future distance would look like distance 0. Off for the released T5s, whose
        decoder has all buckets for the past; encoders are always bidirectional.
      relative_per_layer: each layer has its own relative bias (umT5, and T5X with scanned layers) instead of one per
        stack.
      max_positions: longest stream; required by learned positions, None = unlimited.
      position_offset: row of the learned table for position 0; the rows before it are never read. RoBERTa starts at
        the id of its padding token + 1.
      tied_embeddings: the output projection is the input embedding.
      tied_logit_scale: logits are divided by sqrt(D) when tied, as in T5.
      use_bias: biases in all linear layers of the blocks and in "layernorm".
      qkv_bias: biases in the query, key and value projections (Qwen2).
      attention_output_bias: biases in the output projection of attention.
      mlp_bias: biases in the feed-forward layers.
      head_transform: a linear layer, GELU and norm before the output projection (BERT's masked language models).
      head_transform_bias: a bias in that linear layer (ModernBERT has none).
      head_bias: a bias per token on the logits.
      qk_norm: normalises each head's queries and keys (Qwen3).
      embedding_std: standard deviation of fresh embeddings.
      scaled_embeddings: embedded tokens are multiplied by sqrt(D) (Gemma).
      attention_scale: "none" (T5, which initialises the query matrix smaller instead) or "inverse_sqrt" of the head
        size.
      attention_scale_size: replaces the head size in "inverse_sqrt" (Gemma 2 and 3).
      attention_softcap: soft cap of the attention scores, or None (Gemma 2 uses 50).
      logit_softcap: soft cap of the logits, or None (Gemma 2 uses 30).
      dropout_rate: on embeddings, on the output of each layer, inside the MLP and on the final hidden states.
      attention_dropout_rate: on attention probabilities, after the softmax and without renormalisation (XLM-R's
        `attention_probs_dropout_prob`); only for attention = "xla".
      vocab_multiple: the number of embedding rows is rounded up to a multiple of this; rows beyond the vocabulary are
        never emitted.
      encoder_layers: number of encoder blocks; 0 for single-stream networks.
      self_conditioning: a layer before the (decoder) blocks that reads the expected embedding of the network's previous
        prediction (DiffusionGemma); see `nn.layers.SelfConditioning`.
      time_conditioning: a layer before the (decoder) blocks that reads the noise rate of each noisy slot; see
        `nn.time_conditioning`.
      dtype: of the computation; softmax, norms and logits are always float32.
      param_dtype: of the stored parameters.
      scan_layers: runs the blocks as a loop of the compiled program (fast to compile) or unrolled (faster on CPU). The
        parameters are stacked either way, so checkpoints do not depend on it.
      remat: what the backward pass stores: "none" (everything), "full", "dots" or "dots_no_batch"; see `nn/remat.py`.
      logits_chunk: maximum number of tokens whose logits a device holds at a time.
      attention: the implementation, "xla", "cudnn" or "flash"; see `attention.attend`.
    """

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_kv_heads: int | None = None
    mlp: str = "geglu"
    gelu: str = "tanh"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    norm_placement: str = "pre"
    norm_around_one: bool = False
    embedding_norm: bool = False
    first_attention_norm: bool = True
    position: str = "relative_bias"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    window_rope_theta: float | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_bidirectional: bool = True
    relative_per_layer: bool = False
    max_positions: int | None = None
    position_offset: int = 0
    tied_embeddings: bool = True
    tied_logit_scale: bool = True
    use_bias: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_transform: bool = False
    head_transform_bias: bool = True
    head_bias: bool = False
    qk_norm: bool = False
    embedding_std: float = 1.0
    scaled_embeddings: bool = False
    attention_scale: str = "none"
    attention_scale_size: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    vocab_multiple: int = 128
    encoder_layers: int = 0
    self_conditioning: bool = False
    time_conditioning: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    logits_chunk: int = 4096
    attention: str = "xla"

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "model_dim", "num_heads", "head_dim", "mlp_dim", "relative_buckets")
        for name in (*sizes, "relative_max_distance", "vocab_multiple", "logits_chunk"):
            check_count(getattr(self, name), f"TransformerSpec.{name}")
        for name, choices in _CHOICES.items():
            check_choice(getattr(self, name), choices, f"TransformerSpec.{name}")
        for name in ("position_offset", "encoder_layers"):
            check_count(getattr(self, name), f"TransformerSpec.{name}", minimum=0)
        if self.window is not None:
            check_count(self.window, "TransformerSpec.window", "Use a number of tokens from 1 up, or None.")
        for name in ("dropout_rate", "attention_dropout_rate"):
            check_probability(getattr(self, name), f"TransformerSpec.{name}", below_one=True)
        require(
            self.num_heads % self.kv_heads == 0,
            f"num_kv_heads={self.kv_heads}: must divide num_heads={self.num_heads}",
            where="TransformerSpec.num_kv_heads",
            fix="Use a divisor of num_heads.",
        )
        self._check_positions()
        self._check_layers()

    def _check_positions(self) -> None:
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"head_dim={self.head_dim}: must be even, because RoPE rotates pairs",
            where="TransformerSpec.head_dim",
            fix="Use an even head_dim.",
        )
        require(
            self.position != "learned" or self.max_positions is not None,
            "max_positions=None: learned positions need the length of the longest stream",
            where="TransformerSpec.max_positions",
            fix="Bind max_positions, or use position = 'rope'.",
        )
        require(
            self.max_positions is not None or not isinstance(self.rope_scaling, DynamicRope),
            "max_positions=None: DynamicRope needs the length of the longest training stream",
            where="TransformerSpec.max_positions",
            fix="Bind max_positions, or use another rope_scaling for longer streams.",
        )
        directions = {self.relative_bidirectional, self.relative_bidirectional or self.encoder_layers > 0}
        # Half of the buckets of a direction hold exact distances; the rest must reach up to the maximum distance.
        exact = [self.relative_buckets // (4 if both else 2) for both in directions]
        require(
            self.position != "relative_bias" or all(0 < count < self.relative_max_distance for count in exact),
            f"relative_buckets={self.relative_buckets}: do not fit relative_max_distance={self.relative_max_distance}",
            where="TransformerSpec.relative_buckets",
            fix="Use at least 4 buckets, and a maximum distance above a quarter of them.",
        )

    def _check_layers(self) -> None:
        if self.window_layers is not None:
            object.__setattr__(self, "window_layers", tuple(self.window_layers))
            require(
                self.window is not None and all(layer >= 0 for layer in self.window_layers),
                f"window_layers={self.window_layers}: need indices from 0 up, and a window",
                where="TransformerSpec.window_layers",
                fix="Use layer indices from 0 up, and bind TransformerSpec.window.",
            )
        require(
            self.window_rope_theta is None or self.window_layers is not None,
            f"window_rope_theta={self.window_rope_theta}: applies to window_layers, which is None",
            where="TransformerSpec.window_rope_theta",
            fix="Bind window_layers, or rope_theta for all layers.",
        )
        require(
            self.first_attention_norm or self.norm_placement != "post",
            "first_attention_norm=False: norm_placement='post' has no norm before the first attention",
            where="TransformerSpec.first_attention_norm",
            fix="Set it to True, or use norm_placement = 'pre'.",
        )
        require(
            self.attention_dropout_rate == 0 or self.attention == "xla",
            f"attention_dropout_rate={self.attention_dropout_rate}: attention={self.attention!r} never stores the "
            "probabilities, so it cannot drop any",
            where="TransformerSpec.attention",
            fix="Use attention = 'xla', or attention_dropout_rate = 0.0.",
        )

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass has any dropout."""
        return self.dropout_rate > 0 or self.attention_dropout_rate > 0

    @property
    def padded_vocab_size(self) -> int:
        """Number of embedding rows: the vocabulary, rounded up."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        """K, the number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def group(self) -> int:
        """Number of query heads that share one key/value head."""
        return self.num_heads // self.kv_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.mlp in ("geglu", "swiglu")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.use_bias or self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.use_bias or self.attention_output_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the feed-forward layers have biases."""
        return self.use_bias or self.mlp_bias

    @property
    def has_final_norm(self) -> bool:
        """Whether there is a norm after the blocks: not with "post", where each block ends in one."""
        return self.norm_placement != "post"

    @property
    def position_rows(self) -> int:
        """Number of rows of the learned position table."""
        assert self.max_positions is not None
        return self.max_positions + self.position_offset

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype."""
        return jnp.dtype(self.dtype)

    @property
    def logit_scale(self) -> float:
        """The factor of the logits."""
        return self.model_dim**-0.5 if self.tied_embeddings and self.tied_logit_scale else 1.0
