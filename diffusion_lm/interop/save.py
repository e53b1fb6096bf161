"""Writes a network as a Hugging Face checkpoint, by the same tables of `name_maps` that `load` reads with."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_lm.architectures.base import Architecture
from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.core.files import write_json
from diffusion_lm.core.types import Params
from diffusion_lm.interop.name_maps import FAMILIES, HINT
from diffusion_lm.interop.name_maps.family import CONFIG, CheckpointConfig, Family, JsonObject, Weight
from diffusion_lm.nn.transformer import TransformerSpec

SHARD_BYTES = 5 * 10**9
"""Largest size of one file in bytes, as in transformers."""

_REFERENCES = ("auto_map", "_name_or_path", "transformers_version", "quantization_config")
"""Keys of an imported config.json that do not apply to an export: `auto_map` names code that is not written."""

# Fields of `TransformerSpec` that config.json does not have: how the network is run, initialised and stored here.
_OURS = (
    *("dtype", "param_dtype", "dropout_rate", "vocab_multiple", "scan_layers", "remat", "logits_chunk", "attention"),
    *("embedding_std", "attention_dropout_rate"),
)


def save(
    folder: str | Path,
    architecture: Architecture,
    params: Params,
    *,
    family: str | None = None,
    config: JsonObject | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    trained_as: Mapping[str, object] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Writes config.json and safetensors files that `transformers` reads.

    Args:
      folder: folder to write; absent or empty. It is renamed into place when it is complete.
      architecture: the network.
      params: its parameters.
      family: a family or model type of `name_maps`; None = the first family with networks of this shape.
      config: further contents of config.json, such as special tokens. Keys that follow from the network override it.
      dtype: dtype of the weights in the files, "float32" or "bfloat16"; None = that of `params`.
      shard_bytes: largest size of one file in bytes.
      trained_as: of a diffusion model: `mask_token_id`, `block_size`, and what else config.json should contain.
      files: further files of the folder, by name.

    Returns:
      The `model_type` that was written.

    Raises:
      ConfigError: the named family, or every family, cannot hold this network, or the folder is not empty.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists and is not empty", where="--to", fix="Give a new folder.")
    chosen, kind = family_for(architecture.spec, family)
    unknown = _paths(architecture.abstract_params()) - {weight.param for weight in chosen.weights}
    if unknown:
        raise ConfigError(
            f"the family {chosen.name} has no tensors for {', '.join(sorted(unknown)[:3])}",
            where="--layout",
            fix="Export a run of the plain network, without learned schedules or other additions.",
        )
    # Written under another name and renamed, so that an interrupted export leaves no folder that looks complete.
    temporary = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary, chosen, architecture.spec, params, dtype, shard_bytes)
        write_json(temporary / CONFIG, _full_config(architecture.spec, chosen, kind, config, dtype, trained_as))
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return kind


def differences(spec: TransformerSpec, family: Family) -> list[str]:
    """Returns the fields that a round trip through this family's config.json would change, in words."""
    try:
        read = TransformerSpec(**family.read_config(CheckpointConfig(family.write_config(spec))))
    except (ConfigError, KeyError) as error:
        return [str(error)]
    found = []
    for name in TransformerSpec.__dataclass_fields__:
        if name in _OURS:
            continue
        ours, theirs = _canonical(spec, name), _canonical(read, name)
        if ours != theirs:
            found.append(f"{name} = {ours!r}, not {theirs!r}")
    return found


def _canonical(spec: TransformerSpec, name: str) -> object:
    """Returns a value that is equal for equal networks: several values of some fields describe the same network."""
    match name:
        case "num_kv_heads":
            return spec.kv_heads
        case "qkv_bias" | "attention_output_bias" | "mlp_bias":
            return getattr(spec, f"has_{name}")
        case "gelu":
            return spec.gelu if "gelu" in spec.mlp or "geglu" in spec.mlp or spec.head_transform else None
        case "tied_logit_scale":
            return spec.logit_scale
        case "head_transform_bias":
            return spec.head_transform and spec.head_transform_bias
        case "window_layers":
            return spec.window_layers if spec.window else None
        case "rope_scaling":
            scaling = spec.rope_scaling
            size = (spec.head_dim, spec.rope_theta)
            return None if scaling is None else (scaling.frequencies(*size).tolist(), scaling.magnitude)
        case "max_positions":
            return spec.max_positions if spec.position == "learned" else None
        case "attention_scale_size":
            return spec.head_dim if spec.attention_scale_size is None else spec.attention_scale_size
        case "relative_buckets" | "relative_max_distance" | "relative_bidirectional" | "relative_per_layer":
            return getattr(spec, name) if spec.position == "relative_bias" else None
        case "rope_theta":
            return spec.rope_theta if spec.position == "rope" else None
    return getattr(spec, name)


def _paths(params: Params) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def family_for(spec: TransformerSpec, name: str | None) -> tuple[Family, str]:
    """Returns the family to write a network as, and its model type.

    Args:
      spec: the network's shape.
      name: a family or a model type; None = the first family that is not a diffusion model and has this shape.

    Raises:
      ConfigError: as `save`.
    """
    kinds: dict[str, Family] = {}
    for family in FAMILIES:
        for kind in (family.name, *family.model_types):
            kinds.setdefault(kind, family)
    if name is None:
        plain = [family for family in FAMILIES if family.diffusion is None]
        fitting = next((family for family in plain if not differences(spec, family)), None)
        if fitting is None:
            tried = "; ".join(f"{family.name}: {differences(spec, family)[0]}" for family in plain)
            raise ConfigError(
                f"no family has networks of this shape ({tried})",
                where="--layout",
                fix="Only networks that a class of transformers can compute can be exported.",
            )
        return fitting, fitting.model_types[0]
    if name not in kinds:
        raise ConfigError(
            f"there is no family {name!r}{near_names(name, kinds)}",
            where="--layout",
            fix=f"Choose one of {', '.join(kinds)}.",
        )
    family = kinds[name]
    found = differences(spec, family)
    if found:
        raise ConfigError(
            f"the family {family.name} does not have this network: {'; '.join(found)}",
            where="--layout",
            fix="Leave it out, and the first family with this shape is used.",
        )
    return family, name if name in family.model_types else family.model_types[0]


def _full_config(
    spec: TransformerSpec,
    family: Family,
    kind: str,
    config: JsonObject | None,
    dtype: str | None,
    trained_as: Mapping[str, object] | None,
) -> dict[str, Any]:
    stored = dtype or spec.param_dtype
    names = [name for name in family.architectures if "For" in name or "LMHead" in name] or [*family.architectures]
    heads = dict(zip(family.model_types, names, strict=False))
    own = {"model_type": kind, "architectures": [heads.get(kind, names[0])], "torch_dtype": stored, "dtype": stored}
    given = {name: value for name, value in (config or {}).items() if name not in (*_REFERENCES, HINT)}
    diffusion: dict[str, object] = {}
    if family.diffusion is not None or trained_as:
        diffusion[HINT] = {"layout": family.name, **(trained_as or {})}
    if family.diffusion is not None:
        if (mask := (trained_as or {}).get("mask_token_id")) is not None:
            diffusion["mask_token_id"] = mask
        if family.diffusion.block_key is not None:
            diffusion[family.diffusion.block_key] = (trained_as or {}).get("block_size") or family.diffusion.block_size
    absent = {name: None for name, token in family.default_token_ids if token >= spec.vocab_size}
    # Later entries win: what follows from the network comes before what the caller gives.
    return {**absent, **given, **family.write_config(spec), **diffusion, **own}


def _write_weights(
    folder: Path, family: Family, spec: TransformerSpec, params: Params, dtype: str | None, shard_bytes: int
) -> None:
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        shards.append(list(held))
        save_file(held, folder / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        held.clear()
        size = 0

    for name, tensor in _tensors(family, spec, params, dtype):
        if held and size + tensor.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-00001.safetensors", folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number:05d}.safetensors", folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, allow_nan=False), encoding="utf-8")


def _tensors(
    family: Family, spec: TransformerSpec, params: Params, dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the files. One parameter at a time is on the host, or those that one tensor joins."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays_by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    # Parameters that one tensor joins (queries, keys and values of GPT-2) are written together.
    groups: dict[str, list[Weight]] = {}
    for weight in family.weights:
        if weight.applies(arrays_by_path, spec):
            groups.setdefault(weight.tensor, []).append(weight)
    for tensor_name, group in groups.items():
        arrays = [np.asarray(arrays_by_path[weight.param]) for weight in sorted(group, key=lambda weight: weight.part)]
        if dtype is not None:
            arrays = [array.astype(jax.numpy.dtype(dtype)) for array in arrays]
        layout, stacked = group[0].transform, group[0].stacked
        for layer in range(group[0].first_layer, arrays[0].shape[0]) if stacked else (None,):
            slices = [array if layer is None else array[layer] for array in arrays]
            parts = [np.asarray(layout.save(one, spec)) for one in slices]
            name = tensor_name if layer is None else tensor_name.format(i=layer)
            yield name, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=group[0].parts_axis)
        for weight in group:
            # The row was added to the table at import, so the table that held it is written as zeros.
            if weight.add_row is not None:
                yield weight.add_row, np.zeros((1, arrays[0].shape[-1]), arrays[0].dtype)
