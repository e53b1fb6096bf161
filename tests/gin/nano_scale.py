"""Any comparison at the smallest scale at which all of it still runs, and synthetic data for every task that it reads.

What makes a recipe stays: arms, stages, objectives, optimizers, target windows, samplers. What only makes it long is
cut: widths, layers, lengths, steps, examples. Lengths and sizes are the same for all recipes, so that they share
programs.
"""

import dataclasses
from collections.abc import Mapping

from diffusion_lm.cli.walk import find_all
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import read_manifest, split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.data.vocabulary_map import UsedTokens
from diffusion_lm.evaluation.generation import GenerationTask
from diffusion_lm.evaluation.likelihood import BoundEvaluation
from diffusion_lm.evaluation.speed import SpeedStudy
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.recipes.comparison import Comparison
from diffusion_lm.recipes.stage import Stage
from diffusion_lm.training.run import TrainRun

EXAMPLES = 2
PAD, EOS, MASK, SEPARATOR = 0, 1, 4, 5
INPUTS, TARGETS = 7, 8
CHUNK = INPUTS + TARGETS
SAMPLER_LIMITS = {"steps": 2, "candidates": 2, "beams": 2, "beam": 2, "draft": 4}

PHRASES = ("x = 1", "a red hat", "y = 2", "the sea")
SENTINELS = 4


def nano(comparison, root, *, vocab_size, most_arms):
    """Returns the comparison at nano scale, its data below `root`, with at most `most_arms` of its arms."""
    return _shrunk(dataclasses.replace(comparison, arms=some(comparison.arms, most_arms)), str(root), vocab_size)


def nano_run(run, root, *, vocab_size):
    """Returns a training run at nano scale, from fresh parameters, its data below `root`."""
    return _shrunk(run, str(root), vocab_size)


def some(arms, most):
    """Returns `most` arms in their order: the first of each family, and a spread of the others with the last of all."""
    first = {arm.family: arm.name for arm in reversed(arms)}.values()
    others = [arm.name for arm in arms if arm.name not in first]
    left = min(most - len(first), len(others))
    chosen = {*first, *(others[(k + 1) * len(others) // left - 1] for k in range(left))}
    return tuple(arm for arm in arms if arm.name in chosen)


def write_data(comparison, vocabulary):
    """Writes what the pipelines of a nano comparison read and is not there yet: no inputs where text is split."""
    metrics = {source: task.metric for task in find_all(comparison, GenerationTask) for source in task.data.sources}
    for pipeline in find_all(comparison, DataPipeline):
        for source in pipeline.sources:
            if read_manifest(source.folder) is None:
                _write(source, vocabulary, metrics.get(source), text_only=pipeline.pretraining is not None)


def train_vocabulary(folder):
    """Returns a vocabulary of single characters with MASK at 4, as most recipes expect it, and sentinels."""
    import sentencepiece

    text = folder / "text.txt"
    text.write_text("\n".join(PHRASES * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "nano"), model_type="char", vocab_size=64, hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
        control_symbols=["<mask>", *(f"<extra_id_{number}>" for number in range(SENTINELS))],
    )  # fmt: skip
    return Vocabulary.load(folder / "nano.model")


def _write(source, vocabulary, metric, *, text_only):
    records = []
    for index in range(4):
        phrase = PHRASES[index % len(PHRASES)]
        targets = vocabulary.encode(phrase * 3)[:CHUNK] if text_only else vocabulary.encode(phrase)[: TARGETS - 1]
        reference = {"answers": [phrase]} if metric == "squad" else phrase
        if metric in ("pass_at_1", "pass_at_k"):
            reference = {"setup": "", "tests": ["assert x == 1"]}
        of_metric = {
            "final_answer": {"answer": "2"},
            "countdown": {"numbers": [1], "goal": 1},
            "number_match": "2",
        }
        reference = of_metric.get(metric, reference)
        records.append(
            Record(
                inputs=[] if text_only else vocabulary.encode(f"say {phrase}"),
                targets=targets,
                example_id=example_number(f"{source.task}/{source.split}/{index}"),
                inputs_text=f"say {phrase}",
                targets_text=phrase,
                reference=reference,
            )
        )
    manifest = Manifest(source.task, source.split, vocabulary.specials, chunk_length=source.chunk_length)
    write_records(split_folder(source.task, source.split, source.root), records, manifest, vocabulary=vocabulary)


def _shrunk(value, root, vocab_size):
    """Returns a configured object with everything below it made small."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: _shrunk(item, root, vocab_size) for name, item in old.items()}
        new |= _smaller(value, root, vocab_size)
        changed = {name: item for name, item in new.items() if item is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, Mapping):
        return {key: _shrunk(item, root, vocab_size) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shrunk(item, root, vocab_size) for item in value)
    return value


def _smaller(value, root, vocab_size):
    """Returns the fields of one object that scale sets, at nano scale."""
    match value:
        case TransformerSpec():
            return {
                "vocab_size": vocab_size,
                "num_layers": 1,
                "model_dim": 16,
                "num_heads": 2,
                "num_kv_heads": value.num_kv_heads and 1,
                "head_dim": 8,
                "mlp_dim": 32,
                "encoder_layers": min(value.encoder_layers, 1),
                "dtype": "float32",
                "scan_layers": False,
                "remat": "none",
            }
        case UsedTokens():
            return {"size": vocab_size}
        case GrainSource():
            return {"root": root, "chunk_length": CHUNK if value.chunk_length else None}
        case SingleStreamConverter() | EncoderDecoderConverter():
            separator = {"separator_id": SEPARATOR} if getattr(value, "separator_id", None) is not None else {}
            return {"inputs_length": INPUTS, "target_length": TARGETS, **separator}
        case TrainRun():
            small = {"steps": min(value.steps, 1), "batch_size": EXAMPLES, "microbatches": 1, "log_every": 1}
            return {**small, "initial": None}
        case Stage(initial=str()):
            return {"initial": None}
        case GenerationTask():
            return {"limit": EXAMPLES, "batch_size": EXAMPLES, "samples": min(value.samples, 2)}
        case BoundEvaluation():
            return {"limit": EXAMPLES, "batch_size": EXAMPLES}
        case SpeedStudy():
            return {"lengths": (TARGETS,), "prompt_length": 1 + INPUTS, "batch_size": EXAMPLES, "repeats": 1}
        case Comparison():
            bounded = min(value.bound_limit, EXAMPLES)
            return {"bound_limit": bounded, "resamples": 10, "shown": min(value.shown, 1)}
    ids = {"pad_id": PAD, "eos_id": EOS, "mask_id": MASK}
    fields = {field.name for field in dataclasses.fields(value) if field.init}
    changed = {name: token for name, token in ids.items() if name in fields and getattr(value, name) is not None}
    if hasattr(value, "generate"):
        limited = {name: (getattr(value, name, None), most) for name, most in SAMPLER_LIMITS.items()}
        changed |= {name: min(found, most) for name, (found, most) in limited.items() if found is not None}
    return changed
