"""Completes prompts with the model of a run folder and prints one JSON object a line.

Prompts come from --input FILE (one a line, or JSON lines with a field "inputs"; '-' is stdin), or from a split of a
materialised task with --task and --split, or else from what the run itself decodes. The sampler is the run's own, or
the SAMPLER of --sampler FILE; --gin flags then set the sampler's parameters."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from diffusion_lm.cli import arguments as common
from diffusion_lm.cli.output import progress, say
from diffusion_lm.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    common.add_gin(parser)
    common.add_run_folder(parser)
    parser.add_argument("--input", metavar="FILE", help="prompts, one a line; '-' is stdin")
    parser.add_argument("--task", metavar="NAME", help="materialised task to take prompts from")
    parser.add_argument("--split", default="validation", metavar="NAME", help="its split (default: validation)")
    parser.add_argument("--root", metavar="DIR", help="where it was materialised")
    parser.add_argument("--sampler", metavar="FILE", help="gin file that defines SAMPLER, e.g. gin/samplers/greedy.gin")
    parser.add_argument("--limit", type=int, metavar="N", help="decode only the first N prompts")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts decoded at once (default: 8)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions of each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="root of the decoding noise (default: 0)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the verb and returns what it printed."""
    import jax

    from diffusion_lm.cli.run_folder import open_run
    from diffusion_lm.core.rng import StreamKeys
    from diffusion_lm.evaluation.generation import compiled_generate, target_texts

    opened = open_run(arguments, bindings=() if arguments.sampler else arguments.gin)
    sampler = _sampler(arguments, opened)
    data = _data(arguments, opened)
    data.specials.check(sampler)
    oracle = data.converter.target_window.oracle
    if not arguments.input and data.vocabulary_note:
        progress(data.vocabulary_note)
    batches = (
        _given_prompts(arguments, data)
        if arguments.input
        else data.prompt_batches(arguments.batch_size, arguments.limit)
    )
    model = opened.load()
    decode = compiled_generate(model.architecture, sampler, model.constrain)
    results = []
    for prompt, records in batches:
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
                    **({"reference": record.reference} if record.reference is not None else {}),
                    **({"sample": sample} if arguments.samples > 1 else {}),
                    **({"oracle": oracle} if oracle else {}),
                    "tokens": int(one.lengths[row]),
                    "score": float(one.scores[row]),
                    "forward_passes": int(one.forward_passes[row]),
                }
                say(json.dumps(result, ensure_ascii=False))
                results.append(result)
    given = f", given the oracle {oracle}" if oracle else ""
    progress(f"{len(results)} completions by {type(sampler).__name__}{given}, step {opened.step:,} of {opened.folder}")
    return results


def _sampler(arguments: argparse.Namespace, opened: Any) -> Any:
    if arguments.sampler:
        from diffusion_lm.cli import config
        from diffusion_lm.cli.search_path import split_search_path

        search_path = split_search_path(arguments.gin_search_path)
        loaded = config.load([arguments.sampler], arguments.gin, search_path, macros=["SAMPLER"])
        return loaded.build_macro("SAMPLER")
    if opened.generation:
        return opened.generation[0].sampler
    raise ConfigError(
        "the run's configuration names no sampler",
        where="--workdir",
        fix="Give one with --sampler, e.g. --sampler gin/samplers/greedy.gin.",
    )


def _data(arguments: argparse.Namespace, opened: Any) -> Any:
    """Returns the pipeline whose converter lays the prompts out, and whose sources they come from."""
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
    raise ConfigError("no prompts are named", fix="Give --input FILE, or --task NAME with --split.")


def _given_prompts(arguments: argparse.Namespace, data: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yields batches of the prompts of `--input`; the last one is filled with copies of its last prompt."""
    import numpy as np

    from diffusion_lm.core.rng import example_number
    from diffusion_lm.data.converters import Example
    from diffusion_lm.data.schema import Record

    texts = _read_prompts(arguments.input)[: arguments.limit]
    if data.pruned is not None:
        tokens = [token for text in texts for token in data.pruned.full.encode(text)]
        cut = int(data.pruned.outside(tokens).sum())
        progress(f"{cut} of {len(tokens)} tokens of the prompts are UNK: the run's vocabulary map leaves them out")
    if not texts:
        raise ConfigError(f"there is no prompt in {arguments.input}", where="--input", fix="Write one a line.")
    for start in range(0, len(texts), arguments.batch_size):
        chosen = texts[start : start + arguments.batch_size]
        records = [
            Record(
                np.asarray(data.vocabulary.encode(text)),
                np.zeros(0, np.int32),
                example_number(f"input/{start + row}"),
                inputs_text=text,
            )
            for row, text in enumerate(chosen)
        ]
        filled = records + [records[-1]] * (arguments.batch_size - len(records))
        examples = [Example(record.inputs, record.targets, record.example_id) for record in filled]
        yield data.converter.prompts(examples, data.specials), records


def _read_prompts(path: str) -> list[str]:
    try:
        if path == "-":
            lines = sys.stdin.read().splitlines()
        else:
            with open(path, encoding="utf-8") as stream:
                lines = stream.read().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", where="--input", fix="Name a text file.") from error
    return [_prompt(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        return str(json.loads(line)["inputs"])
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"line {number} begins like JSON but has no field 'inputs'", where="--input", fix='Write {"inputs": "..."}.'
        ) from error
