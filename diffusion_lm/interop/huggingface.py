"""Released checkpoints as networks of ours: a folder with config.json and its weights, a GGUF file, or one of T5X.

Everything is checked before the first tensor is read; then the arrays are made one after the other (`reading.py`).
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from diffusion_lm.interop.name_maps.family import CONFIG, Config, Family, shown
from diffusion_lm.interop.name_maps.fields import unread_fields
from diffusion_lm.interop.name_maps.gemma import language_model
from diffusion_lm.interop.name_maps.kinds import check_kinds
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
    """The special tokens that the files name; None or () where they name none.

    Attributes:
      pad_id: padding.
      bos_id: opens a text; of an encoder-decoder, what its decoder begins with.
      eos_ids: end a text; chat models have several.
      mask_id: MASK.
    """

    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    mask_id: int | None = None


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What became of the tensors of the files and of the arrays of the network.

    Attributes:
      mapped: (array, tensor) for each array that was read; `{i}` stands for the layers.
      ignored: tensors that carry nothing of their own.
      missing: arrays without a tensor, which were initialised afresh because that was asked for.
      parameters: number of parameters of the network, rows that pad the vocabulary included.
      largest_array: bytes of the largest array.
      peak_host: most bytes that the reader held on the host at a time.
      seconds: time that reading took.
      unread_fields: fields of config.json of which nothing is known here; the classes that they belong to may compute
        something else with them.
      notes: what else the user should know of how the files were read.
      unread_files: files with tensors in the folder that are not part of the checkpoint.
      adapter: what was merged into the weights, in words; "" = nothing.
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
      causal: whether it was trained from left to right.
      report: what became of the tensors.
      config: the contents of its config.json, or what the metadata of a GGUF file amount to.
      diffusion: what a diffusion model was trained as; None for all others.
      gguf: the GGUF file that it was read from, or None.
    """

    family: str
    architecture: Network
    params: Params
    specials: Specials
    causal: bool
    report: ImportReport
    config: Mapping[str, Any]
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
        a GGUF file; or a folder of T5X, such as checkpoint_1000000.
      param_dtype: dtype of the parameters, "float32" or "bfloat16".
      dtype: dtype of the computation.
      mesh: devices to lay the parameters out on; None = the first device.
      rules: how they are split over the mesh; None = the default rules.
      fresh_missing: initialises the arrays that the files lack (the head of an encoder without its language model,
        say) instead of refusing the checkpoint.
      layout: name of the family, where the files do not tell it from others (DiffuLLaMA's are LLaMA's); None = look.

    Raises:
      ConfigError: the checkpoint is of an unknown family, is incomplete, or has tensors that have no place.
    """
    start = time.perf_counter()
    source = _source(path)
    # Everything that the files say is checked before the first tensor is read.
    read = describe(source, layout=layout, param_dtype=param_dtype, dtype=dtype)
    architecture, checkpoint = network_of(read.spec), read.checkpoint
    plan = plan_weights(read.family, architecture, checkpoint, fresh_missing=fresh_missing)
    meter = Meter()
    params = read_params(plan, architecture, checkpoint, mesh, rules, meter)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    report = ImportReport(
        mapped=tuple((name, checkpoint.called(weight.theirs)) for name, weight in plan.weights.items()),
        ignored=(*map(checkpoint.called, plan.ignored), *(f"{name} of {file}" for name, file in checkpoint.unindexed)),
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
    """What the files of a checkpoint say, all of it checked, before a tensor is read.

    Attributes:
      family: whose checkpoint it is.
      config: the contents of its config.json.
      checkpoint: the tensors.
      spec: the network.
      specials: its special tokens.
      trained: what a diffusion model was trained as; None for all others.
      unread: fields of config.json of which nothing is known.
      adapter: what is merged into the tensors as they are read, or None.
    """

    family: Family
    config: Config
    checkpoint: Checkpoint
    spec: TransformerSpec
    specials: Specials
    trained: TrainedAs | None
    unread: tuple[str, ...]
    adapter: Adapter | None = None


def describe(source: Path, *, layout: str | None = None, **dtypes: str) -> Described:
    """Reads all that the files say but the weights.

    Args:
      source: the folder or the GGUF file.
      layout: as for `load`.
      **dtypes: `param_dtype` and `dtype` of the network.

    Raises:
      ConfigError: as `load`.
    """
    family, config, checkpoint = _open(source, layout)
    spec = TransformerSpec(**(family.spec(config) | dtypes | _rows(family, checkpoint)))
    specials = find_specials(config.values, _json(source / GENERATION_CONFIG, optional=True), spec.vocab_size)
    if source.is_dir():
        copied_files(source)  # a link that leads out of the folder is an error
    adapter = None
    if source.is_dir() and family is not T5X:
        adapter = checkpoint.edits = read_adapter(source, family, checkpoint, tied=spec.tied_embeddings)
    trained = None
    if family.diffusion is not None:
        named = specials.mask_id, GENERATION_CONFIG
        if specials.mask_id is None:
            named = mask_of_tokenizer(source), "tokenizer"
        trained = trained_as(family.diffusion, config, spec.vocab_size, named)
        specials = dataclasses.replace(specials, mask_id=trained.mask_id)
    return Described(family, config, checkpoint, spec, specials, trained, unread_fields(config, family.name), adapter)


def _rows(family: Family, checkpoint: Checkpoint) -> dict[str, int]:
    """Returns the size of the vocabulary where the tensors and not config.json say it."""
    if family.rows is None or family.rows not in checkpoint.files:
        return {}
    return {"vocab_size": checkpoint.shape(family.rows)[0]}


def network_of(spec: TransformerSpec) -> Network:
    """Returns the network of a shape: an encoder-decoder where it has encoder layers."""
    return EncoderDecoder(spec) if spec.encoder_layers else SingleStream(spec)


def find_specials(config: Mapping[str, Any], generation_config: Mapping[str, Any], rows: int | None = None) -> Specials:
    """Returns the special tokens; what the generation config says comes first.

    Args:
      config: the contents of config.json.
      generation_config: the contents of generation_config.json.
      rows: size of the vocabulary; None = unknown.

    Raises:
      ConfigError: a value is not an id of the vocabulary, or a list of them.
    """

    def ids(name: str) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        # All files are checked, also where the first one names the token: both are kept and written again.
        for file, source in ((CONFIG, config), (GENERATION_CONFIG, generation_config)):
            value = source.get(name)
            if value is not None:
                found = _ids(name, value, rows, file)
        return found

    def first(name: str) -> int | None:
        return next(iter(ids(name)), None)

    start, bos = first("decoder_start_token_id"), first("bos_token_id")
    return Specials(first("pad_token_id"), bos if start is None else start, ids("eos_token_id"), first("mask_token_id"))


def _ids(name: str, value: Any, rows: int | None, file: str) -> tuple[int, ...]:
    """Returns the ids of one field of a file; raises `ConfigError` where they are not tokens."""
    if name == "pad_token_id" and value == -1 and type(value) is int:
        return ()  # files of LLaMA 1 say so where there is no padding
    many = value if isinstance(value, list) else [value]
    # Only Python's own int: a bool is one too.
    if not all(type(one) is int and one >= 0 and (rows is None or one < rows) for one in many):
        among = "" if rows is None else f" below {rows:,}, the rows of the vocabulary"
        raise ConfigError(
            f"{file} says {name} = {shown(value)}, where an id{among} (or a list of ids) belongs",
            where=name,
            fix="Correct the file, or remove the field.",
        )
    return tuple(many)


def _open(folder: Path, layout: str | None) -> tuple[Family, Config, Checkpoint]:
    """Returns the family, what config.json says (or a GGUF file's metadata, or the sizes of T5X), and the tensors."""
    if _is_gguf(folder):
        checkpoint = Checkpoint(folder)
        assert checkpoint.gguf is not None
        config = Config(checkpoint.gguf.config, str(folder), checkpoint.files)
        check_kinds(config)
        return family_of(config, checkpoint.files, layout), config, checkpoint
    file = folder / CONFIG
    if not _is_t5x(folder):
        config = Config(language_model(_json(file)), str(file))
        check_kinds(config)
        family_of(config, layout=layout)  # before the weights, which may not be there
        if has_adapter(folder) and not has_weights(folder):
            raise base_is_missing(folder)
        checkpoint = Checkpoint(folder)
        family = family_of(config, checkpoint.files, layout)
        return family, dataclasses.replace(config, tensors=checkpoint.files), checkpoint
    checkpoint = Checkpoint(folder)
    sizes = read_sizes({name: checkpoint.shape(name) for name in checkpoint.files}, folder)
    return T5X, Config(sizes, str(folder / INDEX)), checkpoint


def _is_t5x(folder: Path) -> bool:
    return (folder / INDEX).is_file() and not has_weights(folder)


def _is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX and not path.is_dir()


def _source(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if _is_gguf(folder):
        if not folder.is_file():
            raise ConfigError(f"there is no file {folder}", where="PATH", fix="Name a GGUF file or a folder.")
        return folder
    if (folder / CONFIG).is_file() or _is_t5x(folder):
        return folder
    if has_adapter(folder):
        raise base_is_missing(folder)
    kind, inside = "checkpoints of T5X", sorted(index.parent.name for index in folder.glob(f"checkpoint_*/{INDEX}"))
    if not inside:
        kind, inside = "GGUF files", sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
    raise ConfigError(
        f"there is no {CONFIG} in {folder}" + (f", but {kind}: {', '.join(inside)}" if inside else ""),
        where="PATH",
        fix="Name one of them."
        if inside
        else "Name a folder with a downloaded checkpoint, such as `hf download NAME --local-dir FOLDER` makes.",
    )


def _json(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        # A byte order mark is not text. NaN and infinity are not JSON, though Python reads and writes them.
        values = json.loads(read_text(file).removeprefix("\ufeff"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name} is not JSON: {error}", where=str(file), fix="Download it again.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file.name} is not a JSON object", where=str(file), fix="Download it again.")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
