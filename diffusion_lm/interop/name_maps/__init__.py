"""The families of released checkpoints: one file per family, and the choice of a family by config.json and tensors."""

import re
from collections.abc import Iterable

from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.interop.name_maps.bert import FAMILY as BERT
from diffusion_lm.interop.name_maps.converted import CONVERTED
from diffusion_lm.interop.name_maps.family import CheckpointConfig, Family
from diffusion_lm.interop.name_maps.gemma import GEMMA, GEMMA2, GEMMA3
from diffusion_lm.interop.name_maps.gpt2 import FAMILY as GPT2
from diffusion_lm.interop.name_maps.llada import LLADA
from diffusion_lm.interop.name_maps.llama import LLAMA, MISTRAL
from diffusion_lm.interop.name_maps.modernbert import FAMILY as MODERNBERT
from diffusion_lm.interop.name_maps.qwen import QWEN2, QWEN3
from diffusion_lm.interop.name_maps.roberta import ROBERTA, XLM_ROBERTA_XL
from diffusion_lm.interop.name_maps.t5 import MT5, T5, UMT5

FAMILIES: tuple[Family, ...] = (
    *(GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3),
    *(BERT, ROBERTA, XLM_ROBERTA_XL, MODERNBERT),
    *(T5, MT5, UMT5),
    *(LLADA, *CONVERTED),
)
HINT = "diffusion_lm"
"""The key of config.json that `export` adds: how a diffusion model was trained. transformers ignores it."""

# Several families can have one model type. The first one is used if neither tensors nor `HINT` identify one.
_BY_TYPE = {name: family for family in reversed(FAMILIES) for name in family.model_types}
_BY_NAME = {family.name: family for family in FAMILIES}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: CheckpointConfig, tensors: Iterable[str] = (), layout: str | None = None) -> Family:
    """Returns the family of a config.json.

    Args:
      config: its contents.
      tensors: names of the checkpoint's tensors, which distinguish families of one model type.
      layout: name of the family, where the caller knows it; None = identify it.

    Raises:
      ConfigError: the family is unknown, a mixture of experts, quantised, or has another head.
    """
    kind = config.get("model_type", "")
    experts = next((name for name in _EXPERTS if config.get(name, 0)), None)
    if experts is not None or any(word in kind for word in ("moe", "mixtral")):
        count = f", {experts} = {config.get(experts)}" if experts else ""
        raise ConfigError(
            f"{config.file}: a mixture of experts (model_type = {kind!r}{count}) is not supported",
            where="model_type",
            fix="Use a dense checkpoint.",
        )
    if kind not in _BY_TYPE:
        raise ConfigError(
            f"{config.file}: model_type = {kind!r} is not a known family{near_names(kind, _BY_TYPE)}",
            where="model_type",
            fix=f"Known: {', '.join(_BY_TYPE)}. To add a family, write a table in interop/name_maps.",
        )
    if config.get("quantization_config"):
        raise config.unsupported("quantization_config", "supported: unquantised weights")
    family = _chosen(config, kind, tuple(tensors), layout)
    classes = config.get("architectures", [])
    if classes and not set(classes) & set(family.architectures):
        raise ConfigError(
            f"{config.file}: architectures = {classes} has no language model head"
            f"{near_names(classes[0], family.architectures)}",
            where="architectures",
            fix=f"Use a checkpoint of {' or '.join(family.architectures)}.",
        )
    return family


def _chosen(config: CheckpointConfig, kind: str, tensors: tuple[str, ...], layout: str | None) -> Family:
    """Returns the family of this model type: the named one, or the one that the tensors or `HINT` identify."""
    same = [family for family in FAMILIES if kind in family.model_types]
    if layout is not None:
        named = _BY_NAME.get(layout)
        if named is None or named not in same:
            raise ConfigError(
                f"{config.file}: model_type = {kind!r} does not belong to the layout {layout!r}",
                where="--layout",
                fix=f"Leave it out, or choose one of {', '.join(family.name for family in same)}.",
            )
        return named
    for family in same:
        if family.signature and any(re.fullmatch(family.signature, name) for name in tensors):
            return family
    hint = config.get(HINT, {})
    name = hint.get("layout") if isinstance(hint, dict) else None
    return next((family for family in same if family.name == name), _BY_TYPE[kind])
