"""GGUF files of the fixtures, written with the `gguf` package: its writer, its names of tensors, its quantisation."""

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GPT2LMHeadModel": "gpt2",
}
F32, F16, BF16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0"))


def write_gguf(
    source: pathlib.Path,
    path: pathlib.Path,
    kind: gguf.GGMLQuantizationType = F32,
    *,
    drop: tuple[str, ...] = (),
    add: dict[str, np.ndarray] | None = None,
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes the checkpoint folder `source` as llama.cpp's converter does.

    Args:
      source: a Hugging Face folder.
      path: the file.
      kind: how matrices are stored whose rows it divides; vectors stay F32.
      drop: tensors (by their names in the file) to leave out.
      add: further tensors.
      raw: bytes of quantised tensors, and their kind.
      metadata: further keys; None leaves one out.
    """
    config = json.loads((source / "config.json").read_text())
    name = _ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, name)
    for key, value in (_metadata(name, config) | (metadata or {})).items():
        _add(writer, key, value)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, layers)
    for theirs, tensor in safetensors.numpy.load_file(source / "model.safetensors").items():
        module, _, part = theirs.rpartition(".")
        called = f"{names.get_name(module)}.{part}"
        assert not called.startswith("None"), theirs
        if called in drop or called in (raw or {}):
            continue
        _tensor(writer, called, _as_llama_cpp_stores(name, config, theirs, tensor), kind)
    for called, tensor in (add or {}).items():
        _tensor(writer, called, tensor, F32)
    for called, (data, stored) in (raw or {}).items():
        writer.add_tensor(called, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(name: str, config: dict[str, Any]) -> dict[str, Any]:
    if name == "gpt2":
        numbers = {
            "block_count": config["n_layer"],
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    else:
        rope = config.get("rope_parameters") or {}
        far = rope.get("full_attention", rope)
        heads = config["num_attention_heads"]
        numbers = {
            "block_count": config["num_hidden_layers"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": heads,
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
            "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "rope.freq_base": float(far["rope_theta"]),
            "attn_logit_softcapping": config.get("attn_logit_softcapping"),
            "final_logit_softcapping": config.get("final_logit_softcapping"),
            "attention.sliding_window": config.get("sliding_window") if "gemma" in name else None,
        }
        if far.get("rope_type") in ("linear", "yarn"):
            numbers |= {"rope.scaling.type": far["rope_type"], "rope.scaling.factor": float(far["factor"])}
            original = far.get("original_max_position_embeddings")
            numbers |= {"rope.scaling.original_context_length": original} if original else {}
        if "sliding_attention" in rope:
            numbers["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
            numbers["attention.sliding_window_pattern"] = [
                kind == "sliding_attention" for kind in config["layer_types"]
            ]
    specials = {"bos": config.get("bos_token_id"), "eos": config.get("eos_token_id")}
    own = {f"{name}.{key}": value for key, value in numbers.items()}
    return own | {f"tokenizer.ggml.{role}_token_id": token for role, token in specials.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def _as_llama_cpp_stores(name: str, config: dict[str, Any], theirs: str, tensor: np.ndarray) -> np.ndarray:
    if name == "gpt2" and theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(tensor.T)
    if name.startswith("gemma") and theirs.endswith("norm.weight"):
        return tensor + 1
    if name == "llama" and ".self_attn.q_proj." in theirs:
        return _pairs(tensor, config["num_attention_heads"])
    if name == "llama" and ".self_attn.k_proj." in theirs:
        return _pairs(tensor, config["num_key_value_heads"])
    return tensor


def _pairs(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: what RoPE rotates together stands together, where the two halves of a head were."""
    size = len(tensor) // heads
    order = [head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2)
             for half in range(2)]  # fmt: skip
    return tensor[order]


def _tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    block = gguf.GGML_QUANT_SIZES[kind][0]
    stored = kind if tensor.ndim == 2 and tensor.shape[-1] % block == 0 else F32
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(tensor, np.float32), stored), raw_dtype=stored)
