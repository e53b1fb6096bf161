"""Entry point of `diffusion-lm VERB`: parses the flags, runs the verb, maps errors to one line and an exit code."""

import argparse
import importlib
import keyword
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import diffusion_lm
from diffusion_lm.cli import arguments, environment, streams
from diffusion_lm.cli.output import progress, write_result
from diffusion_lm.core.errors import ConfigError, near_names

VERBS = {
    "compare": "train and evaluate all arms of a comparison and write the report",
    "report": "write the HTML report of a finished comparison again",
    "train": "train one model",
    "evaluate": "evaluate a trained model: likelihood bound, task metrics, likelihood, multiple choice",
    "decode": "complete prompts with a trained model",
    "explain": "print a configuration: settings, parameters, shapes, shardings, FLOPs, memory",
    "plan": "compile for TPUs or GPUs without access to them: memory, communication and speed per chip",
    "bench": "time training, decoding, the input pipeline or startup, alone or against PyTorch",
    "list": "list objectives, samplers, estimators, models, recipes and checkpoint families",
    "import": "convert a Hugging Face, GGUF or T5X checkpoint into a run directory",
    "export": "write a trained model as a Hugging Face checkpoint",
    "materialise": "write SeqIO tasks to files that training reads without TensorFlow",
    "doctor": "check that this installation works",
}

PRINTED = ("evaluate", "decode", "explain", "plan", "bench", "list", "doctor")
"""Verbs whose result is what they print. The other verbs write a directory."""


_RESUME = "run the same command again to resume from the last checkpoint"


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports errors in one line, as `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, fix=f"See {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs. It imports the modules of all verbs, but not JAX or TensorFlow."""
    parser = _Parser(
        prog="diffusion-lm",
        description="Train, convert and compare autoregressive and diffusion language models.",
        epilog="First run: diffusion-lm compare --gin_file gin/recipes/quickstart.gin --workdir runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffusion-lm {diffusion_lm.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser, title="verbs")
    for name, summary in VERBS.items():
        # `import` is a Python keyword, so its module is called `import_`.
        module = importlib.import_module(f"diffusion_lm.cli.{name}{'_' if keyword.iskeyword(name) else ''}")
        verb = verbs.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=arguments.GIN_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        arguments.add_common(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code (`environment.py` lists them)."""
    with streams.guarded() as stdout:
        try:
            code = _checked(list(sys.argv[1:] if argv is None else argv), stdout)
            stdout.flush()
        except streams.OutputClosed:
            return environment.EXIT_OUTPUT_CLOSED
    return code


def _checked(given: list[str], stdout: streams.GuardedStream) -> int:
    """Runs the command line and maps errors to one line on stderr and an exit code."""
    debug = "--debug" in given
    try:
        return _run(given, stdout)
    except ConfigError as error:
        if debug:
            traceback.print_exc()
        progress(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt:
        progress(f"interrupted; {_RESUME}")
        return environment.EXIT_INTERRUPTED
    except environment.Terminated:
        progress(f"terminated; {_RESUME}")
        return environment.EXIT_PREEMPTED
    except SystemExit as error:  # argparse after --help, or a training run that saved a checkpoint after SIGTERM
        if error.code == environment.EXIT_PREEMPTED:
            progress(f"terminated; {_RESUME}")
        return error.code if isinstance(error.code, int) else environment.EXIT_OK


def _run(given: list[str], stdout: streams.GuardedStream) -> int:
    rest, bindings = arguments.split_gin_flags(given)
    if rest and not rest[0].startswith("-") and rest[0] not in VERBS:
        raise ConfigError(
            f"unknown verb {rest[0]!r}{near_names(rest[0], VERBS)}",
            where="VERB",
            fix=f"Use one of {', '.join(VERBS)}.",
        )
    parser = build_parser()
    parsed: Any = parser.parse_args(rest)
    if parsed.verb is None:
        parser.print_help()
        return environment.EXIT_OK
    if bindings and not hasattr(parsed, "gin_file"):
        raise ConfigError(
            f"{parsed.verb} does not accept --gin flags", where=f"--gin.{bindings[0]}", fix="Remove them."
        )
    parsed.gin = bindings
    # A verb whose result is also in a run directory or a --json file continues after stdout is closed.
    stdout.needed = parsed.verb in PRINTED and parsed.json in (None, "-")
    environment.prepare()
    with environment.sigterm_raises():
        environment.import_modules(parsed.module)
        outcome = parsed.run(parsed)
    result, code = outcome if isinstance(outcome, tuple) else (outcome, environment.EXIT_OK)
    stdout.needed = stdout.needed or parsed.json == "-"
    write_result(parsed.json, result)
    return code


if __name__ == "__main__":
    sys.exit(main())
