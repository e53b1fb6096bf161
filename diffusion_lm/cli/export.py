"""Writes a trained model as a Hugging Face checkpoint: config.json, safetensors files, tokenizer and model card.

RUN is a run directory of `train`, `import` or `compare` (WORKDIR/stages/STAGE). The layout is a family of
`diffusion-lm list families`:
  - An imported checkpoint is exported in the layout that it was imported from.
  - A model trained by masked or block diffusion gets the layout of the public diffusion model with the same shape,
    alignment and attention visibility.
  - Any other model gets the first family that has networks of its shape.
--layout overrides this choice. No code is written next to the weights. If anything fails, nothing is written."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import count, facts, heading, progress
from diffusion_lm.core.errors import ConfigError

if TYPE_CHECKING:
    from diffusion_lm.architectures.base import Architecture
    from diffusion_lm.data.iterator import DataPipeline
    from diffusion_lm.interop.diffusion import TrainedAs
    from diffusion_lm.interop.name_maps.family import Diffusion, Family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    parser.add_argument("workdir", metavar="RUN", help="run directory")
    parser.add_argument("--to", required=True, metavar="DIR", help="directory to write; must not exist yet")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="checkpoint step to export (default: the best one if the run selects one, else the newest)",
    )
    parser.add_argument(
        "--layout",
        "--family",
        dest="layout",
        metavar="NAME",
        help="a family of `diffusion-lm list families` (default: see above)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: that of the checkpoint)"
    )
    parser.add_argument(
        "--tokenizer",
        choices=("auto", "none"),
        default="auto",
        help="tokenizer files to write: auto = those of the import or of the run's data (default: auto)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns its result."""
    from diffusion_lm.core.files import as_path, read_json
    from diffusion_lm.interop.diffusion import layout_for
    from diffusion_lm.interop.huggingface import save
    from diffusion_lm.interop.model_card import MODEL_CARD, CardFacts, model_card
    from diffusion_lm.interop.save import family_for
    from diffusion_lm.training.card import CARD
    from diffusion_lm.training.checkpoint import restore_params
    from diffusion_lm.training.imported import IMPORT_CARD
    from diffusion_lm.training.writers import read_rows

    folder = as_path(arguments.workdir)
    imported = read_json(folder / IMPORT_CARD) if (folder / IMPORT_CARD).is_file() else None
    source = _imported(arguments, folder, imported) if imported and not arguments.gin_file else _trained(arguments)
    model, trained = source.model, source.trained
    # Priority: --layout, the layout of the import, the public diffusion layout, the first family that fits.
    public = layout_for(model.spec, trained)
    layout = arguments.layout or source.layout or (public.name if public else None)
    family, kind = family_for(model.spec, layout)
    if family.diffusion is not None:
        _check_meaning(family, family.diffusion, trained)
    params = restore_params(folder, step=source.step)
    parameters = model.count_parameters()["total"]
    files = dict(source.tokenizer)
    card = CardFacts(
        name=Path(arguments.to).expanduser().absolute().name,
        parameters=parameters,
        family=family,
        model_type=kind,
        step=source.step,
        card=read_json(folder / CARD) if (folder / CARD).is_file() else {},
        rows=read_rows(folder / "metrics.jsonl"),
        trained=trained,
        sampler=source.sampler,
        imported=imported if source.layout else None,
        files=tuple(files),
        lineage=source.lineage,
        bound_kind=source.bound_kind,
    )
    files[MODEL_CARD] = model_card(card).encode()
    trained_facts = {} if trained is None else trained.facts()
    save(
        arguments.to,
        model,
        params,
        family=layout,
        config=source.config,
        dtype=arguments.dtype,
        trained_as=trained_facts,
        files=files,
    )
    heading(f"{kind} in {arguments.to}")
    facts(
        [
            ("layout", f"{family.name}: {family.description}"),
            ("parameters", count(parameters)),
            ("checkpoint", f"step {source.step:,} of {folder}"),
            ("tokenizer", ", ".join(source.tokenizer) or "none written"),
        ]
    )
    if trained is not None and family.diffusion is None:
        progress(
            f"no public diffusion layout matches this model ({trained.prediction}, visibility {trained.visibility}); "
            "README.md of the checkpoint describes it"
        )
    return {
        "to": str(arguments.to),
        "model_type": kind,
        "layout": family.name,
        "step": source.step,
        "parameters": parameters,
        "tokenizer": list(source.tokenizer),
    }


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model to export, with the contents of the files next to its weights.

    Attributes:
      model: the network.
      step: step of the checkpoint to export.
      config: entries of config.json other than those that follow from the network.
      layout: the family that it was imported from; None for a model that was trained here.
      trained: how a diffusion model was trained; None for other models.
      sampler: the sampler of the run as plain data.
      lineage: what the parameters were initialised from, as text.
      bound_kind: kind of likelihood that the objective evaluates, e.g. a bound.
      tokenizer: tokenizer files by name.
    """

    model: "Architecture"
    step: int
    config: dict[str, object]
    layout: str | None
    trained: "TrainedAs | None"
    sampler: Mapping[str, object] | None
    lineage: tuple[str, ...]
    bound_kind: str
    tokenizer: dict[str, bytes]


def _imported(arguments: argparse.Namespace, folder: Path, imported: Any) -> _Source:
    """Returns an imported checkpoint, to be exported in its original layout."""
    from diffusion_lm.cli import config
    from diffusion_lm.interop.diffusion import TrainedAs
    from diffusion_lm.interop.run_folder import MODEL_GIN
    from diffusion_lm.interop.tokenizer_folder import TOKENIZER, check_inside

    if arguments.step not in (None, 0):
        raise ConfigError(
            f"step={arguments.step}: an imported checkpoint only has step 0", where="--step", fix="Omit --step."
        )
    model = config.load([str(folder / MODEL_GIN)], arguments.gin, [], macros=["MODEL"]).build_macro("MODEL")
    given = imported.get("diffusion")
    trained = None if given is None else TrainedAs(**given)
    # Several families have one shape, so `model_type` (e.g. xlm-roberta) identifies the original layout more narrowly.
    # Diffusion families share the model type of their backbone and are identified by the family name instead.
    layout = imported["family"] if trained else imported["config"]["model_type"]
    files = sorted((folder / TOKENIZER).glob("*")) if arguments.tokenizer == "auto" else []
    for file in files:
        check_inside(file)
    tokenizer = {file.name: file.read_bytes() for file in files}
    return _Source(model, 0, imported["config"], layout, trained, None, (), "", tokenizer)


def _trained(arguments: argparse.Namespace) -> _Source:
    """Returns what a run left: the objective says what it is, the data which tokens are special."""
    from diffusion_lm.cli.run_folder import open_run
    from diffusion_lm.interop.diffusion import of_objective
    from diffusion_lm.training.card import plain

    opened = open_run(arguments, bindings=arguments.gin)
    trained = of_objective(opened.run.objective, opened.run.data.specials)
    sampler = plain(opened.generation[0].sampler) if opened.generation else None
    config, tokenizer = _tokens(opened.run.data, arguments.tokenizer == "auto")
    lineage = tuple(map(_named, opened.lineage))
    bound = opened.run.objective.bound_kind
    return _Source(opened.run.model, opened.step, config, None, trained, sampler, lineage, bound, tokenizer)


def _named(start: str) -> str:
    """Describes an initial checkpoint: the stage or directory, and what that was imported from."""
    from diffusion_lm.core.files import as_path, read_json
    from diffusion_lm.core.gin_text import one_line
    from diffusion_lm.training.imported import IMPORT_CARD

    folder = as_path(start)
    if not (folder / IMPORT_CARD).is_file():
        return f"`{folder.name}`"
    card = read_json(folder / IMPORT_CARD)
    return f"`{folder.name}` (imported from `{one_line(Path(card['source']).name)}`, family {card['family']})"


def _tokens(data: "DataPipeline", write_tokenizer: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the special tokens for config.json and the tokenizer files; both are empty without data.

    If no tokenizer file would encode text as the vocabulary does, none is written and a message says so.
    """
    from diffusion_lm.interop.tokenizer_export import tokenizer_files

    try:
        specials = data.specials
    except ConfigError as error:
        progress(f"writing neither special tokens nor a tokenizer: {error.what}")
        return {}, {}
    names = {"pad_token_id": specials.pad_id, "bos_token_id": specials.bos_id, "eos_token_id": specials.eos_id}
    config = {**names, **({} if specials.mask_id is None else {"mask_token_id": specials.mask_id})}
    if not write_tokenizer:
        return config, {}
    if data.pruned is not None:
        progress("writing no tokenizer: the vocabulary map of the run changes the token ids")
        return config, {}
    try:
        return config, tokenizer_files(data.full_vocabulary)
    except ConfigError as error:
        progress(f"writing no tokenizer: {error.what}")
        return config, {}


def _check_meaning(family: "Family", layout: "Diffusion", trained: "TrainedAs | None") -> None:
    """Raises `ConfigError` if a diffusion layout would describe another kind of training than that of the model."""
    visibility = "blocks" if layout.block_key else "full"
    if trained is None:
        raise ConfigError(
            f"layout {family.name} is a masked diffusion model, but this model was not trained by masked diffusion",
            where="--layout",
            fix="Omit --layout, or train with a masked objective.",
        )
    if (layout.shifted, layout.block_key is None) != (trained.shifted, trained.block_size is None):
        raise ConfigError(
            f"layout {family.name} has {layout.prediction}, visibility {visibility}, but this model was trained with "
            f"{trained.prediction}, visibility {trained.visibility}",
            where="--layout",
            fix="Omit --layout to select a matching one.",
        )
