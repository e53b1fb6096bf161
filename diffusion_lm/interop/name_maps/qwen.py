"""Qwen 2 and 2.5 (biases on queries, keys and values), and Qwen 3 (RMSNorm on each head's queries and keys instead)."""

from typing import Any

from diffusion_lm.interop.name_maps import llama
from diffusion_lm.interop.name_maps.config_keys import BOOL, INTEGER, config_keys, off
from diffusion_lm.interop.name_maps.family import CheckpointConfig, Family, SpecFields
from diffusion_lm.nn.transformer import TransformerSpec

_KEYS = (
    *llama.DECODER_KEYS,
    *llama.WINDOW_KEYS,
    *config_keys(INTEGER, "max_window_layers"),
    *config_keys(BOOL, "use_sliding_window", is_neutral=off),
)


def _read_qwen2(config: CheckpointConfig) -> SpecFields:
    fields = llama.decoder_spec(config)
    return fields | {"qkv_bias": True} | _windows(config, fields["num_layers"])


def _write_qwen2(spec: TransformerSpec) -> dict[str, Any]:
    config = llama.decoder_config(spec) | llama.window_config(spec)
    del config["head_dim"]  # Qwen 2's class has no such key: it divides the width by the number of heads
    return config


def _read_qwen3(config: CheckpointConfig) -> SpecFields:
    fields = llama.decoder_spec(config)
    bias = config.get("attention_bias", False)
    fields |= {"head_dim": config.get("head_dim", 128), "qk_norm": True}
    return fields | {"qkv_bias": bias, "attention_output_bias": bias} | _windows(config, fields["num_layers"])


def _write_qwen3(spec: TransformerSpec) -> dict[str, Any]:
    return llama.decoder_config(spec) | llama.window_config(spec) | {"attention_bias": spec.qkv_bias}


def _windows(config: CheckpointConfig, layers: int) -> SpecFields:
    """Returns the window. Published files give `sliding_window`, but it is off unless `use_sliding_window` is true."""
    window, first = config.get_or_null("sliding_window", 4096), config.get("max_window_layers", 28)
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
    read_config=_read_qwen2,
    write_config=_write_qwen2,
    keys=_KEYS,
    tied=llama.TIED,
    ignored_tensors=llama.IGNORED_TENSORS,
)

QWEN3 = Family(
    name="qwen3",
    description="Qwen 3, dense",
    source="arXiv 2505.09388",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    prefix="model.",
    weights=llama.WEIGHTS,
    read_config=_read_qwen3,
    write_config=_write_qwen3,
    keys=(*_KEYS, *config_keys(BOOL, "attention_bias")),
    tied=llama.TIED,
    ignored_tensors=llama.IGNORED_TENSORS,
)
