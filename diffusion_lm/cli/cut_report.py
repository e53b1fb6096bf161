"""What the windows of a configuration cut, of the data that are there: for verbs that run nothing."""

from typing import Any

from diffusion_lm.cli.walk import parts
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.round_trip import loss_sentences
from diffusion_lm.data.store import read_manifest
from diffusion_lm.evaluation.generation import GenerationTask
from diffusion_lm.evaluation.likelihood import BoundEvaluation
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation
from diffusion_lm.training.run import TrainRun


def cut_sentences(root: Any) -> list[str]:
    """Returns a sentence for each data set and part that rows below `root` do not hold whole.

    Data that are not materialised are passed over.
    """
    found: list[str] = []
    for run in parts(root, TrainRun):
        if _are_there(run.data):
            found += map(str, run.data.cuts("training"))
    for kind in (GenerationTask, BoundEvaluation, ScoringEvaluation):
        evaluation: Any
        for evaluation in parts(root, kind):
            if _are_there(evaluation.data):
                found += map(str, evaluation.cuts)
    return list(dict.fromkeys(found))


def lossy_sentences(root: Any) -> list[str]:
    """Returns a sentence for each data set below `root` that its vocabulary could not write whole."""
    manifests = (read_manifest(source.folder) for source in parts(root, GrainSource))
    return [
        sentence
        for manifest in manifests
        if manifest is not None
        for sentence in loss_sentences(f"{manifest.task}/{manifest.split}", manifest.unwritten)
    ]


def _are_there(data: Any) -> bool:
    return all(read_manifest(source.folder) is not None for source in parts(data, GrainSource))
