"""Completes prompts with a trained model and prints one JSON object per line.

Prompts come from --input FILE ('-' for stdin), from a split of a materialised task (--task, --split), or by default
from the task that the run evaluates by decoding. A line of --input is plain text or a JSON object with the field
"inputs". For infilling, the JSON object may also give the text after the gap ("suffix") and the number of tokens to
fill in ("slots").

The sampler is that of the run, or the SAMPLER of --sampler FILE. With --sampler, --gin flags set its parameters."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import progress, say
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import json_text

if TYPE_CHECKING:
    from diffusion_lm.cli.run_folder import OpenRun
    from diffusion_lm.data.iterator import DataPipeline
    from diffusion_lm.samplers.sampler import Sampler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    common.add_run_folder(parser)
    parser.add_argument("--input", metavar="FILE", help="prompts, one per line; '-' for stdin")
    parser.add_argument("--task", metavar="NAME", help="materialised task to take prompts from")
    parser.add_argument("--split", default="validation", metavar="NAME", help="split of --task (default: validation)")
    parser.add_argument("--root", metavar="DIR", help="directory of the materialised data (default: that of the run)")
    parser.add_argument("--sampler", metavar="FILE", help="gin file that defines SAMPLER, e.g. gin/samplers/greedy.gin")
    parser.add_argument("--limit", type=int, metavar="N", help="decode only the first N prompts")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts per batch (default: 8)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of decoding (default: 0)")
    common.add_force(parser)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the verb; returns one dict per printed line."""
    import jax

    from diffusion_lm.cli.prompts import CutPrompts, given_prompts
    from diffusion_lm.cli.run_folder import open_run
    from diffusion_lm.core.rng import StreamKeys
    from diffusion_lm.evaluation.generation import compiled_generate, target_texts

    # With --sampler, the --gin flags belong to the sampler file and not to the run.
    opened = open_run(arguments, bindings=() if arguments.sampler else arguments.gin)
    sampler = _sampler(arguments, opened)
    unlike = opened.mismatches(sampler, force=arguments.force)
    for difference in unlike:
        progress(f"warning: {difference}")
    data = _data(arguments, opened)
    oracle = data.converter.target_window.oracle
    if not arguments.input and data.vocabulary_note:
        progress(data.vocabulary_note)
    batches = (
        given_prompts(arguments.input, arguments.limit, arguments.batch_size, data)
        if arguments.input
        else data.prompt_batches(arguments.batch_size, arguments.limit)
    )
    model = opened.load()
    decode = compiled_generate(model.architecture, sampler, model.constrain)
    results: list[dict[str, Any]] = []
    # `given_prompts` makes rows long enough for the suffixes of --input, so only suffixes of tasks can be cut.
    cuts = CutPrompts(data.converter, suffixes=not arguments.input)
    for prompt, records in batches:
        cut = [cuts.add(record) for record in records]
        placed = model.constrain.rows(prompt)
        decoded = [
            jax.device_get(decode(model.params, placed, StreamKeys.create(arguments.seed, sample)))
            for sample in range(arguments.samples)
        ]
        texts = [target_texts(one, prompt, data.vocabulary) for one in decoded]
        for row, record in enumerate(records):
            for sample, (one, text) in enumerate(zip(decoded, texts, strict=True)):
                result = {
                    "inputs": record.inputs_text,
                    "output": text[row],
                    **({"suffix": data.vocabulary.decode(record.suffix.tolist())} if len(record.suffix) else {}),
                    **({"reference": record.reference} if record.reference is not None else {}),
                    **({"sample": sample} if arguments.samples > 1 else {}),
                    **({"oracle": oracle} if oracle else {}),
                    **({"cut_tokens": cut[row]} if cut[row] else {}),
                    **({"unlike_training": list(unlike)} if unlike else {}),
                    "tokens": int(one.lengths[row]),
                    "score": float(one.scores[row]),
                    "forward_passes": int(one.forward_passes[row]),
                }
                say(json_text(result))
                results.append(result)
    cuts.conclude()
    given = f", given the oracle {oracle}" if oracle else ""
    progress(f"{len(results)} completions by {type(sampler).__name__}{given}, step {opened.step:,} of {opened.folder}")
    return results


def _sampler(arguments: argparse.Namespace, opened: "OpenRun") -> "Sampler":
    if arguments.sampler:
        from diffusion_lm.cli import config
        from diffusion_lm.cli.search_path import split_search_path

        search_path = split_search_path(arguments.gin_search_path)
        loaded = config.load([arguments.sampler], arguments.gin, search_path, macros=["SAMPLER"])
        return loaded.build_macro("SAMPLER")
    if opened.generation:
        return opened.generation[0].sampler
    raise ConfigError(
        "the configuration of the run has no sampler",
        where="--workdir",
        fix="Add one with --sampler, e.g. --sampler gin/samplers/greedy.gin.",
    )


def _data(arguments: argparse.Namespace, opened: "OpenRun") -> "DataPipeline":
    """Returns the pipeline whose converter lays out the prompts and, without `--input`, whose sources provide them."""
    tasks = [evaluation.task for evaluation in opened.generation]
    if arguments.task:
        from diffusion_lm.data.grain_source import GrainSource

        data = next((task.data for task in tasks if task.data.sources[0].task == arguments.task), opened.run.data)
        root = arguments.root or data.sources[0].root
        source = GrainSource(arguments.task, arguments.split, root)
        return dataclasses.replace(data, sources=(source,), weights=None, pack=False)
    if tasks:
        return tasks[0].data
    if arguments.input:
        return opened.run.data
    raise ConfigError("no prompts given", fix="Pass --input FILE, or --task NAME with --split.")
