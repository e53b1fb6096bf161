"""Which fields of a config.json may stay unread: every other one is read, refused, or reported.

A class of transformers gives each field of config.json a meaning, or ignores it. A field that changes the computation
and is passed over here would make another network of the same weights, without a word. So each field is in one of four
sets: read by the family (`Config.asked`), `HARMLESS`, `NEUTRAL` (refused unless its value changes nothing), or unknown,
which is reported with the import.
"""

import re
from collections.abc import Callable
from typing import Any

from diffusion_lm.interop.name_maps.family import Config

_HARMLESS = (
    # Names, versions, storage, code that is never run.
    r"architectures|model_type|auto_map|_name_or_path|name_or_path|_commit_hash|torch_dtype|dtype|.*transformers_version",
    r"torchscript|model_name|model_id|license|tokenizer_class|tokenizer_config|use_bfloat16|use_auth_token|precision",
    r"_attn_implementation.*|attn_implementation|use_flash_attention.*|flash_attention|flash_attn.*|.*_flash_attn|attn_impl",
    r"use_cache|cache_implementation|return_dict|return_dict_in_generate|output_.*|gradient_checkpointing|use_return_dict",
    r"is_llama_config|transformers\.js_config|repad_logits_with_grad|reference_compile|fused_.*|fuse_cross_entropy|unsloth_.*|.*_version|pruned_heads|tp_degree|base_model_.*_plan",
    # Training: initial values, dropout, losses, labels and heads that are not the language model.
    r"init_.*|initializer_.*|.*dropout.*|.*_pdrop|dropout|label_smoothing.*|z_loss.*|router_aux_loss_coef",
    r"id2label|label2id|num_labels|problem_type|finetuning_task|classifier_.*|summary_.*|pooler_.*|directionality",
    r"sparse_prediction|sparse_pred_ignore_index|deterministic_flash_attn|chunk_size_feed_forward|n_ctx|n_positions|embd_layer",
    r"task_specific_params|prefix|keys_to_ignore_at_inference|reorder_and_upcast_attn|rope_full_precision|is_composition",
    # Special tokens are read by `find_specials`; their number is that of the rows.
    r".*_token_id|.*_token_ids|.*_token_index|.*_token_indices|.*_token|extra_ids",
    # What decodes, which a run folder's sampler says instead.
    r"do_sample|temperature|top_k|top_p|min_p|typical_p|epsilon_cutoff|eta_cutoff|num_beams|num_beam_groups|beam_.*",
    r"max_length|min_length|max_new_tokens|min_new_tokens|max_time|early_stopping|num_return_sequences|penalty_alpha",
    r"length_penalty|repetition_penalty|diversity_penalty|.*no_repeat_ngram_size|bad_words_ids|suppress_.*|begin_suppress.*",
    r"remove_invalid_values|exponential_decay_length_penalty|forced_.*|low_memory|generation_.*|guidance_scale",
    # What has tensors of its own: the tables of weights find them, or miss them.
    r"attention_bias|mlp_bias|qkv_bias|use_bias|bias|tie_encoder_decoder|num_nextn_predict_layers|type_vocab_size",
    # Written by transformers from fields that are read.
    r"dense_act_fn|is_gated_act|_sliding_window_pattern|vocab_size|max_position_embeddings|max_sequence_length",
    # LLaDA's, each of a part that is refused or that has no effect without one.
    r"alibi_bias_max|attention_layer_norm_with_affine|mlp_ratio",
)
HARMLESS = re.compile("|".join(f"(?:{pattern})" for pattern in _HARMLESS))
"""Names of fields that change nothing in the network that the weights make."""


def _off(value: Any) -> bool:
    return value is False


def _is(number: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and value == number


def _never(value: Any) -> bool:
    return False


NEUTRAL: dict[str, Callable[[Any], bool]] = {
    # Attention: which tokens, and how the scores are made.
    "layer_types": lambda value: all(kind in ("full_attention", "attention") for kind in value),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window"), _never),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention", "is_causal", "attention_sinks"), _off),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "softcap"), _never),
    **dict.fromkeys(("query_pre_attn_scalar", "attention_multiplier", "attn_scale", "softmax_scale"), _never),
    **dict.fromkeys(("clip_qkv", "attn_temperature_tuning", "attention_scale", "logn_attn"), _off),
    **dict.fromkeys(("use_logn_attn", "use_qk_norm", "qk_norm", "qk_layernorm", "use_attention_sinks"), _off),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "scale_attention_softmax_in_fp32_only"), _off),
    # Positions.
    **dict.fromkeys(("rope_parameters", "rope_scaling", "rope_ratio", "rotary_dim", "no_rope_layers"), _never),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_percent"), _is(1)),
    **dict.fromkeys(
        ("alibi", "use_alibi", "use_mrope", "rope_interleave", "rope_interleaved", "use_dynamic_ntk"), _off
    ),
    "position_embedding_type": lambda value: value in ("absolute", "rope"),
    # Scales that some families multiply by.
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), _is(1)),
    **dict.fromkeys(("lm_head_multiplier", "key_multiplier", "attention_in_multiplier", "scale_emb"), _is(1)),
    **dict.fromkeys(("attention_out_multiplier", "mup_width_scale", "width_scale", "embedding_scale"), _is(1)),
    **dict.fromkeys(("scale_depth", "dim_model_base", "mup_base_width", "residual_scale", "mlp_multipliers"), _never),
    **dict.fromkeys(("scale_embedding", "scale_logits", "normalize_embedding", "apply_residual_connection_post"), _off),
    # The order of layers, and what is in them.
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "parallel_block", "new_decoder_architecture"), _off),
    **dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder", "apply_layernorm_1p"), _off),
    **dict.fromkeys(("mlp_layer_types", "block_configs", "per_layer_config", "num_kv_shared_layers"), _never),
    **dict.fromkeys(("moe_intermediate_size", "num_experts_per_tok", "kv_lora_rank", "q_lora_rank"), _never),
    **dict.fromkeys(("layer_norm_type", "norm_type", "block_type", "mlp_type", "attention_type"), _never),
    # GPT-2's class does not read it; LLaMA's reads it as the number of slices that are summed in another order.
    "pretraining_tp": _is(1),
}
"""Fields that change the network of some family, and the values that change nothing; null changes nothing in any."""


def unread_fields(config: Config, family: str) -> tuple[str, ...]:
    """Returns the fields that are neither read nor known to be harmless.

    Args:
      config: of which the family has read what it reads.
      family: its name, for the error.

    Raises:
      ConfigError: such a field is known to change networks of other families, and its value is not neutral.
    """
    unknown = []
    for name, value in config.values.items():
        if name in config.asked or value is None or HARMLESS.fullmatch(name):
            continue
        if name not in NEUTRAL:
            unknown.append(name)
        elif not NEUTRAL[name](value):
            raise config.unsupported(name, f"networks of the family {family} have no such thing")
    return tuple(sorted(unknown))
