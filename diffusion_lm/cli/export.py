"""Writes the model of a run folder as a Hugging Face checkpoint: config.json, safetensors files, tokenizer, model card.

RUN is what `train`, `compare` (WORKDIR/stages/STAGE) or `import` left. A model that was trained as masked or block
diffusion gets the layout of the public diffusion models of its shape, alignment and visibility; --layout chooses
another. What was imported goes back as it came. Else the layout is the first of `list families` that has networks of
this shape. No code is written beside the weights. Where anything is wrong, nothing is written."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import count, facts, heading, progress
from diffusion_lm.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    parser.add_argument("workdir", metavar="RUN", help="run folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write; must be new")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    parser.add_argument(
        "--layout",
        "--family",
        dest="layout",
        metavar="NAME",
        help="one of `list families` (default: the public one of such a model, else the first that fits)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as they are)")
    parser.add_argument(
        "--tokenizer",
        choices=("auto", "none"),
        default="auto",
        help="write tokenizer files (default: those of the import, or of the run's data)",
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
    public = layout_for(model.spec, trained)
    layout = arguments.layout or source.layout or (public.name if public else None)
    family, kind = family_for(model.spec, layout)
    if family.diffusion is not None:
        _check_meaning(family, trained)
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
    told = {} if trained is None else trained.facts()
    save(
        arguments.to,
        model,
        params,
        family=layout,
        config=source.config,
        dtype=arguments.dtype,
        trained_as=told,
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
            f"no public diffusion layout: {trained.prediction}, visibility {trained.visibility}; README.md says it"
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
    """What is exported: the network and all that the files beside its weights say.

    Attributes:
      model: the network.
      step: whose parameters are wanted.
      config: contents of config.json besides what follows from the network.
      layout: the family that it was imported as; None for what was trained here.
      trained: what a diffusion model was trained as.
      sampler: the run's sampler as plain data.
      lineage: what the parameters began as, in words.
      bound_kind: what the objective's evaluation is.
      tokenizer: the tokenizer's files by name.
    """

    model: Any
    step: int
    config: dict[str, Any]
    layout: str | None
    trained: Any
    sampler: Any
    lineage: tuple[str, ...]
    bound_kind: str
    tokenizer: dict[str, bytes]


def _imported(arguments: argparse.Namespace, folder: Path, imported: Any) -> _Source:
    """Returns an imported checkpoint as it came."""
    from diffusion_lm.cli import config
    from diffusion_lm.interop.diffusion import TrainedAs
    from diffusion_lm.interop.run_folder import MODEL_GIN
    from diffusion_lm.interop.tokenizer_folder import TOKENIZER, check_inside

    if arguments.step not in (None, 0):
        raise ConfigError("an imported checkpoint has step 0 alone", where="--step", fix="Leave --step out.")
    model = config.load([str(folder / MODEL_GIN)], arguments.gin, [], macros=["MODEL"]).build_macro("MODEL")
    given = imported.get("diffusion")
    trained = None if given is None else TrainedAs(**given)
    # Of the families of one shape the model type is the narrower name (xlm-roberta), but for those that share it.
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
    """Returns what parameters began as in words: a stage or a folder, and what that was imported from."""
    from diffusion_lm.core.files import as_path, read_json
    from diffusion_lm.core.gin_text import one_line
    from diffusion_lm.training.imported import IMPORT_CARD

    folder = as_path(start)
    if not (folder / IMPORT_CARD).is_file():
        return f"`{folder.name}`"
    card = read_json(folder / IMPORT_CARD)
    return f"`{folder.name}` (imported from `{one_line(Path(card['source']).name)}`, family {card['family']})"


def _tokens(data: Any, wanted: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns what config.json says of special tokens, and the tokenizer's files; without data, neither.

    Where no file would encode as the vocabulary does, none is written and that is said.
    """
    from diffusion_lm.interop.tokenizer_export import tokenizer_files

    try:
        specials = data.specials
    except ConfigError as error:
        progress(f"no special tokens and no tokenizer are written: {error.what}")
        return {}, {}
    names = {"pad_token_id": specials.pad_id, "bos_token_id": specials.bos_id, "eos_token_id": specials.eos_id}
    config = {**names, **({} if specials.mask_id is None else {"mask_token_id": specials.mask_id})}
    if not wanted:
        return config, {}
    if data.pruned is not None:
        progress("no tokenizer is written: the run's vocabulary map gives its tokens other ids")
        return config, {}
    try:
        return config, tokenizer_files(data.vocabulary)
    except ConfigError as error:
        progress(f"no tokenizer is written: {error.what}")
        return config, {}


def _check_meaning(family: Any, trained: Any) -> None:
    """Raises `ConfigError` where a diffusion layout would be read as what the network was not trained as."""
    meant = family.diffusion
    blocks = "blocks" if meant.block_key else "full"
    if trained is None:
        raise ConfigError(
            f"the layout {family.name} is read as masked diffusion, and this model was not trained as such",
            where="--layout",
            fix="Leave it out, or train with a masked objective.",
        )
    if (meant.shifted, meant.block_key is None) != (trained.shifted, trained.block_size is None):
        raise ConfigError(
            f"the layout {family.name} is read as {meant.prediction}, visibility {blocks}, and this model was trained "
            f"as {trained.prediction}, visibility {trained.visibility}",
            where="--layout",
            fix="Leave it out to have one looked for.",
        )
