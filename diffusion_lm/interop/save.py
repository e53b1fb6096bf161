"""A network of ours as a checkpoint of the Hugging Face ecosystem: the tables of `name_maps`, read backwards."""

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
from diffusion_lm.interop.name_maps.family import CONFIG, Config, Family, Weight
from diffusion_lm.nn.transformer import TransformerSpec

SHARD_BYTES = 5 * 10**9
"""Most bytes of one file, as transformers cuts them."""

_REFERENCES = ("auto_map", "_name_or_path", "transformers_version", "quantization_config")
"""What a config.json says about files and versions that are not those of an export; `auto_map` names code to run."""

# What a config.json says nothing about: how the network is run, initialised and stored here.
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
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    trained_as: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Writes config.json and safetensors files that `transformers` reads.

    Args:
      folder: where to; absent or empty. It appears whole or not at all.
      architecture: the network.
      params: its parameters.
      family: a family or model type of `name_maps`; None = the first that has networks of this shape.
      config: further contents of config.json (special tokens, say); what follows from the network comes before it.
      dtype: of the weights in the files, "float32" or "bfloat16"; None = as they are.
      shard_bytes: most bytes of one file.
      trained_as: of a diffusion model: `mask_token_id`, `block_size`, and whatever else config.json shall say of it.
      files: further files of the folder, by name.

    Returns:
      The model type that was written.

    Raises:
      ConfigError: no family, or not the named one, has networks of this shape, or the folder is taken.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already", where="--to", fix="Name a new folder.")
    chosen, kind = family_for(architecture.spec, family)
    unknown = _paths(architecture.abstract_params()) - {weight.ours for weight in chosen.weights}
    if unknown:
        raise ConfigError(
            f"the family {chosen.name} has no place for {', '.join(sorted(unknown)[:3])}",
            where="--layout",
            fix="Export the run of the network without what was built on it.",
        )
    beside = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _write_weights(beside, chosen, architecture.spec, params, dtype, shard_bytes)
        write_json(beside / CONFIG, _full_config(architecture.spec, chosen, kind, config, dtype, trained_as))
        for name, content in (files or {}).items():
            (beside / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return kind


def differences(spec: TransformerSpec, family: Family) -> list[str]:
    """Returns the fields in which a network differs from what its config.json of this family would be read as."""
    try:
        read = TransformerSpec(**family.spec(Config(family.config(spec))))
    except (ConfigError, KeyError) as error:
        return [str(error)]
    found = []
    for name in TransformerSpec.__dataclass_fields__:
        if name in _OURS:
            continue
        ours, theirs = _meaning(spec, name), _meaning(read, name)
        if ours != theirs:
            found.append(f"{name} = {ours!r}, not {theirs!r}")
    return found


def _meaning(spec: TransformerSpec, name: str) -> Any:
    """Returns what a field amounts to, for fields that several values of mean the same."""
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
      name: a family or a model type; None = the first family of autoregressive models or encoders with this shape.

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
                fix="Only networks of a shape that transformers knows can be exported.",
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
            f"this network is none of the family {family.name}: {'; '.join(found)}",
            where="--layout",
            fix="Leave the family out to have one looked for.",
        )
    return family, name if name in family.model_types else family.model_types[0]


def _full_config(
    spec: TransformerSpec,
    family: Family,
    kind: str,
    config: Mapping[str, Any] | None,
    dtype: str | None,
    trained_as: Mapping[str, Any] | None,
) -> dict[str, Any]:
    stored = dtype or spec.param_dtype
    names = [name for name in family.architectures if "For" in name or "LMHead" in name] or [*family.architectures]
    heads = dict(zip(family.model_types, names, strict=False))
    own = {"model_type": kind, "architectures": [heads.get(kind, names[0])], "torch_dtype": stored, "dtype": stored}
    given = {name: value for name, value in (config or {}).items() if name not in (*_REFERENCES, HINT)}
    told: dict[str, Any] = {}
    if family.diffusion is not None or trained_as:
        told[HINT] = {"layout": family.name, **(trained_as or {})}
    if family.diffusion is not None:
        if (mask := (trained_as or {}).get("mask_token_id")) is not None:
            told["mask_token_id"] = mask
        if family.diffusion.block_key is not None:
            told[family.diffusion.block_key] = (trained_as or {}).get("block_size") or family.diffusion.block_size
    absent = {name: None for name, token in family.special_ids if token >= spec.vocab_size}
    return {**absent, **given, **family.config(spec), **told, **own}


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
    """Yields the tensors of the file; one of our arrays (or the three of one tensor) is on the host at a time."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ours = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    groups: dict[str, list[Weight]] = {}
    for weight in family.weights:
        if weight.applies(ours, spec):
            groups.setdefault(weight.theirs, []).append(weight)
    for theirs, group in groups.items():
        arrays = [np.asarray(ours[weight.ours]) for weight in sorted(group, key=lambda weight: weight.part)]
        if dtype is not None:
            arrays = [array.astype(jax.numpy.dtype(dtype)) for array in arrays]
        layout, stacked = group[0].layout, group[0].stacked
        for layer in range(group[0].first, arrays[0].shape[0]) if stacked else (None,):
            slices = [array if layer is None else array[layer] for array in arrays]
            parts = [np.asarray(layout.save(one, spec)) for one in slices]
            name = theirs if layer is None else theirs.format(i=layer)
            yield name, parts[0] if len(parts) == 1 else np.concatenate(parts, axis=group[0].parts_axis)
        for weight in group:
            if weight.plus_row is not None:
                yield weight.plus_row, np.zeros((1, arrays[0].shape[-1]), arrays[0].dtype)
