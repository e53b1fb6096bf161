"""A PEFT adapter next to the weights of a checkpoint, merged into them as they are read.

LoRA (arXiv 2106.09685): W + s B A, where s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
Names, scales and the order of axes are those of `peft/tuners/lora/layer.py` (`get_delta_weight`) of PEFT 0.21. The sum
is made in float32, whatever the dtype of the base. Modules that were trained whole (`modules_to_save`, biases) replace
those of the base. Whatever else an adapter can be is refused by its name.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import CONV_HEADS_IN, CONV_HEADS_OUT, SAME, Family, shown
from diffusion_lm.interop.tensor_files import Checkpoint, TensorFile, open_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(?:\.\w+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)(?:\.\w+)?")
# What PEFT wraps a module in that is trained whole, or whose bias is.
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")
_HARMLESS = (
    # Where the adapter comes from, and which modules it was put on: the names of its tensors say the latter.
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    # How it was trained. The family gives the order of the axes, as in PEFT the class of the module does.
    *("lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
)
# Other initialisations subtract something from the base, so that the adapter belongs to weights that are not here.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Update:
    """What is added to one tensor: `scale` times `up` [out, r] times `down` [r, in].

    Attributes:
      down: name of the adapter's matrix A.
      up: name of its matrix B.
      scale: s.
      transposed: whether the tensor is [in, out]: GPT-2's Conv1D, and embeddings, of which A is [r, V] and B [D, r].
    """

    down: str
    up: str
    scale: float
    transposed: bool


class Adapter:
    """What an adapter changes in the tensors of a checkpoint; see `tensor_files.Edits`.

    Attributes:
      base: the name of the base model, as the adapter says it; may be empty.
      changed: names of the tensors that it changes.
    """

    def __init__(self, file: TensorFile, base: str, updates: Mapping[str, _Update], whole: Mapping[str, str]):
        self.base = base
        self.changed = frozenset((*updates, *whole))
        self._file, self._updates, self._whole = file, updates, whole

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a tensor after the change; of another size where the vocabulary was resized."""
        return self._file.shape(self._whole[name]) if name in self._whole else shape

    def read(self, name: str, rows: slice, base: np.ndarray | None) -> np.ndarray:
        """Returns rows of a changed tensor.

        Args:
          name: of the tensor.
          rows: which of its rows.
          base: these rows of the base; None where they are replaced.
        """
        if name in self._whole:
            return self._file.read(self._whole[name], rows)
        assert base is not None
        update = self._updates[name]
        down, up = (self._file.read(part).astype(np.float32) for part in (update.down, update.up))
        change = down.T[rows] @ up.T if update.transposed else up[rows] @ down
        return base.astype(np.float32) + np.float32(update.scale) * change

    def replaces(self, name: str) -> bool:
        """Returns whether a tensor is replaced whole."""
        return name in self._whole

    def __str__(self) -> str:
        whole = f", {len(self._whole)} replaced" if self._whole else ""
        return f"LoRA on {len(self._updates)} tensors{whole}, of the base {shown(self.base)}"


def has_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter, or a part of one."""
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTER_FILES))


def base_is_missing(folder: Path) -> ConfigError:
    """Returns the error about a folder that holds an adapter and not the network that it changes."""
    base = _config(folder).get("base_model_name_or_path")
    return ConfigError(
        f"{folder} holds an adapter alone, and the network that it changes is {shown(base) if base else 'not named'}",
        where=ADAPTER_CONFIG,
        fix=f"Download that model into a folder, copy {ADAPTER_CONFIG} and {ADAPTER_FILES[0]} into it, and import it.",
    )


def read_adapter(folder: Path, family: Family, checkpoint: Checkpoint, *, tied: bool) -> Adapter | None:
    """Returns the adapter of a folder, all of it assigned to tensors of the checkpoint; None where there is none.

    Args:
      folder: of the checkpoint.
      family: of the network, by whose table names and directions of matrices are known.
      checkpoint: the tensors that it changes.
      tied: whether the network has one array for the embeddings and the head.

    Raises:
      ConfigError: it is not a LoRA, has a feature that cannot be merged, or changes what the checkpoint does not have.
    """
    if not has_adapter(folder):
        return None
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if path is None or not (folder / ADAPTER_CONFIG).is_file():
        missing = ADAPTER_FILES[0] if path is None else ADAPTER_CONFIG
        raise ConfigError(
            f"there is a part of an adapter in {folder}, and {missing} is missing",
            where=str(folder),
            fix="Download the file, or remove the adapter's other one if it is merged already.",
        )
    config = _config(folder)
    _check(config, folder)
    file = open_tensors(path)
    halves: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in file.names():
        short = name.removeprefix(_PREFIX)
        embedding, matrix = _EMBEDDING.fullmatch(short), _LORA.fullmatch(short)
        found = embedding or matrix
        if found:
            halves.setdefault((found["module"], embedding is not None), {})[found["part"]] = name
        elif ".lora_" in short:
            raise _refused(path, f"the tensor {shown(name)}, which is not one of LoRA's two matrices")
        else:
            whole[_in_checkpoint(_WRAPPERS.sub("", short), family, checkpoint, path)] = name
    updates = {}
    for (module, is_embedding), parts in halves.items():
        target = _in_checkpoint(f"{module}.weight", family, checkpoint, path)
        if set(parts) != {"A", "B"}:
            raise _refused(path, f"one of the two matrices of {module} alone")
        transposed = is_embedding or _is_conv(target, family)
        update = _Update(parts["A"], parts["B"], _scale(config, module, folder), transposed)
        _check_shapes(update, _rank(config, module, folder), checkpoint.shape(target), file, module, path)
        updates[target] = update
    adapter = Adapter(file, str(config.get("base_model_name_or_path") or ""), updates, whole)
    ends = {name for pair in family.copies for name in pair}
    ends |= {name.removeprefix(family.prefix) for name in ends}
    shared = ends & adapter.changed if tied else set()
    if shared:
        raise _refused(path, f"a change of {sorted(shared)[0]}, which the network has one array for at both ends")
    return adapter


def _config(folder: Path) -> dict[str, Any]:
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name} is not JSON: {error}", where=str(file), fix="Download it again.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file.name} is not a JSON object", where=str(file), fix="Download it again.")
    return config


def _check(config: Mapping[str, Any], folder: Path) -> None:
    """Raises `ConfigError` about the first field that asks for something other than W + s B A."""
    file = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise _refused(file, f"peft_type = {shown(config.get('peft_type'))}; merged is LORA alone")
    start = config.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        raise _refused(file, f"init_lora_weights = {shown(start)}, which changes the base weights too")
    for name, value in config.items():
        if name not in (*_READ, *_HARMLESS) and value not in (None, False, {}, []):
            raise _refused(file, f"{name} = {shown(value)}")


def _in_checkpoint(name: str, family: Family, checkpoint: Checkpoint, path: Path) -> str:
    """Returns what the checkpoint calls a tensor; a model may be stored without the prefix of its names."""
    old = [re.sub(pattern, new, name) for pattern, new in family.renames]
    for known in (name, name.removeprefix(family.prefix), family.prefix + name, *old):
        if known in checkpoint.files:
            return known
    raise ConfigError(
        f"{path.name} changes {shown(name)}, which is not a tensor of the checkpoint",
        where=str(path),
        fix="Put the adapter next to the model that it was trained on.",
    )


def _is_conv(name: str, family: Family) -> bool:
    """Returns whether a matrix is [in, out]; of families with Conv1D, only the tables of the vocabulary are not."""
    lines = {line.theirs.format(i=0): line.layout for line in family.weights}
    layer_0 = re.sub(r"(?<=\.)\d+(?=\.)", "0", name)
    layout = lines.get(layer_0) or lines.get(family.prefix + layer_0)
    return layout in (CONV_HEADS_IN, CONV_HEADS_OUT, SAME)


def _rank(config: Mapping[str, Any], module: str, folder: Path) -> int:
    rank = _of_module(config, "rank_pattern", "r", module, folder)
    if type(rank) is not int or rank < 1:
        raise _refused(folder / ADAPTER_CONFIG, f"r = {shown(rank)}, which is not a rank")
    return rank


def _scale(config: Mapping[str, Any], module: str, folder: Path) -> float:
    rank, alpha = _rank(config, module, folder), _of_module(config, "alpha_pattern", "lora_alpha", module, folder)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise _refused(folder / ADAPTER_CONFIG, f"lora_alpha = {shown(alpha)}, which is not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], patterns: str, plain: str, module: str, folder: Path) -> Any:
    """Returns a number of one module: that of the first pattern which its name ends in, else that of all."""
    file, given = folder / ADAPTER_CONFIG, config.get(patterns) or {}
    if not isinstance(given, dict):
        raise _refused(file, f"{patterns} = {shown(given)}, which is not an object")
    for pattern, value in given.items():
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return value
        except re.error as error:
            raise _refused(file, f"{shown(pattern)} in {patterns}, which is not a pattern") from error
    if config.get(plain) is None:
        raise ConfigError(f"{file.name} does not say {plain!r}", where=str(file), fix="Download it again.")
    return config[plain]


def _check_shapes(
    update: _Update, rank: int, target: tuple[int, ...], file: TensorFile, module: str, path: Path
) -> None:
    down, up = file.shape(update.down), file.shape(update.up)
    fits = len(down) == len(up) == 2 and down[0] == up[1] == rank
    if not fits or (up[0], down[1]) != (target[::-1] if update.transposed else target):
        raise ConfigError(
            f"{path.name} has matrices {list(up)} and {list(down)} for {module}, "
            f"whose tensor is {list(target)}, and a rank of {rank}",
            where=str(path),
            fix="Put the adapter next to the model that it was trained on.",
        )


def _refused(file: Path, what: str) -> ConfigError:
    return ConfigError(
        f"the adapter cannot be merged: {file.name} has {what}",
        where=str(file),
        fix="Merge it with PEFT (`merge_and_unload`) and import what that saves, or remove the adapter's files.",
    )
