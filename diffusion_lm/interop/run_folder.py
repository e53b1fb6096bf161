"""Writes an imported checkpoint as a run directory, for `TrainRun.initial`, `Stage.initial`, `decode` and `evaluate`.

WORKDIR/checkpoints/0   the parameters
WORKDIR/model.gin       the network, to be included
WORKDIR/objective.gin   diffusion models only: the objective to continue training with, to be included after model.gin
WORKDIR/sampler.gin     diffusion models only: the sampler, for `decode --sampler`
WORKDIR/tokenizer/      the tokenizer files, if there are any; of a GGUF file, written from its metadata
WORKDIR/import.json     the source, the tensor of each parameter, special tokens, config.json
WORKDIR/run_card.json   marks the directory as used
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax

from diffusion_lm.core.errors import ConfigError, require
from diffusion_lm.core.files import is_bucket, write_json, write_text
from diffusion_lm.core.gin_text import Built, GinText, MacroName, Value
from diffusion_lm.interop.diffusion import objective_gin, sampler_gin
from diffusion_lm.interop.gguf_tokenizer import tokenizer_files
from diffusion_lm.interop.huggingface import Imported
from diffusion_lm.interop.tokenizer_folder import TOKENIZER, copied_files
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.training.card import claim_folder, plain
from diffusion_lm.training.checkpoint import save_params
from diffusion_lm.training.imported import IMPORT_CARD

MODEL_GIN, OBJECTIVE_GIN, SAMPLER_GIN = "model.gin", "objective.gin", "sampler.gin"


def check_free(workdir: Path) -> None:
    """Raises `ConfigError` if `workdir` is a bucket, or exists and is not empty."""
    require(
        not is_bucket(workdir),
        f"{workdir} is a bucket, and an import is written to a local folder",
        where="--workdir",
        fix="Import to a folder and copy it: gcloud storage cp --recursive FOLDER gs://BUCKET/...",
    )
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(
            f"{workdir} already exists and is not empty",
            where="--workdir",
            fix="Give a new folder; an import never overwrites a run.",
        )


def write_run_folder(imported: Imported, source: Path, workdir: Path) -> None:
    """Writes the run directory under a temporary name and renames it when it is complete.

    Args:
      imported: the checkpoint.
      source: path that it was read from.
      workdir: the directory to write; absent or empty.

    Raises:
      ConfigError: the directory is not empty.
    """
    check_free(workdir)
    workdir = workdir.absolute()
    temporary = workdir.with_name(f".{workdir.name}.importing")
    # All processes write their shards of the parameters; the first one writes the other files.
    primary = jax.process_index() == 0
    if primary:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_params(temporary, imported.params)
        if primary:
            spec = imported.architecture.spec
            facts = _facts(imported, source)
            write_text(temporary / MODEL_GIN, model_gin(imported, source))
            for name, text in _diffusion_files(imported).items():
                write_text(temporary / name, text)
            for file in copied_files(source):
                (temporary / TOKENIZER).mkdir(exist_ok=True)
                shutil.copyfile(file, temporary / TOKENIZER / file.name)
            write_json(temporary / IMPORT_CARD, facts)
            if imported.gguf is not None:
                _write_tokenizer(temporary / TOKENIZER, tokenizer_files(imported.gguf.values)[0])
            claim_folder(temporary, {"class": "imported checkpoint", "spec": plain(spec), "source": facts["source"]})
            if workdir.exists():
                workdir.rmdir()
            os.replace(temporary, workdir)
    except BaseException:
        if primary:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def model_gin(imported: Imported, source: Path) -> str:
    """Returns model.gin: every field of the spec, so that no binding of a file that was included before remains."""
    spec, specials = imported.architecture.spec, imported.specials
    kind = type(imported.architecture)
    network = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
    named = [f"{name} {value}" for name, value in dataclasses.asdict(specials).items() if value not in (None, ())]
    scaling = spec.rope_scaling
    text = GinText()
    # The folder's name and the ids may be hostile text; `GinText` escapes what would end the comment.
    text.comment(
        f"{source.name!r}: a checkpoint of the family {imported.family}, {imported.report.parameters:,} parameters."
    )
    text.comment(f"Its special tokens: {', '.join(named) if named else 'none are named'}.")
    text.imports(kind.__module__).imports(*(["diffusion_lm.nn.rope"] if scaling else []), "diffusion_lm.nn.transformer")
    text.blank().bind("MODEL", Built(network)).bind("VOCAB_SIZE", spec.vocab_size)
    text.bind(f"{network}.spec", Built("transformer.TransformerSpec")).blank()
    text.block("transformer.TransformerSpec", _bindings(spec))
    if scaling is not None:
        fields = {field.name: getattr(scaling, field.name) for field in dataclasses.fields(scaling)}
        text.blank().block(f"rope.{type(scaling).__name__}", fields)
    return text.text()


def _diffusion_files(imported: Imported) -> dict[str, str]:
    """Returns objective.gin and sampler.gin of a diffusion model; {} if MASK is unknown."""
    trained = imported.diffusion
    if trained is None or trained.mask_id is None:
        return {}
    return {OBJECTIVE_GIN: objective_gin(trained), SAMPLER_GIN: sampler_gin(trained)}


def _write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _bindings(spec: TransformerSpec) -> dict[str, Value]:
    """Returns the gin value of every field of a spec."""
    found: dict[str, Value] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name == "vocab_size":
            found[field.name] = MacroName("VOCAB_SIZE")
        elif dataclasses.is_dataclass(value):
            found[field.name] = Built(f"rope.{type(value).__name__}")
        else:
            found[field.name] = value
    return found


def _facts(imported: Imported, source: Path) -> dict[str, object]:
    return {
        # A file name that is not UTF-8 has surrogates in Python, which cannot be written.
        "source": str(source.absolute()).encode("utf-8", "backslashreplace").decode(),
        "family": imported.family,
        "specials": dataclasses.asdict(imported.specials),
        "report": dataclasses.asdict(imported.report),
        "config": imported.config,
        "diffusion": None if imported.diffusion is None else dataclasses.asdict(imported.diffusion),
    }
