"""Qwen 2, 2.5 (biases in queries, keys and values) and Qwen 3 (a norm of each head's queries and keys instead)."""

from typing import Any

from diffusion_lm.interop.name_maps import llama
from diffusion_lm.interop.name_maps.family import Config, Family
from diffusion_lm.nn.transformer import TransformerSpec


def _qwen2_spec(config: Config) -> dict[str, Any]:
    fields = llama.decoder_spec(config)
    return fields | {"qkv_bias": True} | _windows(config, fields["num_layers"])


def _qwen2_config(spec: TransformerSpec) -> dict[str, Any]:
    config = llama.decoder_config(spec) | llama.window_config(spec)
    del config["head_dim"]  # Qwen 2 has none: it is the width over the heads
    return config


def _qwen3_spec(config: Config) -> dict[str, Any]:
    fields = llama.decoder_spec(config)
    bias = config.get("attention_bias", False)
    fields |= {"head_dim": config.get("head_dim", 128), "qk_norm": True}
    return fields | {"qkv_bias": bias, "attention_output_bias": bias} | _windows(config, fields["num_layers"])


def _qwen3_config(spec: TransformerSpec) -> dict[str, Any]:
    return llama.decoder_config(spec) | llama.window_config(spec) | {"attention_bias": spec.qkv_bias}


def _windows(config: Config, layers: int) -> dict[str, Any]:
    """Returns the window; Qwen's files name one that is off unless `use_sliding_window` says otherwise."""
    window, first = config.given("sliding_window", 4096), config.get("max_window_layers", 28)
    if not config.get("use_sliding_window", False):
        window = None
    return llama.layer_windows(config, layers, window, lambda layer: layer >= first)


QWEN2 = Family(
    name="qwen2",
    description="Qwen 2 and 2.5, dense",
    source="arXiv 2407.10671, 2412.15115",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    prefix="model.",
    weights=llama.WEIGHTS,
    copies=llama.COPIES,
    ignorable=llama.IGNORABLE,
    spec=_qwen2_spec,
    config=_qwen2_config,
)

QWEN3 = Family(
    name="qwen3",
    description="Qwen 3, dense",
    source="arXiv 2505.09388",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    prefix="model.",
    weights=llama.WEIGHTS,
    copies=llama.COPIES,
    ignorable=llama.IGNORABLE,
    spec=_qwen3_spec,
    config=_qwen3_config,
)
