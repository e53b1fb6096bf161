"""Checks every key of a config.json: it is read by the family, known to be harmless, refused, or reported.

A class of transformers gives each key of config.json a meaning or ignores it. A key that changes the computation and is
passed over here would silently make another network of the same weights. So each key is one of:

- read by the family (`CheckpointConfig.read`);
- ignored: it changes nothing in the family's network (`IGNORED_KEYS`, `Family.ignored_keys`);
- known to change networks, but not read by this family: refused unless its value is neutral. These are the keys that
  other families read (`ConfigKey.is_neutral`) and `UNSUPPORTED_KEYS`;
- unknown: reported with the import.
"""

import re
from collections.abc import Callable

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps import FAMILIES
from diffusion_lm.interop.name_maps.config_keys import STRING, STRINGS, TOKEN_IDS, config_keys, never, off, one
from diffusion_lm.interop.name_maps.family import CheckpointConfig, Family, shown

_IGNORED = (
    # Names, versions, storage, code that is never run.
    r"architectures|model_type|auto_map|_name_or_path|name_or_path|_commit_hash|torch_dtype|dtype",
    r"use_return_dict|torchscript|model_name|model_id|license|tokenizer_class|tokenizer_config|use_bfloat16|use_auth_token",
    r"_attn_implementation.*|attn_implementation|use_flash_attention.*|flash_attn.*|.*_flash_attn|attn_impl",
    r"use_cache|cache_implementation|return_dict|return_dict_in_generate|output_.*|gradient_checkpointing",
    r"transformers\.js_config|fused_.*|fuse_cross_entropy|unsloth_.*|.*_version|pruned_heads|tp_degree",
    r"base_model_.*_plan",
    # Training: initial values, dropout, losses, labels and heads that are not the language model.
    r"init_.*|initializer_.*|.*dropout.*|.*_pdrop|dropout|label_smoothing.*|z_loss.*|router_aux_loss_coef",
    r"id2label|label2id|num_labels|problem_type|finetuning_task|embd_layer|chunk_size_feed_forward",
    r"task_specific_params|prefix|tie_encoder_decoder|keys_to_ignore_at_inference|is_composition",
    # Special tokens are read by `find_specials`; the vocabulary size is checked against the embedding.
    r".*_token_id|.*_token_ids|.*_token_index|.*_token_indices|.*_token",
    # Decoding settings; the sampler of a run directory has its own.
    r"do_sample|temperature|top_k|top_p|min_p|typical_p|epsilon_cutoff|eta_cutoff|num_beams|num_beam_groups|beam_.*",
    r"max_length|min_length|max_new_tokens|min_new_tokens|max_time|early_stopping|num_return_sequences|penalty_alpha",
    r"length_penalty|repetition_penalty|diversity_penalty|.*no_repeat_ngram_size|bad_words_ids",
    r"suppress_.*|begin_suppress.*|remove_invalid_values|exponential_decay_length_penalty|forced_.*|low_memory|generation_.*|guidance_scale",
    # Parts with tensors of their own: the table of weights finds such a tensor in the files, or reports it missing.
    r"attention_bias|mlp_bias|qkv_bias|use_bias|bias|num_nextn_predict_layers",
    # Sizes that the shapes of the tensors confirm, and lengths that change nothing without scaled RoPE.
    r"vocab_size|max_position_embeddings|max_sequence_length",
)
IGNORED_KEYS = re.compile("|".join(f"(?:{pattern})" for pattern in _IGNORED))
"""Keys that change nothing in the network of any family."""

UNSUPPORTED_KEYS: dict[str, Callable[[object], bool]] = {
    # Attention: which tokens, and how the scores are computed.
    **dict.fromkeys(("attention_chunk_size", "window_size", "attention_window"), never),
    **dict.fromkeys(("is_causal", "attention_sinks", "use_attention_sinks"), off),
    **dict.fromkeys(("logit_softcapping", "softcap", "attention_multiplier", "attn_scale", "softmax_scale"), never),
    **dict.fromkeys(("clip_qkv", "attn_temperature_tuning", "attention_scale", "logn_attn", "use_logn_attn"), off),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "scale_attention_softmax_in_fp32_only"), off),
    # Positions.
    **dict.fromkeys(("rope_ratio", "rotary_dim", "no_rope_layers"), never),
    **dict.fromkeys(("rotary_pct", "rotary_percent"), one),
    **dict.fromkeys(("use_alibi", "rope_interleave", "rope_interleaved", "use_dynamic_ntk"), off),
    # Factors on embeddings, residuals and logits (Granite, MiniCPM, Falcon-H1, muP).
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), one),
    **dict.fromkeys(("lm_head_multiplier", "key_multiplier", "attention_in_multiplier", "scale_emb"), one),
    **dict.fromkeys(("attention_out_multiplier", "mup_width_scale", "width_scale", "embedding_scale"), one),
    **dict.fromkeys(("scale_depth", "dim_model_base", "mup_base_width", "residual_scale", "mlp_multipliers"), never),
    **dict.fromkeys(("scale_embedding", "normalize_embedding", "apply_residual_connection_post"), off),
    # The order of layers, and what is in them.
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "parallel_block", "new_decoder_architecture"), off),
    "apply_layernorm_1p": off,
    **dict.fromkeys(("mlp_layer_types", "block_configs", "per_layer_config", "num_kv_shared_layers"), never),
    **dict.fromkeys(("moe_intermediate_size", "num_experts_per_tok", "kv_lora_rank", "q_lora_rank"), never),
    **dict.fromkeys(("norm_type", "mlp_type", "attention_type"), never),
}
"""Keys that change networks of families that are not implemented here, and the test for values that change nothing."""

# Read for every family, by `family_of` and `find_specials`.
_COMMON = (
    *config_keys(STRING, "model_type", "transformers_version"),
    *config_keys(STRINGS, "architectures"),
    *config_keys(TOKEN_IDS, "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id"),
)
_DECLARED = {key.name: key for key in (*_COMMON, *(key for family in FAMILIES for key in family.keys))}


def check_types(config: CheckpointConfig) -> None:
    """Raises `ConfigError` about the first value whose type no family could read; null counts as absent.

    A key has one type in all classes of transformers, so this runs before the family is known.
    """
    for key in _DECLARED.values():
        value = config.values.get(key.name)  # not `get`: only the family's reading counts as reading
        if value is not None and key.type is not None and not key.type.accepts(value):
            raise ConfigError(
                f"{config.file}: {key.name} = {shown(value)} must be {key.type.description}",
                where=key.name,
                fix="Download the file again, or use a checkpoint of a family that has such a value.",
            )


def unread_keys(config: CheckpointConfig, family: Family) -> tuple[str, ...]:
    """Returns the keys that the family does not read and that are not known to be harmless.

    Args:
      config: from which the family has read what it reads.
      family: whose config it is.

    Raises:
      ConfigError: such a key is known to change networks, and its value is not neutral.
    """
    unknown = []
    for name, value in config.values.items():
        if name in config.read or value is None or _is_ignored(name, family):
            continue
        is_neutral = UNSUPPORTED_KEYS.get(name) or (_DECLARED[name].is_neutral if name in _DECLARED else None)
        if is_neutral is None:
            unknown.append(name)
        elif not is_neutral(value):
            raise config.unsupported(name, f"the family {family.name} does not have it")
    return tuple(sorted(unknown))


def _is_ignored(name: str, family: Family) -> bool:
    own = any(re.fullmatch(pattern, name) for pattern in family.ignored_keys)
    return own or IGNORED_KEYS.fullmatch(name) is not None
