"""What does not fit a row is counted, exactly for the examples that are used, and said with the side that is lost."""

import dataclasses

import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.pretraining import CausalLM
from diffusion_lm.data.target_window import PadFilled

LENGTHS = [(3, 2), (9, 2), (1, 30), (9, 30), (6, 7), (5, 8)]
CONVERTER = SingleStreamConverter(5, 8)


def texts(cuts):
    return [str(cut) for cut in cuts]


def test_training_says_what_is_cut_and_where(make_source):
    pipeline = DataPipeline((make_source("qa", LENGTHS),), CONVERTER)
    assert texts(pipeline.cuts("training")) == [
        "qa/train: 3 of 6 prompts truncated on the left to 5 tokens (SingleStreamConverter.inputs_length)",
        "qa/train: 3 of 6 targets truncated on the right to 7 tokens and EOS (SingleStreamConverter.target_length)",
    ]
    assert pipeline.cuts("training")[0].longest == 9
    wide = dataclasses.replace(pipeline, converter=SingleStreamConverter(9, 31))
    assert wide.cuts("training") == ()


def test_counts_are_those_of_the_batches(make_source):
    """The count is made from the length index; here it is compared with what the converter really wrote."""
    source = make_source("qa", [(int(a), int(b)) for a, b in np.random.default_rng(0).integers(1, 14, (40, 2))])
    for converter in (CONVERTER, EncoderDecoderConverter(5, 8), SingleStreamConverter(5, 8, PadFilled(6))):
        pipeline = DataPipeline((source,), converter, shuffle=False)
        batch = pipeline.batch(0, 40)
        records = list(pipeline.records())
        weighed = np.asarray(batch.target_mask).sum(1)
        if converter.encoder_length is not None:
            inputs = (np.asarray(batch.encoder.segment_ids) > 0).sum(1) - 1
        else:
            inputs = (np.asarray(batch.segment_ids) > 0).sum(1) - 1 - weighed
        cut_inputs = sum(kept < len(record.inputs) for kept, record in zip(inputs, records, strict=True))
        window = [np.asarray(batch.tokens)[row][np.asarray(batch.target_mask)[row]] for row in range(40)]
        cut_targets = sum(
            not np.array_equal(kept[: len(record.targets) + 1], [*record.targets, 1])
            for kept, record in zip(window, records, strict=True)
        )
        found = {cut.part: cut.count for cut in pipeline.cuts("training")}
        assert found == {"prompts": cut_inputs, "targets": cut_targets}


def test_evaluation_counts_the_examples_that_it_uses(make_source):
    pipeline = DataPipeline((make_source("a", LENGTHS), make_source("b", [(9, 1), (1, 1)])), CONVERTER)
    counted = {(cut.task, cut.part): (cut.count, cut.of) for cut in pipeline.cuts("prompts")}
    assert counted == {("a", "prompts"): (3, 6), ("a", "targets"): (3, 6), ("b", "prompts"): (1, 2)}
    assert [(cut.part, cut.count, cut.of) for cut in pipeline.cuts("prompts", limit=2)] == [("prompts", 1, 2)]
    assert [(cut.task, cut.count, cut.of) for cut in pipeline.cuts("prompts", limit=7)][-1] == ("b", 1, 1)
    assert texts(pipeline.cuts("prompts", limit=3))[-1] == (
        "a/train: 1 of 3 targets are longer than the 7 tokens and EOS that can be generated "
        "(SingleStreamConverter.target_length)"
    )


def test_scoring_cuts_targets_only_where_it_may(make_source):
    source = make_source("qa", LENGTHS)
    assert [cut.part for cut in DataPipeline((source,), CONVERTER).cuts("scoring")] == ["prompts"]
    loose = SingleStreamConverter(5, 8, too_long="truncate")
    assert [cut.part for cut in DataPipeline((source,), loose).cuts("scoring")] == ["prompts", "targets"]


def test_texts_and_suffixes_have_their_own_words(make_source):
    text = DataPipeline((make_source("text", [(0, 30), (0, 5)]),), CONVERTER, pretraining=CausalLM())
    (line,) = texts(text.cuts("training"))
    assert line.startswith("text/train: 1 of 2 texts truncated on the right to 13 tokens")


def test_a_policy_of_error_leaves_nothing_to_report(make_source):
    strict = DataPipeline((make_source("qa", LENGTHS),), SingleStreamConverter(5, 8, too_long="error"))
    assert strict.cuts("training") == ()
    with pytest.raises(ConfigError, match="conditioning has 9 tokens"):
        strict.check()
