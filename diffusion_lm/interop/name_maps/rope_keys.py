"""RoPE as config.json describes it: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files, or both.

Where both are given, `rope_scaling` is used, as in transformers: version 5 replaces `rope_parameters` by it
(`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`), and version 4 reads nothing else.
"""

import math
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.config_keys import COUNT, NUMBER, OBJECT, POSITIVE, config_keys, never, one
from diffusion_lm.interop.name_maps.family import CheckpointConfig, JsonObject, SpecFields, shown
from diffusion_lm.nn.rope import DynamicRope, LinearRope, Llama3Rope, RopeScaling, YarnRope

THETA = 10000.0
"""`rope_theta` of transformers where the files give none."""

ROPE_KEYS = (
    *config_keys(OBJECT, "rope_parameters", "rope_scaling", is_neutral=never),
    *config_keys(POSITIVE, "rope_theta"),
    *config_keys(NUMBER, "partial_rotary_factor", is_neutral=one),
    *config_keys(COUNT, "max_position_embeddings", "original_max_position_embeddings"),
)
"""Keys of config.json that `rope_fields` and `layered_rope` read."""

_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# Keys inside of `rope_parameters` and `rope_scaling`.
_INNER_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale"),
        *("mscale_all_dim", "truncate", "finetuned"),
    )
)
_FULL, _WINDOW = "full_attention", "sliding_attention"


def rope_fields(config: CheckpointConfig) -> SpecFields:
    """Returns `rope_theta` and `rope_scaling` of a network with the same RoPE in all layers."""
    given = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    chosen = given["rope_scaling"] or given["rope_parameters"]
    fields = fields_of(config, chosen)
    if given["rope_scaling"] and given["rope_parameters"] and fields != fields_of(config, given["rope_parameters"]):
        config.note(
            f"rope_scaling {shown(given['rope_scaling'])} with rope_theta {fields['rope_theta']:g} is used; "
            "rope_parameters differs and is not used (as in transformers)"
        )
    return fields


def layered_rope(
    config: CheckpointConfig, *, full: tuple[str, float], window: tuple[str, float], scales_window: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the RoPE parameters of the layers with full attention, and of the layers with a sliding window.

    Args:
      config: the contents of config.json.
      full: key of theta in older files for layers with full attention, and its default.
      window: the same for layers with a sliding window.
      scales_window: whether the class applies `rope_scaling` to layers with a window too (ModernBERT's does, Gemma's
        does not).

    Raises:
      ConfigError: `rope_parameters` is not given per type of layer, or the layers with a window have scaled RoPE.
    """
    given = config.get("rope_parameters", {})
    bad = next((kind for kind, value in given.items() if kind not in (_FULL, _WINDOW) or not _is_object(value)), None)
    if bad is not None:
        raise config.unsupported(
            "rope_parameters", f"supported: one object for {_FULL} and one for {_WINDOW}, not {bad!r}"
        )
    of_full, of_window = ({**(given.get(kind) or {})} for kind in (_FULL, _WINDOW))
    older = config.get("rope_scaling", {})
    if "type" in older and "rope_type" not in older:
        # transformers 4 reads `type` here and 5 does not, so the two versions compute different networks.
        raise config.unsupported("rope_scaling", "use the key rope_type: versions differ in reading type")
    of_full |= older
    of_window |= older if scales_window else {}
    of_full.setdefault("rope_theta", config.get(*full))
    of_window.setdefault("rope_theta", config.get(*window))
    if of_window.get("rope_type", of_window.get("type", "default")) != "default":
        raise config.unsupported(
            "rope_scaling" if scales_window and older else "rope_parameters",
            "supported: no RoPE scaling in layers with a window",
        )
    return of_full, of_window


def fields_of(config: CheckpointConfig, parameters: JsonObject) -> SpecFields:
    """Returns `rope_theta` and `rope_scaling` of one set of parameters."""
    if any(isinstance(value, dict) for value in parameters.values()):
        raise config.unsupported("rope_parameters", "supported: one set of parameters for all layers")
    unknown = next((name for name, value in parameters.items() if name not in _INNER_KEYS and value is not None), None)
    if unknown is not None:
        raise ConfigError(
            f"{config.file}: {unknown} = {shown(parameters[unknown])} of RoPE is not supported",
            where="rope_parameters",
            fix="Use a checkpoint without it.",
        )
    older = {name: value for name in ("rope_theta", "partial_rotary_factor") if (value := config.get(name)) is not None}
    # Values of the set come before the top-level ones of older files.
    parameters = older | {name: value for name, value in parameters.items() if value is not None}
    theta = _number(config, parameters, "rope_theta", THETA)
    share = _number(config, parameters, "partial_rotary_factor", 1.0)
    if share != 1.0:
        raise config.unsupported("partial_rotary_factor", "RoPE rotates whole heads here")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _TYPES:
        raise ConfigError(
            f"{config.file}: rope_type = {shown(rope_type)} is not supported (supported: {', '.join(_TYPES)})",
            where="rope_parameters",
            fix="Use a checkpoint without it.",
        )
    return {"rope_theta": theta, "rope_scaling": _scaling(config, rope_type, parameters)}


def _scaling(config: CheckpointConfig, rope_type: str, parameters: JsonObject) -> RopeScaling | None:
    def number(name: str, default: float | None = None) -> float:
        return _number(config, parameters, name, default)

    if rope_type == "default":
        return None
    if rope_type == "linear":
        return LinearRope(number("factor"))
    if rope_type == "dynamic":
        # Dynamic scaling starts at this length, so a network without it is not defined.
        config.need("max_position_embeddings")
        return DynamicRope(number("factor"))
    if rope_type == "llama3":
        return Llama3Rope(
            number("factor"),
            original_max_positions=_original_length(config, parameters),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    longest, original = config.get("max_position_embeddings"), _original_length(config, parameters)
    factor = number("factor", longest / original if longest else None)
    attention_factor = number("attention_factor", 0.0) or None
    mscale, mscale_all_dim = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if attention_factor is None and mscale and mscale_all_dim:
        # DeepSeek's form of the attention factor: get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim),
        # where get_mscale(factor, m) = 0.1 m ln(factor) + 1, and `magnitude` is get_mscale(factor, 1).
        plain = YarnRope(factor).magnitude - 1.0
        attention_factor = (mscale * plain + 1.0) / (mscale_all_dim * plain + 1.0)
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise _wrong_type(config, "truncate", truncate, "true or false")
    return YarnRope(
        factor,
        original_max_positions=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=truncate,
    )


def _original_length(config: CheckpointConfig, parameters: JsonObject) -> int:
    """Returns the longest sequence before scaling; transformers prefers the top-level key to that of the parameters."""
    name = "original_max_position_embeddings"
    inner, outer = parameters.get(name), config.get(name)
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(
            f"{config.file}: {name} = {shown(outer)} at the top level and {shown(inner)} in the parameters of RoPE",
            where=name,
            fix="Use the config.json that belongs to these weights.",
        )
    value = outer if outer is not None else inner
    value = config.get("max_position_embeddings") if value is None else value
    if value is None:
        raise _missing(config, name)
    if type(value) is not int or value < 1:
        raise _wrong_type(config, name, value, "a whole number above 0")
    return value


def _number(config: CheckpointConfig, parameters: JsonObject, name: str, default: float | None = None) -> float:
    """Returns a number above 0; `default` if it is absent."""
    value = parameters.get(name)
    if value is None and default is None:
        raise _missing(config, name)
    if value is None:
        assert default is not None
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise _wrong_type(config, name, value, "a number above 0")
    return float(value)


def _is_object(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _missing(config: CheckpointConfig, name: str) -> ConfigError:
    return ConfigError(
        f"{config.file}: the key {name!r} of RoPE is missing", where="rope_parameters", fix="Complete the file."
    )


def _wrong_type(config: CheckpointConfig, name: str, value: object, description: str) -> ConfigError:
    return ConfigError(
        f"{config.file}: {name} = {shown(value)} of RoPE must be {description}",
        where="rope_parameters",
        fix="Download the file again, or use the config.json that belongs to these weights.",
    )
