"""Makes a run folder of a released checkpoint: other runs start from it, and decode and evaluate read it.

PATH is a folder with config.json and safetensors files (or pytorch_model.bin, read without torch), as `hf download NAME
--local-dir PATH` makes, a GGUF file, whose weights are dequantised, or a T5X checkpoint of T5 or mT5, such as
checkpoint_1000000. The run folder gets the parameters as checkpoint 0, model.gin, which binds the network, import.json,
which says what became of each tensor, and the tokenizer. A diffusion model's gets objective.gin and sampler.gin too:
which state predicts which token, what sees what, and MASK. No code that comes with a checkpoint is run. Where anything
is wrong, nothing is written."""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from diffusion_lm.cli.output import count, facts, heading, progress, say, size
from diffusion_lm.core.files import as_path
from diffusion_lm.core.gin_text import literal, one_line

DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint, or a GGUF file")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="run folder to write; must be new")
    parser.add_argument("--param_dtype", choices=DTYPES, default="float32", help="of the parameters (default: float32)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation (default: float32)")
    parser.add_argument(
        "--fresh_missing", action="store_true", help="initialise what the files lack, e.g. an encoder's output head"
    )
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="one of `list families`, where the files do not show it: diffullama for LLaMA's names",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the verb and returns its result."""
    from diffusion_lm.interop.gguf_tokenizer import tokenizer_files
    from diffusion_lm.interop.huggingface import load
    from diffusion_lm.interop.run_folder import MODEL_GIN, OBJECTIVE_GIN, SAMPLER_GIN, check_free, write_run_folder
    from diffusion_lm.parallel import multihost
    from diffusion_lm.parallel.mesh import MeshSpec

    multihost.initialize()
    source, workdir = Path(arguments.path).expanduser(), as_path(arguments.workdir)
    check_free(workdir)
    imported = load(
        source,
        param_dtype=arguments.param_dtype,
        dtype=arguments.dtype,
        mesh=MeshSpec(),
        fresh_missing=arguments.fresh_missing,
        layout=arguments.layout,
    )
    report = imported.report
    progress(f"read in {report.seconds:.1f} s; at most {size(report.peak_host)} on the host at a time")
    write_run_folder(imported, source, workdir)
    own = []
    if imported.gguf is not None:
        stored = sorted(imported.gguf.stored().items())
        own += [
            ("stored as", ", ".join(f"{kind} ({number})" for kind, number in stored)),
            ("tokenizer", tokenizer_files(imported.gguf.values)[1]),
        ]
    specials = {name: value for name, value in dataclasses.asdict(imported.specials).items() if value not in (None, ())}
    if multihost.is_primary():
        heading(f"{imported.family} in {workdir}")
        facts(
            [
                ("parameters", count(report.parameters)),
                ("arrays", f"{len(report.mapped)} mapped, {len(report.missing)} initialised afresh"),
                ("tensors ignored", one_line(", ".join(report.ignored)) or "none"),
                *([("files not read", one_line(", ".join(report.unread_files)))] if report.unread_files else []),
                *([("adapter merged", report.adapter)] if report.adapter else []),
                *([("config not read", one_line(", ".join(report.unread_fields)))] if report.unread_fields else []),
                ("largest array", size(report.largest_array)),
                ("trained", _trained(imported)),
                ("special tokens", ", ".join(f"{name} {value}" for name, value in specials.items()) or "none named"),
                *own,
            ]
        )
        for note in report.notes:
            say(f"  note   {one_line(note)}")
        for name in report.missing:
            say(f"  fresh  {name}")
        say(f"\nTrain on from it, in a gin file: include {literal(str(workdir / MODEL_GIN))}")
        say(f"                                 run.TrainRun.initial = {literal(str(workdir))}")
        if (workdir / OBJECTIVE_GIN).is_file():
            say(f"with its own objective:          include {literal(str(workdir / OBJECTIVE_GIN))}")
            sampler = shlex.quote(str(workdir / SAMPLER_GIN))
            say(f"Decode with it:                  decode --workdir {shlex.quote(str(workdir))} --sampler {sampler}")
        elif imported.diffusion is not None:
            trained = imported.diffusion
            files = f"objectives/{trained.objective}.gin and samplers/{trained.sampler}.gin"
            say(f"\nNo file names MASK: bind MASK_ID after {files}")
    return {
        "workdir": str(workdir),
        "family": imported.family,
        "causal": imported.causal,
        "diffusion": None if imported.diffusion is None else dataclasses.asdict(imported.diffusion),
        "specials": dataclasses.asdict(imported.specials),
        "spec": dataclasses.asdict(imported.architecture.spec),
        "report": dataclasses.asdict(report),
    }


def _trained(imported: Any) -> str:
    trained = imported.diffusion
    if trained is None:
        return "from left to right" if imported.causal else "in both directions"
    mask = "MASK not named" if trained.mask_id is None else f"MASK {trained.mask_id} ({trained.mask_from})"
    return f"as masked diffusion: {trained.prediction}, visibility {trained.visibility}, {mask}"
