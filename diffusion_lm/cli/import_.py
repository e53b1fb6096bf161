"""Converts a released checkpoint into a run directory, from which other runs start and which decode and evaluate read.

PATH is one of:
  - a Hugging Face directory (`hf download NAME --local-dir PATH`) with config.json and safetensors files, or with
    pytorch_model.bin, which is read without torch
  - a GGUF file; its weights are dequantised
  - a T5X checkpoint of T5 or mT5, such as checkpoint_1000000

The run directory contains the parameters (checkpoint 0), model.gin (binds the network), import.json (lists what each
tensor became) and the tokenizer. For a diffusion model it also contains objective.gin and sampler.gin, which set the
alignment, the attention visibility and the mask token. Code that comes with a checkpoint is never run. If anything
fails, nothing is written."""

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
    parser.add_argument("path", metavar="PATH", help="directory of the checkpoint, or a GGUF file")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="run directory to write; must not exist yet")
    parser.add_argument(
        "--param_dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default: float32)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the computation (default: float32)"
    )
    parser.add_argument(
        "--fresh_missing",
        action="store_true",
        help="initialise parameters that the checkpoint lacks, e.g. the output head of an encoder",
    )
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="family of `diffusion-lm list families` (default: detected; needed e.g. for diffullama, which has LLaMA's "
        "config)",
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
    progress(f"read in {report.seconds:.1f} s; peak host memory {size(report.peak_host)}")
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
                ("arrays", f"{len(report.mapped)} mapped, {len(report.missing)} newly initialised"),
                ("tensors ignored", one_line(", ".join(report.ignored)) or "none"),
                *([("files not read", one_line(", ".join(report.unread_files)))] if report.unread_files else []),
                *([("adapter merged", report.adapter)] if report.adapter else []),
                *([("config not read", one_line(", ".join(report.unread_fields)))] if report.unread_fields else []),
                ("largest array", size(report.largest_array)),
                ("trained", _trained(imported)),
                ("special tokens", ", ".join(f"{name} {value}" for name, value in specials.items()) or "none"),
                *own,
            ]
        )
        for note in report.notes:
            say(f"  note   {one_line(note)}")
        for name in report.missing:
            say(f"  new    {name}")
        say(f"\nTo train from it, in a gin file: include {literal(str(workdir / MODEL_GIN))}")
        say(f"                                 run.TrainRun.initial = {literal(str(workdir))}")
        if (workdir / OBJECTIVE_GIN).is_file():
            say(f"With its own objective:          include {literal(str(workdir / OBJECTIVE_GIN))}")
            sampler = shlex.quote(str(workdir / SAMPLER_GIN))
            say(f"To decode:                       decode --workdir {shlex.quote(str(workdir))} --sampler {sampler}")
        elif imported.diffusion is not None:
            trained = imported.diffusion
            say("\nThe checkpoint does not name its mask token: set DIFFUSION_LM_MASK_TOKEN, materialise the data,")
            say(f"then train with objectives/{trained.objective}.gin and decode with samplers/{trained.sampler}.gin")
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
        return "with causal attention" if imported.causal else "with bidirectional attention"
    mask = "no mask token named" if trained.mask_id is None else f"MASK {trained.mask_id} ({trained.mask_from})"
    return f"by masked diffusion: {trained.prediction}, visibility {trained.visibility}, {mask}"
