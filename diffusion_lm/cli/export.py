"""Writes the model of a run folder as a Hugging Face checkpoint: config.json and safetensors files.

RUN is what `train`, `compare` (WORKDIR/stages/STAGE) or `import` left. The family is the first one that has networks of
this shape, unless --family names it. Where anything is wrong, nothing is written."""

import argparse
from pathlib import Path
from typing import Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import count, facts, heading
from diffusion_lm.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    parser.add_argument("workdir", metavar="RUN", help="run folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write; must be new")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to use (default: the newest)")
    parser.add_argument("--family", metavar="NAME", help="one of `list families` (default: the first that fits)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as they are)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns its result."""
    from diffusion_lm.core.files import read_json
    from diffusion_lm.interop.huggingface import save
    from diffusion_lm.interop.run_folder import IMPORT_CARD
    from diffusion_lm.training.checkpoint import restore_params

    folder = Path(arguments.workdir).expanduser()
    imported = read_json(folder / IMPORT_CARD) if (folder / IMPORT_CARD).is_file() else None
    model, step = _model(arguments, folder, imported)
    params = restore_params(folder, step=step)
    given = imported["config"] if imported else {}
    family = arguments.family or (given.get("model_type") if imported else None)
    kind = save(arguments.to, model, params, family=family, config=given, dtype=arguments.dtype)
    parameters = model.count_parameters()["total"]
    heading(f"{kind} in {arguments.to}")
    facts([("parameters", count(parameters)), ("checkpoint", f"step {step:,} of {folder}")])
    return {"to": str(arguments.to), "model_type": kind, "step": step, "parameters": parameters}


def _model(arguments: argparse.Namespace, folder: Path, imported: Any) -> tuple[Any, int]:
    """Returns the network of the folder and the step whose parameters are wanted."""
    if imported is None or arguments.gin_file:
        from diffusion_lm.cli.run_folder import open_run

        opened = open_run(arguments, bindings=arguments.gin)
        return opened.run.model, opened.step
    from diffusion_lm.cli import config
    from diffusion_lm.interop.run_folder import MODEL_GIN

    if arguments.step not in (None, 0):
        raise ConfigError("an imported checkpoint has step 0 alone", where="--step", fix="Leave --step out.")
    return config.load([str(folder / MODEL_GIN)], arguments.gin, [], macros=["MODEL"]).build_macro("MODEL"), 0
