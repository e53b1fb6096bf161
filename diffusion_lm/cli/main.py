"""`diffusion-lm VERB`: reads the flags, runs the verb, turns errors into one line and an exit code."""

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
    "compare": "run the arms of a comparison, score them, write the report",
    "train": "train one model",
    "evaluate": "score a trained model: bound, metrics, likelihood, multiple choice",
    "decode": "complete prompts with a trained model",
    "explain": "show what a configuration is: parameters, shapes, shardings, FLOPs, memory",
    "plan": "compile for TPUs that are not here: memory, communication and speed of each chip",
    "bench": "time training, decoding, the input pipeline or starting up, alone or against PyTorch",
    "list": "show the objectives, samplers, estimators, models, recipes and families of checkpoints that there are",
    "import": "make a run folder of a Hugging Face checkpoint",
    "export": "write a trained model as a Hugging Face checkpoint",
    "materialise": "write tasks to files that training reads without TensorFlow",
    "doctor": "check that this machine can run all of it",
}

PRINTED = ("evaluate", "decode", "explain", "plan", "bench", "list", "doctor")
"""Verbs whose product is what they print; the others leave a folder."""


class _Parser(argparse.ArgumentParser):
    """argparse with an error of one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, fix=f"See {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs; imports their modules, which import nothing heavy."""
    parser = _Parser(
        prog="diffusion-lm",
        description="Compare autoregressive and diffusion language models under one recipe.",
        epilog="Start: diffusion-lm compare --gin_file gin/recipes/quickstart.gin --workdir runs/quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffusion-lm {diffusion_lm.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser, title="verbs")
    for name, summary in VERBS.items():
        # `import` is no name that a module could be imported by.
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
    """Runs the command line; errors become one line and an exit code."""
    debug = "--debug" in given
    try:
        return _run(given, stdout)
    except ConfigError as error:
        if debug:
            traceback.print_exc()
        progress(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    except KeyboardInterrupt:
        progress("stopped; the same command goes on from what is saved")
        return environment.EXIT_INTERRUPTED
    except environment.Terminated:
        progress("terminated; the same command goes on from what is saved")
        return environment.EXIT_PREEMPTED
    except SystemExit as error:  # argparse after --help, or a training run that saved itself after SIGTERM
        if error.code == environment.EXIT_PREEMPTED:
            progress("terminated; the same command goes on from what is saved")
        return error.code if isinstance(error.code, int) else environment.EXIT_OK


def _run(given: list[str], stdout: streams.GuardedStream) -> int:
    rest, bindings = arguments.split_gin_flags(given)
    if rest and not rest[0].startswith("-") and rest[0] not in VERBS:
        raise ConfigError(
            f"there is no verb {rest[0]!r}{near_names(rest[0], VERBS)}",
            where="VERB",
            fix=f"Use one of {', '.join(VERBS)}.",
        )
    parser = build_parser()
    parsed: Any = parser.parse_args(rest)
    if parsed.verb is None:
        parser.print_help()
        return environment.EXIT_OK
    if bindings and not hasattr(parsed, "gin_file"):
        raise ConfigError(f"{parsed.verb} takes no --gin flags", where=f"--gin.{bindings[0]}", fix="Remove them.")
    parsed.gin = bindings
    # What else has the result keeps the verb going without a reader: a run folder, a --json file.
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
