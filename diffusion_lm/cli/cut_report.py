"""Reports which examples of the materialised data are truncated or lose characters, for verbs that train nothing."""

from diffusion_lm.cli.walk import find_all
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.round_trip import loss_sentences
from diffusion_lm.data.store import read_manifest
from diffusion_lm.evaluation.generation import GenerationTask
from diffusion_lm.evaluation.likelihood import BoundEvaluation
from diffusion_lm.evaluation.scoring_task import ScoringEvaluation
from diffusion_lm.training.run import TrainRun


def cut_sentences(root: object) -> list[str]:
    """Returns a sentence for each data set and part (inputs, targets) whose examples are truncated under `root`.

    Data that are not materialised are skipped.
    """
    found: list[str] = []
    for run in find_all(root, TrainRun):
        if _is_materialised(run.data):
            found += map(str, run.data.cuts("training"))
    evaluations: list[GenerationTask | BoundEvaluation | ScoringEvaluation]
    evaluations = [
        *find_all(root, GenerationTask),
        *find_all(root, BoundEvaluation),
        *find_all(root, ScoringEvaluation),
    ]
    for evaluation in evaluations:
        if _is_materialised(evaluation.data):
            found += map(str, evaluation.cuts)
    return list(dict.fromkeys(found))


def lossy_sentences(root: object) -> list[str]:
    """Returns a sentence for each data set under `root` with characters that its vocabulary cannot encode."""
    manifests = (read_manifest(source.folder) for source in find_all(root, GrainSource))
    return [
        sentence
        for manifest in manifests
        if manifest is not None
        for sentence in loss_sentences(f"{manifest.task}/{manifest.split}", manifest.unwritten)
    ]


def _is_materialised(data: DataPipeline) -> bool:
    return all(read_manifest(source.folder) is not None for source in find_all(data, GrainSource))
