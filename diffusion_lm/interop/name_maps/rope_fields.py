"""RoPE as config.json says it: `rope_parameters`, or the `rope_theta` and `rope_scaling` of older files, or both.

Where both are given, `rope_scaling` is used, as in transformers: version 5 replaces `rope_parameters` by it
(`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`), and version 4 reads no other.
"""

import math
from collections.abc import Mapping
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import Config, shown
from diffusion_lm.nn.rope import DynamicRope, LinearRope, Llama3Rope, RopeScaling, YarnRope

THETA = 10000.0
"""What transformers takes where the files say nothing."""

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale"),
        *("mscale_all_dim", "truncate", "finetuned"),
    )
)
_FAR, _NEAR = "full_attention", "sliding_attention"


def rope_fields(config: Config) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling` of a network with one RoPE for all layers."""
    given = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    chosen = given["rope_scaling"] or given["rope_parameters"]
    fields = fields_of(config, chosen)
    if given["rope_scaling"] and given["rope_parameters"] and fields != fields_of(config, given["rope_parameters"]):
        config.note(
            f"rope_scaling {shown(given['rope_scaling'])} with rope_theta {fields['rope_theta']:g} is used, and "
            "rope_parameters, which differs, is not (as in transformers)"
        )
    return fields


def layered_rope(
    config: Config, *, far: tuple[str, float], near: tuple[str, float], scales_near: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of the layers that see everything, and of those with a window.

    Args:
      config: the contents of config.json.
      far: the field that older files give theta in for layers that see everything, and theta where they do not.
      near: the same for layers with a window.
      scales_near: whether the class applies `rope_scaling` to layers with a window too (ModernBERT's does, Gemma's
        does not).

    Raises:
      ConfigError: `rope_parameters` are not given by kind of layer, or the layers with a window have scaled RoPE.
    """
    given = config.get("rope_parameters", {})
    bad = next((kind for kind, value in given.items() if kind not in (_FAR, _NEAR) or not _object(value)), None)
    if bad is not None:
        raise config.unsupported(
            "rope_parameters", f"supported: one object for {_FAR} and one for {_NEAR}, not {bad!r}"
        )
    of_far, of_near = ({**(given.get(kind) or {})} for kind in (_FAR, _NEAR))
    older = config.get("rope_scaling", {})
    if "type" in older and "rope_type" not in older:
        # transformers 4 takes `type` for the kind here, and 5 passes over it.
        raise config.unsupported("rope_scaling", "the kind must be called rope_type: versions differ in reading type")
    of_far |= older
    of_near |= older if scales_near else {}
    of_far.setdefault("rope_theta", config.get(*far))
    of_near.setdefault("rope_theta", config.get(*near))
    if of_near.get("rope_type", of_near.get("type", "default")) != "default":
        raise config.unsupported(
            "rope_scaling" if scales_near and older else "rope_parameters", "no scaling in the layers with a window"
        )
    return of_far, of_near


def fields_of(config: Config, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta` and `rope_scaling` of one set of parameters."""
    if any(isinstance(value, dict) for value in parameters.values()):
        raise config.unsupported("rope_parameters", "one set for all layers")
    unknown = next((name for name, value in parameters.items() if name not in _KEYS and value is not None), None)
    if unknown is not None:
        raise ConfigError(
            f"{config.file} says {unknown} = {shown(parameters[unknown])} of RoPE, which this network cannot do",
            where="rope_parameters",
            fix="Use a checkpoint without it.",
        )
    older = {name: value for name in ("rope_theta", "partial_rotary_factor") if (value := config.get(name)) is not None}
    # A set says its own theta, else the file says one for all.
    parameters = older | {name: value for name, value in parameters.items() if value is not None}
    theta = _number(config, parameters, "rope_theta", THETA)
    share = _number(config, parameters, "partial_rotary_factor", 1.0)
    if share != 1.0:
        raise config.unsupported("partial_rotary_factor", "whole heads are rotated")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _KINDS:
        raise ConfigError(
            f"{config.file} says rope_type = {shown(kind)}, which this network cannot do "
            f"(supported: {', '.join(_KINDS)})",
            where="rope_parameters",
            fix="Use a checkpoint without it.",
        )
    return {"rope_theta": theta, "rope_scaling": _scaling(config, kind, parameters)}


def _scaling(config: Config, kind: str, parameters: Mapping[str, Any]) -> RopeScaling | None:
    def number(name: str, default: float | None = None) -> float:
        return _number(config, parameters, name, default)

    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(number("factor"))
    if kind == "dynamic":
        config.need("max_position_embeddings")
        return DynamicRope(number("factor"))
    if kind == "llama3":
        return Llama3Rope(
            number("factor"),
            original_max_positions=_original(config, parameters),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    longest, original = config.get("max_position_embeddings"), _original(config, parameters)
    factor = number("factor", longest / original if longest else None)
    attention_factor = number("attention_factor", 0.0) or None
    scale, all_dim = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if attention_factor is None and scale and all_dim:
        plain = YarnRope(factor).magnitude - 1.0
        attention_factor = (scale * plain + 1.0) / (all_dim * plain + 1.0)
    truncate = parameters.get("truncate", True)
    if not isinstance(truncate, bool):
        raise _wrong(config, "truncate", truncate, "true or false")
    return YarnRope(
        factor,
        original_max_positions=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=truncate,
    )


def _original(config: Config, parameters: Mapping[str, Any]) -> int:
    """Returns the longest stream before the scaling; transformers prefers the field outside of the parameters."""
    name = "original_max_position_embeddings"
    inside, outside = parameters.get(name), config.get(name)
    if inside is not None and outside is not None and inside != outside:
        raise ConfigError(
            f"{config.file} says {name} = {shown(outside)} and, for RoPE, {shown(inside)}",
            where=name,
            fix="Use the config.json that belongs to these weights.",
        )
    value = outside if outside is not None else inside
    value = config.get("max_position_embeddings") if value is None else value
    if value is None:
        raise _missing(config, name)
    if type(value) is not int or value < 1:
        raise _wrong(config, name, value, "a whole number above 0")
    return value


def _number(config: Config, parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a number above 0; `default` where it is absent."""
    value = parameters.get(name)
    if value is None and default is None:
        raise _missing(config, name)
    if value is None:
        assert default is not None
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise _wrong(config, name, value, "a number above 0")
    return float(value)


def _object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _missing(config: Config, name: str) -> ConfigError:
    return ConfigError(f"{config.file} does not say {name!r}", where="rope_parameters", fix="Complete the file.")


def _wrong(config: Config, name: str, value: Any, kind: str) -> ConfigError:
    return ConfigError(
        f"{config.file} says {name} = {shown(value)} of RoPE, where {kind} belongs",
        where="rope_parameters",
        fix="Download the file again, or use the config.json that belongs to these weights.",
    )
