"""The shape of a network: model families differ by these fields and by nothing else."""

import dataclasses

import jax.numpy as jnp

from diffusion_lm.core.errors import near_names, require
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
    `attention_scale="inverse_sqrt"`, `tied_embeddings=False` and fewer `num_kv_heads`. `interop/name_maps/` spells out
    the families whose released checkpoints can be read.

    Attributes:
      vocab_size: tokens of the vocabulary.
      num_layers: blocks of the (decoder) stack.
      model_dim: width D of the residual stream.
      num_heads: query heads H.
      head_dim: size E of one head; H * E need not equal D.
      mlp_dim: width F of the feed-forward layer (of each of the two halves of a gated one).
      num_kv_heads: key/value heads K, a divisor of H; None = H.
      mlp: "geglu" and "swiglu" are gated (GELU, SiLU); "gelu" and "relu" are not.
      gelu: the "tanh" approximation (T5, GPT-2) or the "exact" function by erf (BERT, RoBERTa).
      norm: "rmsnorm" or "layernorm".
      norm_eps: added to the variance.
      norm_placement: "pre" normalises what each layer reads and, once, what the stack returns; "post" normalises each
        sum of a layer and its input (BERT, RoBERTa), and the stack has no final norm; "both" is "pre" and a norm of
        what each layer adds (Gemma 2).
      norm_around_one: the scales of the norms are stored as their distance from 1, and begin at 0 (Gemma).
      embedding_norm: a norm behind the sum of token and position embeddings (BERT, RoBERTa).
      first_attention_norm: whether the first block has a norm in front of its attention; without one (ModernBERT) it
        reads the embeddings as their own norm left them, and the row of the norm's scale for it is never read.
      position: "relative_bias" (T5, see `relative_per_layer`), "rope", "learned" or "none".
      rope_theta: base of RoPE's wavelengths.
      rope_scaling: how RoPE's frequencies were stretched for long streams, see `nn/rope.py`; None = not at all.
      window: how far a token sees: keys at a distance below this one, in both directions where the visibility allows
        both (Mistral's sliding window); None = as far as the visibility goes.
      window_layers: numbers of the layers (of each stack) that have the window; None = all of them.
      window_rope_theta: base of RoPE in those layers, without scaling; None = as in the others (Gemma 3 has one).
      relative_buckets: rows of the relative-bias table.
      relative_max_distance: distance from which relative positions share a bucket.
      relative_bidirectional: tells future distances apart. Also on for causal models, where it costs half of the
        buckets: a diffusion stage may then start from an AR checkpoint and change only loss and visibility, without
        every future distance being taken for distance 0. Off for the released T5s, whose decoder has all buckets for
        the past; an encoder tells both directions apart in any case.
      relative_per_layer: each layer has a relative bias of its own (umT5, and T5X where layers are scanned) and not one
        for its whole stack.
      max_positions: longest stream; required by learned positions, None = unlimited.
      position_offset: row of the learned table that belongs to position 0; the rows before it are never read. RoBERTa
        counts from the id of its padding token + 1.
      tied_embeddings: the output projection is the input embedding.
      tied_logit_scale: logits are divided by sqrt(D) when tied, as in T5.
      use_bias: biases in all linear layers of the blocks (and in "layernorm").
      qkv_bias: biases in the query, key and value projections (Qwen2).
      attention_output_bias: biases in the output projection of attention.
      mlp_bias: biases in the feed-forward layers.
      head_transform: a linear layer, GELU and norm in front of the output projection (BERT's masked language models).
      head_transform_bias: a bias in that linear layer (ModernBERT has none).
      head_bias: a bias a token on the logits.
      qk_norm: normalises each head's queries and keys (Qwen3).
      embedding_std: standard deviation of fresh embeddings.
      scaled_embeddings: embedded tokens are multiplied by sqrt(D) (Gemma).
      attention_scale: "none" (T5, which initialises the queries smaller instead) or "inverse_sqrt" of the head size.
      attention_scale_size: takes the place of the head size in "inverse_sqrt" (Gemma 2 and 3).
      attention_softcap: soft cap of the attention scores, or None (Gemma 2 uses 50).
      logit_softcap: soft cap of the logits, or None (Gemma 2 uses 30).
      dropout_rate: on embeddings, on what each layer adds to the residual stream, inside the MLP and on the output.
      attention_dropout_rate: on attention probabilities, after the softmax and without renormalising them (XLM-R's
        `attention_probs_dropout_prob`); for attention = "xla" alone.
      vocab_multiple: the embedding has this multiple of rows; those past the vocabulary are never emitted.
      encoder_layers: blocks of the encoder; 0 for single-stream networks.
      self_conditioning: a layer in front of the (decoder) blocks that reads the network's previous prediction, as the
        embedding that it expects (DiffusionGemma); see `nn.layers.SelfConditioning`.
      time_conditioning: a layer in front of the (decoder) blocks that reads the time of each noisy slot; see
        `nn.time_conditioning`.
      dtype: of the computation; softmax, norms and logits are float32 in any case.
      param_dtype: of the stored parameters.
      scan_layers: runs the blocks as a loop of the compiled program (quick to compile) or unrolled (faster on CPU).
        The parameters are stacked either way, so checkpoints do not depend on it.
      remat: what the backward pass keeps: "none" (keeps all), "full", "dots" or "dots_no_batch"; see `nn/remat.py`.
      logits_chunk: most tokens whose logits a device holds at a time.
      attention: implementation, "xla", "cudnn" or "flash": see `attention.attend`.
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
        positive = ("vocab_size", "num_layers", "model_dim", "num_heads", "head_dim", "mlp_dim", "relative_buckets")
        for name in (*positive, "relative_max_distance", "vocab_multiple", "logits_chunk"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"{name} = {value!r} is not a positive whole number",
                where=f"TransformerSpec.{name}",
                fix="Give a whole number from 1 up.",
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(
                value in choices,
                f"{name} = {value!r} is unknown{near_names(str(value), choices)}",
                where=f"TransformerSpec.{name}",
                fix=f"Choose one of {', '.join(choices)}.",
            )
        require(
            self.num_heads % self.kv_heads == 0,
            f"{self.num_heads} query heads cannot share {self.kv_heads} key/value heads evenly",
            where="TransformerSpec.num_kv_heads",
            fix="Choose a divisor of num_heads.",
        )
        require(
            self.position != "rope" or self.head_dim % 2 == 0,
            f"RoPE rotates pairs, and head_dim = {self.head_dim} is odd",
            where="TransformerSpec.head_dim",
            fix="Choose an even head_dim.",
        )
        require(
            self.position != "learned" or self.max_positions is not None,
            "Learned positions need a longest stream",
            where="TransformerSpec.max_positions",
            fix="Bind max_positions, or choose position = 'rope'.",
        )
        require(
            self.position_offset >= 0,
            f"position_offset = {self.position_offset} is negative",
            where="TransformerSpec.position_offset",
            fix="Give the row that belongs to position 0.",
        )
        require(
            self.window is None or self.window >= 1,
            f"window = {self.window} hides a token from itself",
            where="TransformerSpec.window",
            fix="Give a number of tokens from 1 up, or None.",
        )
        if self.window_layers is not None:
            object.__setattr__(self, "window_layers", tuple(self.window_layers))
            require(
                self.window is not None and all(layer >= 0 for layer in self.window_layers),
                f"window_layers = {self.window_layers} are no layers with a window",
                where="TransformerSpec.window_layers",
                fix="Count layers from 0 and bind window too.",
            )
        require(
            self.window_rope_theta is None or self.window_layers is not None,
            f"window_rope_theta = {self.window_rope_theta} is for the window_layers, and none are named",
            where="TransformerSpec.window_rope_theta",
            fix="Bind window_layers, or rope_theta for all layers.",
        )
        require(
            self.max_positions is not None or not isinstance(self.rope_scaling, DynamicRope),
            "RoPE that is stretched with the stream is not stretched up to max_positions, and there are none",
            where="TransformerSpec.max_positions",
            fix="Bind the longest stream of training, or another rope_scaling for longer ones.",
        )
        require(
            self.first_attention_norm or self.norm_placement != "post",
            "A network with its norms behind the layers has none in front of the first one to leave out",
            where="TransformerSpec.first_attention_norm",
            fix="Bind it to True, or choose norm_placement = 'pre'.",
        )
        both_ways = {self.relative_bidirectional, self.relative_bidirectional or self.encoder_layers > 0}
        halves = [self.relative_buckets // (4 if both else 2) for both in both_ways]
        require(
            self.position != "relative_bias" or all(0 < half < self.relative_max_distance for half in halves),
            f"{self.relative_buckets} buckets do not fit relative_max_distance = {self.relative_max_distance}",
            where="TransformerSpec.relative_buckets",
            fix="Give at least 4 buckets and a max distance above a quarter of them.",
        )
        for name in ("dropout_rate", "attention_dropout_rate"):
            require(
                0 <= getattr(self, name) < 1,
                f"{name} = {getattr(self, name)} is not a probability in [0, 1)",
                where=f"TransformerSpec.{name}",
                fix="Choose a rate in [0, 1).",
            )
        require(
            self.attention_dropout_rate == 0 or self.attention == "xla",
            f"attention_dropout_rate = {self.attention_dropout_rate}: attention = {self.attention!r} never writes its "
            "probabilities out, so it cannot drop any",
            where="TransformerSpec.attention",
            fix="Choose 'xla', or attention_dropout_rate = 0.0.",
        )
        require(
            self.encoder_layers >= 0,
            f"encoder_layers = {self.encoder_layers} is negative",
            where="TransformerSpec.encoder_layers",
            fix="Use 0 for single-stream networks.",
        )

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass drops anything."""
        return self.dropout_rate > 0 or self.attention_dropout_rate > 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        """K, the number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
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
        """Whether a norm stands behind the blocks: where they do not end in one themselves."""
        return self.norm_placement != "post"

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        assert self.max_positions is not None
        return self.max_positions + self.position_offset

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype."""
        return jnp.dtype(self.dtype)

    @property
    def logit_scale(self) -> float:
        """The factor in front of the logits."""
        return self.model_dim**-0.5 if self.tied_embeddings and self.tied_logit_scale else 1.0
