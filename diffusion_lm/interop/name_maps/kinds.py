"""What kind of value each field of a config.json has to have, checked before any family reads it."""

import math
from collections.abc import Callable
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import Config, shown

_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
_COUNTS = (
    *("vocab_size", "embedding_size", "max_position_embeddings", "max_sequence_length", "n_positions"),
    *_LAYERS,
    *("hidden_size", "d_model", "n_embd", "intermediate_size", "mlp_hidden_size", "d_ff", "n_inner"),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads", "n_kv_heads", "head_dim", "d_kv"),
    *("type_vocab_size", "relative_attention_num_buckets", "relative_attention_max_distance"),
    *("local_attention", "global_attn_every_n_layers", "sliding_window_pattern", "original_max_position_embeddings"),
)
_WHOLE = ("sliding_window", "max_window_layers")
_POSITIVE = (
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "mlp_ratio"),
)
_NUMBERS = ("pretraining_tp", "block_group_size", "partial_rotary_factor")
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id")
_TEXT = (
    *("model_type", "hidden_act", "hidden_activation", "classifier_activation", "activation_function"),
    *("feed_forward_proj", "activation_type", "block_type", "layer_norm_type", "position_embedding_type"),
    *("transformers_version",),
)
_BOOLS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "decoder_bias"),
    *("use_sliding_window", "use_mrope", "use_bidirectional_attention", "is_decoder", "is_encoder_decoder"),
    *("add_cross_attention", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "scale_decoder_outputs"),
    *("alibi", "rope", "weight_tying", "multi_query_attention", "include_bias", "include_qkv_bias", "scale_logits"),
    *("attention_layer_norm", "bias_for_layer_norm", "input_emb_norm", "layer_norm_with_affine"),
)
_LISTS = ("architectures", "layer_types")
_OBJECTS = ("rope_parameters", "rope_scaling")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_ids(value: Any) -> bool:
    """Whether a value may be a special token, or several; `find_specials` compares them with the vocabulary."""
    return _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_COUNTS, lambda value: _is_whole(value) and value > 0, "a whole number above 0"),
    (_WHOLE, _is_whole, "a whole number"),
    (_LAYERS, lambda value: value <= 10_000, "a number up to 10,000"),
    (_POSITIVE, lambda value: _is_number(value) and value > 0, "a number above 0"),
    (_NUMBERS, _is_number, "a number"),
    (_BOOLS, lambda value: isinstance(value, bool), "true or false"),
    (_IDS, _is_ids, "an id (or a list of ids)"),
    (_TEXT, lambda value: isinstance(value, str), "a text"),
    (_LISTS, _is_text_list, "a list of texts"),
    (_OBJECTS, lambda value: isinstance(value, dict), "an object"),
)


def check_kinds(config: Config) -> None:
    """Raises `ConfigError` about the first field whose value no family could read; fields that are null are not given.

    Args:
      config: the contents of a config.json.
    """
    for names, is_kind, kind in _KINDS:
        for name in names:
            value = config.values.get(name)  # not `get`: the fields are looked at here, and read by the family
            if value is not None and not is_kind(value):
                raise ConfigError(
                    f"{config.file} says {name} = {shown(value)}, where {kind} belongs",
                    where=name,
                    fix="Download the file again, or use a checkpoint of a family that has such a value.",
                )
