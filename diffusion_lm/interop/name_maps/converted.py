"""Diffusion models that began as autoregressive ones and kept their shape: GPT-2, LLaMA, Qwen 2.5 and Qwen 3."""

import dataclasses
from collections.abc import Callable
from typing import Any

from diffusion_lm.interop.name_maps import gpt2, llama
from diffusion_lm.interop.name_maps.family import Config, Diffusion, Family, Weight
from diffusion_lm.interop.name_maps.qwen import QWEN2, QWEN3


def _diffugpt_name(name: str) -> str:
    """Returns what `DiscreteDiffusionModel` calls a tensor of GPT-2: the table stands apart from the stack."""
    return name.replace("transformer.wte.", "embed_tokens.").replace("transformer.", "denoise_model.")


def _renamed(weight: Weight) -> Weight:
    return dataclasses.replace(weight, theirs=_diffugpt_name(weight.theirs))


def _without_windows(family: Family) -> Callable[[Config], dict[str, Any]]:
    """Returns the family's `spec` for models whose code shows every token of a block whatever their files say."""

    def spec(config: Config) -> dict[str, Any]:
        config.refuse(use_sliding_window=False, use_mrope=False)
        return family.spec(config)

    return spec


DIFFUGPT = dataclasses.replace(
    gpt2.FAMILY,
    name="diffugpt",
    description="DiffuGPT, from GPT-2: masked diffusion, full visibility, shifted",
    source="arXiv 2410.17891",
    prefix="",
    weights=tuple(_renamed(weight) for weight in gpt2.FAMILY.weights),
    copies=tuple((_diffugpt_name(copy), _diffugpt_name(name)) for copy, name in gpt2.FAMILY.copies),
    ignorable=(r"denoise_model\.h\.\d+\.attn\.(bias|masked_bias)",),
    causal=False,
    signature=r"denoise_model\.h\..*",
    # A row for MASK was added to the medium model, and its config.json is GPT-2's.
    rows="embed_tokens.weight",
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
    description="DiffuLLaMA, from LLaMA 2: masked diffusion, full visibility, shifted; plain LLaMA files need --layout",
    source="arXiv 2410.17891",
    # The published files have LLaMA's names; a model saved from the training code has these.
    renames=((r"^model\.embed_tokens\.", "embed_tokens."), (r"^model\.(layers|norm)\.", r"denoise_model.\1.")),
    ignorable=(*llama.IGNORABLE, r"denoise_model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    causal=False,
    signature=r"denoise_model\.layers\..*",
    diffusion=Diffusion(
        shifted=True, objective="diffullama", sampler="diffullama_random_keep", mask_ids=((32000, 811),)
    ),
)

DREAM = dataclasses.replace(
    QWEN2,
    name="dream",
    description="Dream 7B, Dream-Coder and DiffuCoder, from Qwen 2.5: masked diffusion, full visibility, shifted",
    source="arXiv 2508.15487, 2506.20639",
    model_types=("Dream",),
    architectures=("DreamModel",),
    spec=_without_windows(QWEN2),
    causal=False,
    diffusion=Diffusion(
        shifted=True,
        objective="dream",
        sampler="dream_entropy",
        mask_ids=((152064, 151666),),
        names_eos=True,
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
    spec=_without_windows(QWEN3),
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
    spec=_without_windows(QWEN2),
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
