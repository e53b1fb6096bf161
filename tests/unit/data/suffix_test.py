"""Text behind the target: rows with a gap, from a record to what a sampler and an objective read."""

import dataclasses

import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter, with_encoder
from diffusion_lm.data.fitting import Example
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import LENGTHS, split_folder, write_records
from diffusion_lm.data.target_window import OracleLength

SPECIALS = SpecialTokens(vocab_size=100, pad_id=0, eos_id=1, bos_id=2, mask_id=4)
GAP = SingleStreamConverter(3, 4, OracleLength(closing=False), suffix_length=3)


def example(inputs, targets, suffix, number=7):
    arrays = [np.array(tokens, np.int32) for tokens in (inputs, targets, suffix)]
    return Example(arrays[0], arrays[1], number, suffix=arrays[2])


def record(inputs, targets, suffix, number):
    return Record(inputs, targets, number, suffix=suffix)


def test_a_suffix_is_conditioning_right_behind_the_window():
    batch = GAP.batch([[example([10], [20, 21], [30, 31])]], SPECIALS, training=True)
    assert batch.tokens.tolist() == [[2, 10, 20, 21, 30, 31, 0, 0, 0, 0, 0]]
    assert batch.target_mask.tolist() == [[False] * 2 + [True] * 2 + [False] * 7]
    assert batch.loss_weights.tolist() == [[0, 0, 1, 1] + [0] * 7]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0] * 5]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0]]
    prompt = GAP.prompts([example([10], [20, 21], [30, 31])], SPECIALS)
    assert prompt.tokens.tolist() == [[2, 10, 0, 0, 30, 31, 0, 0, 0, 0, 0]]
    assert prompt.target_mask.tolist() == batch.target_mask.tolist()
    assert not prompt.loss_weights.any()


def test_prompts_may_have_more_slots_than_the_reference():
    converter = dataclasses.replace(GAP, target_window=OracleLength(closing=False, extra=1))
    one = example([10], [20, 21], [30])
    assert converter.prompts([one], SPECIALS).tokens[0, :7].tolist() == [2, 10, 0, 0, 0, 30, 0]
    assert converter.batch([[one]], SPECIALS, training=True).target_mask.sum() == 2, "training has the target alone"
    long = example([10], [20, 21, 22, 23], [30])
    assert converter.prompts([long], SPECIALS).target_mask.sum() == 4, "as many as the window holds"
    with pytest.raises(ConfigError, match="extra"):
        OracleLength(extra=-1)


def test_packed_rows_keep_each_suffix_with_its_example():
    parts = [example([10], [20], [30], 1), example([11], [21, 22], [], 2), example([], [23], [31, 32], 3)]
    wide = dataclasses.replace(GAP, inputs_length=12)
    packed = wide.batch([parts], SPECIALS, training=True)
    for segment, part in enumerate(parts, 1):
        alone, here = wide.batch([[part]], SPECIALS, training=True), packed.segment_ids[0] == segment
        for name in ("tokens", "target_mask", "loss_weights", "positions", "example_ids"):
            there = getattr(alone, name)[0][alone.segment_ids[0] == 1]
            np.testing.assert_array_equal(getattr(packed, name)[0][here], there, err_msg=name)
    lengths = np.array([[1, 1, 1], [1, 2, 0], [0, 1, 2]], np.int32)
    assert wide.costs(lengths, None)[:, 0].tolist() == [4, 4, 4]


def test_what_does_not_fit_is_cut_at_its_far_end_or_refused():
    one = example([10, 11, 12, 13], [20], [30, 31, 32, 33])
    assert GAP.prompts([one], SPECIALS).tokens[0, :8].tolist() == [2, 11, 12, 13, 0, 30, 31, 32]
    strict = dataclasses.replace(GAP, too_long="error")
    with pytest.raises(ConfigError, match="suffix of example 7 has 4 tokens, but the row has room for 3"):
        strict.prompts([example([10], [20], [30, 31, 32, 33])], SPECIALS)
    for converter in (SingleStreamConverter(3, 4), EncoderDecoderConverter(3, 4)):
        for lay in (converter.prompts, lambda found, s, c=converter: c.batch([found], s, training=True)):
            with pytest.raises(ConfigError, match="room for 0") as error:
                lay([example([10], [20], [30])], SPECIALS)
            assert "suffix_length" in str(error.value)
    with pytest.raises(ConfigError, match="does not support text after the target"):
        with_encoder(GAP, encoder=True)


def test_a_row_may_be_shorter_than_its_parts_together():
    converter = dataclasses.replace(GAP, max_slots=6)
    assert converter.row_length == converter.abstract_batch(2, SPECIALS).tokens.shape[1] == 6
    for fits in (example([10, 11, 12], [20], [30]), example([], [20, 21], [30, 31, 32])):
        assert converter.prompts([fits], SPECIALS).segment_ids.sum() == 6
    with pytest.raises(ConfigError, match="example 7 has 7 tokens, but the row has room for 6") as error:
        converter.prompts([example([10, 11, 12], [20, 21], [30])], SPECIALS)
    assert "max_slots" in str(error.value)
    with pytest.raises(ConfigError, match="room for 6"):
        converter.batch([[example([10, 11, 12], [20, 21], [30])]], SPECIALS, training=True)
    with pytest.raises(ConfigError, match="max_slots"):
        dataclasses.replace(GAP, max_slots=1)


def test_records_keep_their_suffix_and_old_files_have_none(tmp_path):
    records = [record([10], [20, 21], [30], 1), record([11, 12], [22], [], 2), record([], [23], [31, 32, 33, 34], 3)]
    assert [Record.decode(one.encode()) == one for one in records] == [True] * 3
    assert len(records[1].encode()) == len(Record([11, 12], [22], 2).encode())
    folder = split_folder("gaps", "test", tmp_path)
    manifest = write_records(folder, records, Manifest("gaps", "test", SPECIALS))
    assert manifest.max_suffix_length == 4
    source = GrainSource("gaps", "test", str(tmp_path))
    assert source.open().lengths.tolist() == [[1, 2, 1], [2, 1, 0], [0, 1, 4]]
    assert source.open().token_counts[[10, 23, 34]].tolist() == [1, 1, 1]
    pipeline = DataPipeline((source,), GAP, shuffle=False)
    ((batch, read),) = pipeline.prompt_batches(3)
    assert [one.suffix.tolist() for one in read] == [[30], [], [31, 32, 33, 34]]
    assert batch.tokens[2, :6].tolist() == [2, 0, 31, 32, 33, 0]
    assert [(cut.part, cut.count, cut.side) for cut in pipeline.cuts("prompts")] == [("suffixes", 1, "right")]
    assert DataPipeline((source,), SingleStreamConverter(3, 4), shuffle=False).cuts("prompts") == ()
    with pytest.raises(ConfigError, match="suffix has 4 tokens, but the row has room for 0"):
        DataPipeline((source,), SingleStreamConverter(3, 4), shuffle=False).check()

    short = DataPipeline((source,), SingleStreamConverter(3, 4, suffix_length=4, max_slots=6), shuffle=False)
    with pytest.raises(ConfigError, match="example has 7 tokens, but the row has room for 6"):
        short.check()

    lengths = np.load(folder / LENGTHS)
    np.save(folder / LENGTHS, lengths[:, :2])
    manifest_file = folder / "manifest.json"
    manifest_file.write_text(manifest_file.read_text())  # a new time of change, so that it is opened anew
    assert source.open().lengths[:, 2].tolist() == [0, 0, 0]
