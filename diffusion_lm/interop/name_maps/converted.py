"""Diffusion models that were initialised from autoregressive ones: GPT-2, LLaMA, Qwen 2.5 and Qwen 3.

Each is the family of its base model with other names, and with a `Diffusion` that says how it was trained.
"""

import dataclasses
from collections.abc import Callable

from diffusion_lm.interop.name_maps import gpt2, llama
from diffusion_lm.interop.name_maps.config_keys import BOOL, ConfigKey, config_keys, off
from diffusion_lm.interop.name_maps.family import CheckpointConfig, Diffusion, Family, SpecFields, Weight
from diffusion_lm.interop.name_maps.qwen import QWEN2, QWEN3


def _diffugpt_name(name: str) -> str:
    """Returns the name in `DiscreteDiffusionModel`, which keeps the embedding outside of the stack `denoise_model`."""
    return name.replace("transformer.wte.", "embed_tokens.").replace("transformer.", "denoise_model.")


def _renamed(weight: Weight) -> Weight:
    return dataclasses.replace(weight, tensor=_diffugpt_name(weight.tensor))


def _without_windows(family: Family) -> Callable[[CheckpointConfig], SpecFields]:
    """Returns the family's `read_config` for models whose code has no sliding window: enabling one is refused."""

    def read_config(config: CheckpointConfig) -> SpecFields:
        config.refuse(use_sliding_window=False, use_mrope=False)
        return family.read_config(config)

    return read_config


_MROPE_KEYS = config_keys(BOOL, "use_mrope", is_neutral=off)


DIFFUGPT = dataclasses.replace(
    gpt2.FAMILY,
    name="diffugpt",
    description="DiffuGPT, from GPT-2: masked diffusion, full attention, shifted",
    source="arXiv 2410.17891",
    prefix="",
    weights=tuple(_renamed(weight) for weight in gpt2.FAMILY.weights),
    tied=tuple((_diffugpt_name(copy), _diffugpt_name(name)) for copy, name in gpt2.FAMILY.tied),
    ignored_tensors=(r"denoise_model\.h\.\d+\.attn\.(bias|masked_bias)",),
    causal=False,
    signature=r"denoise_model\.h\..*",
    # The medium model has an extra row for MASK, which its config.json, GPT-2's, does not count.
    vocab_tensor="embed_tokens.weight",
    diffusion=Diffusion(
        shifted=True,
        objective="diffullama",
        sampler="diffullama_random_keep",
        mask_ids=((50257, 10541), (50258, 50257)),
        code="github.com/HKUNLP/DiffuLLaMA",
    ),
)

DIFFULLAMA = dataclasses.replace(
    llama.LLAMA,
    name="diffullama",
    description="DiffuLLaMA, from LLaMA 2: masked diffusion, full attention, shifted; plain LLaMA files need --layout",
    source="arXiv 2410.17891",
    # The published files have LLaMA's names. A model that is saved by the training code has these.
    old_names=((r"^model\.embed_tokens\.", "embed_tokens."), (r"^model\.(layers|norm)\.", r"denoise_model.\1.")),
    ignored_tensors=(*llama.IGNORED_TENSORS, r"denoise_model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    causal=False,
    signature=r"denoise_model\.layers\..*",
    diffusion=Diffusion(
        shifted=True, objective="diffullama", sampler="diffullama_random_keep", mask_ids=((32000, 811),)
    ),
)

DREAM = dataclasses.replace(
    QWEN2,
    name="dream",
    description="Dream 7B, Dream-Coder and DiffuCoder, from Qwen 2.5: masked diffusion, full attention, shifted",
    source="arXiv 2508.15487, 2506.20639",
    model_types=("Dream",),
    architectures=("DreamModel",),
    read_config=_without_windows(QWEN2),
    keys=(*QWEN2.keys, *_MROPE_KEYS),
    causal=False,
    diffusion=Diffusion(
        shifted=True,
        objective="dream",
        sampler="dream_entropy",
        mask_ids=((152064, 151666),),
        code="Dream-org/Dream-v0-Base-7B",
    ),
)

SDAR = dataclasses.replace(
    QWEN3,
    name="sdar",
    description="SDAR, dense, from Qwen 3: block diffusion, same position",
    source="arXiv 2510.06303",
    model_types=("sdar",),
    architectures=("SDARForCausalLM",),
    read_config=_without_windows(QWEN3),
    keys=(*QWEN3.keys, *_MROPE_KEYS, ConfigKey("block_size")),
    causal=False,
    diffusion=Diffusion(
        shifted=False,
        objective="sdar",
        sampler="sdar",
        mask_ids=((151936, 151669),),
        block_key="block_size",
        block_size=4,
        code="JetLM/SDAR-1.7B-Chat",
    ),
)

FAST_DLLM_V2 = dataclasses.replace(
    QWEN2,
    name="fast-dllm-v2",
    description="Fast-dLLM v2, from Qwen 2.5: block diffusion, shifted",
    source="arXiv 2509.26328",
    model_types=("Fast_dLLM_Qwen",),
    architectures=("Fast_dLLM_QwenForCausalLM",),
    read_config=_without_windows(QWEN2),
    keys=(*QWEN2.keys, *_MROPE_KEYS, ConfigKey("bd_size")),
    causal=False,
    diffusion=Diffusion(
        shifted=True,
        objective="fast_dllm_v2",
        sampler="fast_dllm_v2",
        mask_ids=((151936, 151665), (152064, 151665)),
        block_key="bd_size",
        block_size=32,
        sub_block=8,
        code="Efficient-Large-Model/Fast_dLLM_v2_7B",
    ),
)

CONVERTED: tuple[Family, ...] = (DIFFUGPT, DIFFULLAMA, DREAM, SDAR, FAST_DLLM_V2)
