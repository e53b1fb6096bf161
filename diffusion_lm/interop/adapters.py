"""Merges a PEFT LoRA adapter into the weights of a checkpoint as they are read.

LoRA (arXiv 2106.09685): W + s B A, where s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).
Names, scales and axis orders are those of `get_delta_weight` in `peft/tuners/lora/layer.py` of PEFT 0.21. The sum is
computed in float32, whatever the dtype of the base. Modules that were trained in full (`modules_to_save`, biases)
replace those of the base. Every other kind and option of an adapter raises an error that names it.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.name_maps.family import CONV_HEADS_IN, CONV_HEADS_OUT, IDENTITY, Family, JsonObject, shown
from diffusion_lm.interop.tensor_files import Checkpoint, TensorFile, open_tensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)(?:\.\w+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<part>A|B)(?:\.\w+)?")
# Wrappers that PEFT adds to the names of modules that are trained in full, or whose bias is trained.
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")
_HARMLESS = (
    # Where the adapter comes from, and which modules it adapts: the names of its tensors show the latter.
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    # How it was trained. `fan_in_fan_out` is redundant: the family's table gives the order of the axes.
    *("lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
)
# Initialisations that leave the base unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ) subtract from it, so their adapter
# fits a modified base that is not in the folder.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class _Update:
    """The update of one tensor: `scale` * `up` [out, r] @ `down` [r, in].

    Attributes:
      down: name of the adapter's matrix A.
      up: name of the adapter's matrix B.
      scale: s.
      transposed: whether the tensor is [in, out], so that the update is transposed: GPT-2's Conv1D, and embeddings
        [V, D], where A is [r, V] and B is [D, r].
    """

    down: str
    up: str
    scale: float
    transposed: bool


class Adapter:
    """An adapter, assigned to the tensors of a checkpoint; implements `tensor_files.Edits`.

    Attributes:
      base: name of the base model in the adapter's config; may be empty.
      changed: names of the tensors that it changes.

    Args:
      file: the adapter's tensors.
      base: as above.
      updates: LoRA updates, by the name of the checkpoint's tensor.
      replaced: tensors of `file` that replace one of the checkpoint, by the name of the latter.
    """

    def __init__(self, file: TensorFile, base: str, updates: Mapping[str, _Update], replaced: Mapping[str, str]):
        self.base = base
        self.changed = frozenset((*updates, *replaced))
        self._file, self._updates, self._replaced = file, updates, replaced

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a tensor after the change. A replaced embedding may have another number of rows."""
        return self._file.shape(self._replaced[name]) if name in self._replaced else shape

    def read(self, name: str, rows: slice, base: np.ndarray | None) -> np.ndarray:
        """Returns rows of a changed tensor.

        Args:
          name: name of the tensor.
          rows: the rows to return.
          base: these rows of the base tensor; None if the tensor is replaced.
        """
        if name in self._replaced:
            return self._file.read(self._replaced[name], rows)
        assert base is not None
        update = self._updates[name]
        down, up = (self._file.read(part).astype(np.float32) for part in (update.down, update.up))
        # Only the wanted rows of B A (or of its transpose) are computed: the table of a vocabulary is read in slices.
        change = down.T[rows] @ up.T if update.transposed else up[rows] @ down
        return base.astype(np.float32) + np.float32(update.scale) * change

    def replaces(self, name: str) -> bool:
        """Returns whether a tensor is replaced."""
        return name in self._replaced

    def __str__(self) -> str:
        replaced = f", {len(self._replaced)} replaced" if self._replaced else ""
        return f"LoRA on {len(self._updates)} tensors{replaced}, of the base {shown(self.base)}"


def has_adapter(folder: Path) -> bool:
    """Returns whether a folder holds a file of an adapter."""
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, *ADAPTER_FILES))


def base_is_missing(folder: Path) -> ConfigError:
    """Returns the error about a folder with an adapter but without its base model."""
    base = _config(folder).get("base_model_name_or_path")
    return ConfigError(
        f"{folder} holds an adapter without its base model, which is {shown(base) if base else 'not named'}",
        where=ADAPTER_CONFIG,
        fix=f"Download the base model, copy {ADAPTER_CONFIG} and {ADAPTER_FILES[0]} into its folder, and import that.",
    )


def read_adapter(folder: Path, family: Family, checkpoint: Checkpoint, *, tied: bool) -> Adapter | None:
    """Returns the adapter of a folder, with each tensor assigned to one of the checkpoint; None if there is none.

    Args:
      folder: folder of the checkpoint.
      family: family of the network; its table gives the names and the axis order of each matrix.
      checkpoint: the tensors of the base model.
      tied: whether the network has one parameter for the embeddings and the head.

    Raises:
      ConfigError: it is not a LoRA adapter, has an option that cannot be merged, or changes tensors that the checkpoint
        does not have.
    """
    if not has_adapter(folder):
        return None
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if path is None or not (folder / ADAPTER_CONFIG).is_file():
        missing = ADAPTER_FILES[0] if path is None else ADAPTER_CONFIG
        raise ConfigError(
            f"{folder} holds one file of an adapter, but {missing} is missing",
            where=str(folder),
            fix="Download the missing file, or remove the other one if the adapter is already merged.",
        )
    config = _config(folder)
    _check(config, folder)
    file = open_tensors(path)
    halves: dict[tuple[str, bool], dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in file.names():
        short = name.removeprefix(_PREFIX)
        embedding, matrix = _EMBEDDING.fullmatch(short), _LORA.fullmatch(short)
        found = embedding or matrix
        if found:
            halves.setdefault((found["module"], embedding is not None), {})[found["part"]] = name
        elif ".lora_" in short:
            raise _refused(path, f"the tensor {shown(name)}, which is not a matrix A or B of LoRA")
        else:
            replaced[_in_checkpoint(_WRAPPERS.sub("", short), family, checkpoint, path)] = name
    updates = {}
    for (module, is_embedding), parts in halves.items():
        target = _in_checkpoint(f"{module}.weight", family, checkpoint, path)
        if set(parts) != {"A", "B"}:
            raise _refused(path, f"only one of the two matrices of {module}")
        transposed = is_embedding or _is_conv(target, family)
        update = _Update(parts["A"], parts["B"], _scale(config, module, folder), transposed)
        _check_shapes(update, _rank(config, module, folder), checkpoint.shape(target), file, module, path)
        updates[target] = update
    adapter = Adapter(file, str(config.get("base_model_name_or_path") or ""), updates, replaced)
    # With tied embeddings an update of one end would have to change the other one too, which PEFT does not do.
    ends = {name for pair in family.tied for name in pair}
    ends |= {name.removeprefix(family.prefix) for name in ends}
    shared = ends & adapter.changed if tied else set()
    if shared:
        raise _refused(
            path,
            f"an update of {sorted(shared)[0]}, which is tied: the network has one parameter for embeddings and head",
        )
    return adapter


def _config(folder: Path) -> JsonObject:
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


def _check(config: JsonObject, folder: Path) -> None:
    """Raises `ConfigError` about the first key that asks for something other than W + s B A."""
    file = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise _refused(file, f"peft_type = {shown(config.get('peft_type'))} (supported: LORA)")
    start = config.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        raise _refused(file, f"init_lora_weights = {shown(start)}, which also changes the base weights")
    for name, value in config.items():
        if name not in (*_READ, *_HARMLESS) and value not in (None, False, {}, []):
            raise _refused(file, f"{name} = {shown(value)}")


def _in_checkpoint(name: str, family: Family, checkpoint: Checkpoint, path: Path) -> str:
    """Returns the name of a tensor in the checkpoint, which may lack the prefix or use older names."""
    old = [re.sub(pattern, new, name) for pattern, new in family.old_names]
    for known in (name, name.removeprefix(family.prefix), family.prefix + name, *old):
        if known in checkpoint.files:
            return known
    raise ConfigError(
        f"{path.name} changes the tensor {shown(name)}, which the checkpoint does not have",
        where=str(path),
        fix="Put the adapter into the folder of the model that it was trained on.",
    )


def _is_conv(name: str, family: Family) -> bool:
    """Returns whether a matrix is stored [in, out], as by Conv1D. All layers of a family store it alike."""
    lines = {line.tensor.format(i=0): line.transform for line in family.weights}
    # The table has `{i}` for the layer; compare names of layer 0.
    layer_0 = re.sub(r"(?<=\.)\d+(?=\.)", "0", name)
    transform = lines.get(layer_0) or lines.get(family.prefix + layer_0)
    return transform in (CONV_HEADS_IN, CONV_HEADS_OUT, IDENTITY)


def _rank(config: JsonObject, module: str, folder: Path) -> int:
    rank = _of_module(config, "rank_pattern", "r", module, folder)
    if type(rank) is not int or rank < 1:
        raise _refused(folder / ADAPTER_CONFIG, f"r = {shown(rank)}, which is not a whole number above 0")
    return rank


def _scale(config: JsonObject, module: str, folder: Path) -> float:
    rank, alpha = _rank(config, module, folder), _of_module(config, "alpha_pattern", "lora_alpha", module, folder)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _refused(folder / ADAPTER_CONFIG, f"lora_alpha = {shown(alpha)}, which is not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: JsonObject, patterns: str, plain: str, module: str, folder: Path) -> object:
    """Returns the setting of one module.

    It is the value of the first pattern that matches the end of the module's name, as in PEFT, or else the value of the
    key `plain`.
    """
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
        raise ConfigError(f"{file.name}: the key {plain!r} is missing", where=str(file), fix="Download it again.")
    return config[plain]


def _check_shapes(
    update: _Update, rank: int, target: tuple[int, ...], file: TensorFile, module: str, path: Path
) -> None:
    down, up = file.shape(update.down), file.shape(update.up)
    fits = len(down) == len(up) == 2 and down[0] == up[1] == rank
    if not fits or (up[0], down[1]) != (target[::-1] if update.transposed else target):
        raise ConfigError(
            f"{path.name}: matrices of shapes {list(up)} and {list(down)} and rank {rank} do not fit {module}, "
            f"whose tensor has shape {list(target)}",
            where=str(path),
            fix="Put the adapter into the folder of the model that it was trained on.",
        )


def _refused(file: Path, what: str) -> ConfigError:
    return ConfigError(
        f"the adapter cannot be merged: {file.name} has {what}",
        where=str(file),
        fix="Merge it with PEFT (`merge_and_unload`), save and import the result, or remove the adapter's files.",
    )
