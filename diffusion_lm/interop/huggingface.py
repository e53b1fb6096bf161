"""Reads a released checkpoint: a Hugging Face folder (config.json and weights), a GGUF file, or a T5X checkpoint.

`describe` checks config.json and the list of tensors, `plan_weights` assigns a tensor to each parameter, and
`read_params` reads the parameters one after the other. The first two raise all errors that need no tensor to be read.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import read_text
from diffusion_lm.core.types import Params
from diffusion_lm.interop.adapters import ADAPTER_FILES, Adapter, base_is_missing, has_adapter, read_adapter
from diffusion_lm.interop.assemble import Meter, plan_weights
from diffusion_lm.interop.diffusion import TrainedAs, trained_as
from diffusion_lm.interop.gguf_files import SUFFIX, GgufFile
from diffusion_lm.interop.name_maps import family_of
from diffusion_lm.interop.name_maps.config_checks import check_types, unread_keys
from diffusion_lm.interop.name_maps.family import CONFIG, CheckpointConfig, Family, JsonObject, SpecFields, shown
from diffusion_lm.interop.name_maps.gemma import language_model
from diffusion_lm.interop.name_maps.t5x import T5X, read_sizes
from diffusion_lm.interop.reading import read_params
from diffusion_lm.interop.save import save as save
from diffusion_lm.interop.t5x_files import INDEX
from diffusion_lm.interop.tensor_files import Checkpoint, has_weights
from diffusion_lm.interop.tokenizer_folder import copied_files, mask_of_tokenizer
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules

GENERATION_CONFIG = "generation_config.json"

Network = SingleStream | EncoderDecoder


@dataclasses.dataclass(frozen=True)
class Specials:
    """The special tokens that the files of a checkpoint name; None or () where they name none.

    Attributes:
      pad_id: padding.
      bos_id: first token of a text; of an encoder-decoder, the decoder's start token.
      eos_ids: tokens that end a text; chat models have several.
      mask_id: MASK.
    """

    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    mask_id: int | None = None


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """Which tensors became which parameters, and what was left out.

    Attributes:
      mapped: (parameter, tensor) for each parameter that was read; `{i}` is the number of the layer.
      ignored: tensors that were not read: copies, buffers, and tensors that the index of the shards does not list.
      missing: parameters without a tensor, which were initialised because `fresh_missing` was set.
      parameters: number of parameters of the network, padding rows of the vocabulary included.
      largest_array: size of the largest parameter array in bytes.
      peak_host: largest number of bytes that the reader held on the host at one time.
      seconds: time that reading took.
      unread_fields: keys of config.json that are unknown here; the model's own class may use them.
      notes: further remarks for the user on how the files were read.
      unread_files: files with tensors in the folder that are not part of the checkpoint.
      adapter: description of the adapter that was merged into the weights; "" = none.
      adapted: tensors that the adapter changed.
    """

    mapped: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    parameters: int
    largest_array: int
    peak_host: int
    seconds: float
    unread_fields: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unread_files: tuple[str, ...] = ()
    adapter: str = ""
    adapted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Imported:
    """A checkpoint as a network.

    Attributes:
      family: name of its family.
      architecture: the network.
      params: its parameters.
      specials: its special tokens.
      causal: whether it was trained autoregressively.
      report: which tensors became which parameters.
      config: the contents of config.json, or its equivalent made from the metadata of a GGUF file.
      diffusion: how a diffusion model was trained; None for all others.
      gguf: the GGUF file that it was read from, or None.
    """

    family: str
    architecture: Network
    params: Params
    specials: Specials
    causal: bool
    report: ImportReport
    config: JsonObject
    diffusion: TrainedAs | None = None
    gguf: GgufFile | None = None


def load(
    path: str | Path,
    *,
    param_dtype: str = "float32",
    dtype: str = "float32",
    mesh: MeshSpec | None = None,
    rules: LogicalRules | None = None,
    fresh_missing: bool = False,
    layout: str | None = None,
) -> Imported:
    """Reads a checkpoint.

    Args:
      path: a folder with config.json and model.safetensors, pytorch_model.bin, or shards of either with their index;
        a GGUF file; or a T5X checkpoint, such as checkpoint_1000000.
      param_dtype: dtype of the parameters, "float32" or "bfloat16".
      dtype: dtype of the computation.
      mesh: devices to shard the parameters over; None = the first device only.
      rules: logical axis rules of the sharding; None = the default rules.
      fresh_missing: initialises parameters that the files lack (the head of an encoder that was saved without it, say)
        instead of raising.
      layout: name of the family, where the files do not show it (DiffuLLaMA has LLaMA's files); None = identify it.

    Raises:
      ConfigError: the family is unknown, the checkpoint is incomplete, or it has tensors that the family does not have.
    """
    start = time.perf_counter()
    source = _source(path)
    # Errors of config.json and of the list of tensors come first: reading the weights can take minutes.
    read = describe(source, layout=layout, param_dtype=param_dtype, dtype=dtype)
    architecture, checkpoint = network_of(read.spec), read.checkpoint
    plan = plan_weights(read.family, architecture, checkpoint, fresh_missing=fresh_missing)
    meter = Meter()
    params = read_params(plan, architecture, checkpoint, mesh, rules, meter)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    report = ImportReport(
        mapped=tuple((name, checkpoint.name_in_file(weight.tensor)) for name, weight in plan.weights.items()),
        ignored=(
            *map(checkpoint.name_in_file, plan.ignored),
            *(f"{name} of {file}" for name, file in checkpoint.unindexed),
        ),
        missing=plan.missing,
        parameters=architecture.count_parameters()["total"],
        largest_array=max(sizes),
        peak_host=meter.peak,
        seconds=time.perf_counter() - start,
        unread_fields=read.unread,
        notes=tuple(read.config.notes),
        unread_files=tuple(name for name in checkpoint.unread_files() if name not in ADAPTER_FILES),
        adapter="" if read.adapter is None else str(read.adapter),
        adapted=() if read.adapter is None else tuple(sorted(read.adapter.changed)),
    )
    return Imported(
        family=read.family.name,
        architecture=architecture,
        params=params,
        specials=read.specials,
        causal=read.family.causal,
        report=report,
        config=read.config.values,
        diffusion=read.trained,
        gguf=checkpoint.gguf,
    )


@dataclasses.dataclass(frozen=True)
class Described:
    """Everything that is known of a checkpoint before its tensors are read.

    Attributes:
      family: the family of the checkpoint.
      config: the contents of its config.json.
      checkpoint: the tensors.
      spec: the shape of the network.
      specials: its special tokens.
      trained: how a diffusion model was trained; None for all others.
      unread: keys of config.json that are unknown here.
      adapter: the adapter that is merged into the tensors as they are read, or None.
    """

    family: Family
    config: CheckpointConfig
    checkpoint: Checkpoint
    spec: TransformerSpec
    specials: Specials
    trained: TrainedAs | None
    unread: tuple[str, ...]
    adapter: Adapter | None = None


def describe(source: Path, *, layout: str | None = None, **dtypes: str) -> Described:
    """Reads and checks everything but the values of the tensors.

    Args:
      source: the folder or the GGUF file.
      layout: as for `load`.
      **dtypes: `param_dtype` and `dtype` of the network.

    Raises:
      ConfigError: as `load`.
    """
    family, config, checkpoint = _open(source, layout)
    spec = TransformerSpec(**(family.read_config(config) | dtypes | _vocab_size(family, checkpoint)))
    specials = find_specials(config.values, _json(source / GENERATION_CONFIG, optional=True), spec.vocab_size)
    if source.is_dir():
        copied_files(source)  # raises for a tokenizer file that is a link out of the folder
    adapter = None
    if source.is_dir() and family is not T5X:
        adapter = checkpoint.edits = read_adapter(source, family, checkpoint, tied=spec.tied_embeddings)
    trained = None
    if family.diffusion is not None:
        other_mask = specials.mask_id, GENERATION_CONFIG
        if specials.mask_id is None:
            other_mask = mask_of_tokenizer(source), "tokenizer"
        trained = trained_as(family.diffusion, config, spec.vocab_size, other_mask)
        specials = dataclasses.replace(specials, mask_id=trained.mask_id)
    return Described(family, config, checkpoint, spec, specials, trained, unread_keys(config, family), adapter)


def _vocab_size(family: Family, checkpoint: Checkpoint) -> SpecFields:
    """Returns `vocab_size` where the embedding tensor and not config.json gives it."""
    if family.vocab_tensor is None or family.vocab_tensor not in checkpoint.files:
        return {}
    return {"vocab_size": checkpoint.shape(family.vocab_tensor)[0]}


def network_of(spec: TransformerSpec) -> Network:
    """Returns the network of a spec: an encoder-decoder where it has encoder layers."""
    return EncoderDecoder(spec) if spec.encoder_layers else SingleStream(spec)


def find_specials(config: JsonObject, generation_config: JsonObject, rows: int | None = None) -> Specials:
    """Returns the special tokens. generation_config.json takes precedence over config.json.

    Args:
      config: the contents of config.json.
      generation_config: the contents of generation_config.json.
      rows: size of the vocabulary, which bounds the ids; None = unknown.

    Raises:
      ConfigError: a value is not an id of the vocabulary, or a list of them.
    """

    def ids(name: str) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        # Both files are checked, also where one is not used: `export` writes their contents again.
        for file, source in ((CONFIG, config), (GENERATION_CONFIG, generation_config)):
            value = source.get(name)
            if value is not None:
                found = _ids(name, value, rows, file)
        return found

    def first(name: str) -> int | None:
        return next(iter(ids(name)), None)

    start, bos = first("decoder_start_token_id"), first("bos_token_id")
    return Specials(first("pad_token_id"), bos if start is None else start, ids("eos_token_id"), first("mask_token_id"))


def _ids(name: str, value: object, rows: int | None, file: str) -> tuple[int, ...]:
    """Returns the ids of one key of a file; raises `ConfigError` if they are not tokens."""
    if name == "pad_token_id" and value == -1 and type(value) is int:
        return ()  # files of LLaMA 1 have -1 for "no padding token"
    many = value if isinstance(value, list) else [value]
    # `type(...) is int`, because isinstance accepts a bool.
    if not all(type(token) is int and token >= 0 and (rows is None or token < rows) for token in many):
        bound = "" if rows is None else f" below the vocabulary size {rows:,}"
        raise ConfigError(
            f"{file}: {name} = {shown(value)} must be a token id{bound}, or a list of token ids",
            where=name,
            fix="Correct the file, or remove the key.",
        )
    return tuple(many)


def _open(folder: Path, layout: str | None) -> tuple[Family, CheckpointConfig, Checkpoint]:
    """Returns family, config and tensors. A GGUF file's metadata or the shapes of T5X take the place of config.json."""
    if _is_gguf(folder):
        checkpoint = Checkpoint(folder)
        assert checkpoint.gguf is not None
        config = CheckpointConfig(checkpoint.gguf.config, str(folder), checkpoint.files)
        check_types(config)
        return family_of(config, checkpoint.files, layout), config, checkpoint
    file = folder / CONFIG
    if not _is_t5x(folder):
        config = CheckpointConfig(language_model(_json(file)), str(file))
        check_types(config)
        # Once without the tensors: an unknown family is the better error where the weights are missing too.
        family_of(config, layout=layout)
        if has_adapter(folder) and not has_weights(folder):
            raise base_is_missing(folder)
        checkpoint = Checkpoint(folder)
        family = family_of(config, checkpoint.files, layout)
        return family, dataclasses.replace(config, tensors=checkpoint.files), checkpoint
    checkpoint = Checkpoint(folder)
    sizes = read_sizes({name: checkpoint.shape(name) for name in checkpoint.files}, folder)
    return T5X, CheckpointConfig(sizes, str(folder / INDEX)), checkpoint


def _is_t5x(folder: Path) -> bool:
    return (folder / INDEX).is_file() and not has_weights(folder)


def _is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX and not path.is_dir()


def _source(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if _is_gguf(folder):
        if not folder.is_file():
            raise ConfigError(f"there is no file {folder}", where="PATH", fix="Give a GGUF file or a folder.")
        return folder
    if (folder / CONFIG).is_file() or _is_t5x(folder):
        return folder
    if has_adapter(folder):
        raise base_is_missing(folder)
    kind, inside = "T5X checkpoints", sorted(index.parent.name for index in folder.glob(f"checkpoint_*/{INDEX}"))
    if not inside:
        kind, inside = "GGUF files", sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
    raise ConfigError(
        f"there is no {CONFIG} in {folder}" + (f", but {kind}: {', '.join(inside)}" if inside else ""),
        where="PATH",
        fix="Give the path of one of them."
        if inside
        else "Give a folder with a downloaded checkpoint, such as `hf download NAME --local-dir FOLDER` makes.",
    )


def _json(file: Path, optional: bool = False) -> JsonObject:
    if optional and not file.is_file():
        return {}
    try:
        # Some editors write a byte order mark. Python reads NaN and Infinity, which are not JSON.
        values = json.loads(read_text(file).removeprefix("\ufeff"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name} is not JSON: {error}", where=str(file), fix="Download it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} is not a JSON object", where=str(file), fix="Download it again.")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
