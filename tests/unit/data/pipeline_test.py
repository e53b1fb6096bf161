import dataclasses
import itertools

import jax
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.converters import EncoderDecoderConverter, SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.pretraining import CausalLM, PrefixSplit, SpanCorruption
from diffusion_lm.data.target_window import PadFilled

LENGTHS = [(i % 5, 1 + i % 6) for i in range(23)]
CONVERTER = SingleStreamConverter(5, 8)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def ids(batch):
    """The example ids of a batch, in order."""
    out = []
    for row_segments, row_ids in zip(batch.segment_ids, batch.example_ids, strict=True):
        out += [int(row_ids[row_segments == s][0]) for s in range(1, row_segments.max() + 1)]
    return out


@pytest.mark.parametrize("pack", [False, True])
def test_every_example_comes_once_an_epoch_and_epochs_are_reshuffled(make_source, pack):
    source = make_source("a", LENGTHS)
    pipeline = DataPipeline((source,), CONVERTER, pack=pack)
    rows = pipeline.epoch_rows
    epochs = [ids(pipeline.batch(epoch, rows)) for epoch in range(3)]
    expected = sorted(record.example_id for record in source.records())
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows < 23 if pack else rows == 23
    assert ids(dataclasses.replace(pipeline, seed=1).batch(0, rows)) != epochs[0]


@pytest.mark.parametrize("pack", [False, True])
def test_T27_order_does_not_depend_on_the_number_of_hosts(make_source, pack):
    pipeline = DataPipeline((make_source("a", LENGTHS), make_source("b", LENGTHS)), CONVERTER, (1, 3), pack=pack)
    for index in range(5):
        whole = pipeline.batch(index, 8)
        for count in (2, 4, 8):
            slices = [pipeline.batch(index, 8, process_index=p, process_count=count) for p in range(count)]
            assert same(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *slices))


def test_T27_order_does_not_depend_on_the_batch_size(make_source):
    pipeline = DataPipeline((make_source("a", LENGTHS),), CONVERTER)
    small = [pipeline.batch(index, 2) for index in range(6)]
    # Where a row stands in its batch is all that the size decides.
    whole, joined = pipeline.batch(0, 12), jax.tree.map(lambda *parts: np.concatenate(parts), *small)
    assert same(whole.replace(strata=None), joined.replace(strata=None))


@pytest.mark.parametrize("pack", [False, True])
def test_training_batches_say_where_in_the_batch_an_example_stands(make_source, pack):
    pipeline = DataPipeline((make_source("a", LENGTHS),), CONVERTER, pack=pack)
    batch = pipeline.batch(1, 4)
    np.testing.assert_allclose(batch.strata[:, 0], np.arange(4) / 4)
    for row, segments in zip(batch.strata, batch.segment_ids, strict=True):
        assert len(np.unique(row)) == segments.max(), "one place an example"
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), pipeline.abstract_batch(4)) == shapes
    assert next(iter(pipeline.eval_batches(4)))[0].strata is None


def test_T29_resume_at_a_position_is_exact(make_source):
    pipeline = DataPipeline((make_source("a", [(0, 9)] * 11),), CONVERTER, pretraining=PrefixSplit())
    with pipeline.iterator(4) as whole:
        batches = list(itertools.islice(whole, 9))
        assert whole.position == 9
    with pipeline.iterator(4, position=6, prefetch=0) as resumed:
        assert all(same(a, b) for a, b in zip(batches[6:], itertools.islice(resumed, 3), strict=True))


def test_T30_epochs_split_the_same_text_differently(make_source):
    pipeline = DataPipeline((make_source("a", [(0, 13)] * 8),), CONVERTER, pretraining=PrefixSplit())
    splits = []
    for epoch in range(2):
        batch = pipeline.batch(epoch, 8)
        splits.append(dict(zip(batch.row_ids.tolist(), batch.target_mask.sum(axis=1).tolist(), strict=True)))
    assert splits[0].keys() == splits[1].keys()
    assert splits[0] != splits[1]


def test_prefetch_is_the_same_as_reading_and_stops(make_source):
    pipeline = DataPipeline((make_source("a", LENGTHS),), CONVERTER)
    batches = pipeline.iterator(4, prefetch=3)
    for index in range(7):
        assert same(next(batches), pipeline.batch(index, 4))
    thread = batches._thread
    batches.close()
    assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)


def test_error_in_the_background_reaches_the_caller(make_source, monkeypatch):
    pipeline = DataPipeline((make_source("a", LENGTHS),), CONVERTER)

    def broken(self, *args, **kwargs):
        raise OSError("disk gone")

    monkeypatch.setattr(DataPipeline, "batch", broken)
    with pytest.raises(OSError, match="disk gone"):
        next(pipeline.iterator(4))


@pytest.mark.parametrize(
    "converter",
    [
        SingleStreamConverter(5, 8, PadFilled(7)),
        EncoderDecoderConverter(12, 20),
        EncoderDecoderConverter(9, 16, PadFilled(4)),
    ],
)
def test_packed_rows_hold_what_unpacked_rows_hold(make_source, converter):
    source = make_source("a", [(i % 9, 1 + i % 5) for i in range(40)])
    packed = DataPipeline((source,), converter, pack=True)
    plain = DataPipeline((source,), converter)

    def contents(batch):
        found = {}
        for b in range(len(batch.tokens)):
            for s in range(1, batch.segment_ids[b].max() + 1):
                here = batch.segment_ids[b] == s
                value = [batch.tokens[b][here].tolist(), batch.target_mask[b][here].tolist()]
                if batch.encoder is not None:
                    value.append(batch.encoder.tokens[b][batch.encoder.segment_ids[b] == s].tolist())
                found[int(batch.example_ids[b][here][0])] = value
        return found

    everything = contents(packed.batch(0, packed.epoch_rows))
    assert len(everything) == 40
    assert everything == contents(plain.batch(0, plain.epoch_rows))


@pytest.mark.parametrize("part", [PrefixSplit(), CausalLM()])
@pytest.mark.parametrize("pack", [False, True])
def test_text_comes_back_whole_from_rows(make_source, part, pack):
    source = make_source("a", [(0, 1 + i % 13) for i in range(30)])
    pipeline = DataPipeline((source,), CONVERTER, pack=pack, pretraining=part)
    batch = pipeline.batch(0, pipeline.epoch_rows)
    texts = {r.example_id: r.targets.tolist() for r in source.records()}
    for b in range(len(batch.tokens)):
        for s in range(1, batch.segment_ids[b].max() + 1):
            here = batch.segment_ids[b] == s
            tokens = batch.tokens[b][here].tolist()
            assert tokens == [2, *texts.pop(int(batch.example_ids[b][here][0]))]
            assert (batch.loss_weights[b][here] == batch.target_mask[b][here]).all()
    assert not texts


def test_span_corruption_in_rows(make_source, train_vocabulary):
    vocabulary = train_vocabulary(symbols=["<mask>"] + [f"<extra_id_{i}>" for i in range(9, -1, -1)])
    source = make_source("a", [(0, 40)] * 6, specials=vocabulary.specials, vocabulary=vocabulary)
    for converter in (SingleStreamConverter(30, 25), EncoderDecoderConverter(40, 12)):
        pipeline = DataPipeline((source,), converter, pretraining=SpanCorruption())
        batch = pipeline.batch(0, 6)
        assert (batch.target_mask.sum(axis=1) == 6 + 2 + 1).all()  # 15% of 40 in two spans, EOS
        first = batch.tokens[batch.target_mask].reshape(6, 9)
        assert (first[:, 0] == vocabulary.sentinel_ids[0]).all()
        assert (first[:, -1] == 1).all()


def test_mixing_text_and_tasks_applies_the_transform_to_the_text_only(make_source):
    text, task = make_source("text", [(0, 9)] * 5), make_source("task", [(2, 3)] * 5)
    pipeline = DataPipeline((text, task), CONVERTER, shuffle=False, pretraining=CausalLM())
    batch = pipeline.batch(0, 10)
    assert batch.target_mask.sum(axis=1).tolist() == [9] * 5 + [4] * 5


def test_evaluation_fills_the_last_batch_with_unscored_copies(make_source):
    source = make_source("a", LENGTHS)
    pipeline = DataPipeline((source,), CONVERTER)
    batches = list(pipeline.eval_batches(5))
    assert [len(records) for _, records in batches] == [5, 5, 5, 5, 3]
    assert [r for _, records in batches for r in records] == source.records()
    last, _ = batches[-1]
    assert last.tokens.shape == (5, 14)
    assert last.loss_weights[:3].any(axis=1).all()
    assert not last.loss_weights[3:].any()
    assert sum(len(records) for _, records in pipeline.eval_batches(4, limit=6)) == 6
    sliced = list(pipeline.eval_batches(6, process_index=1, process_count=2))
    assert [len(records) for _, records in sliced] == [3, 3, 3, 2]
    assert sliced[0][1] == source.records()[3:6]
    empty = list(pipeline.eval_batches(4, limit=1, process_index=1, process_count=2))
    assert [len(records) for _, records in empty] == [0]
    assert not empty[0][0].loss_weights.any()


def test_prompts_come_with_their_records(make_source):
    source = make_source("a", LENGTHS)
    batches = list(DataPipeline((source,), CONVERTER).prompt_batches(8, limit=10))
    assert [len(records) for _, records in batches] == [8, 2]
    assert all((batch.target_mask.sum(axis=1) == 8).all() for batch, _ in batches)
    assert all(not batch.tokens[batch.target_mask].any() for batch, _ in batches)


def test_configured_alike_means_equal(make_source):
    source = make_source("a", LENGTHS)
    first = DataPipeline([source], CONVERTER, weights=[1])
    assert first == DataPipeline((source,), CONVERTER, weights=(1.0,))
    assert hash(first) == hash(DataPipeline((source,), CONVERTER, weights=(1.0,)))
    first.batch(0, 2)
    assert first == DataPipeline((source,), CONVERTER, weights=(1.0,))


def test_different_vocabularies_do_not_mix(make_source):
    pipeline = DataPipeline((make_source("a", LENGTHS), make_source("b", LENGTHS, sha="v2")), CONVERTER)
    with pytest.raises(ConfigError, match="'a' and 'b' were materialised with different vocabularies"):
        pipeline.batch(0, 2)


def test_what_is_cut_is_counted(make_source):
    source = make_source("a", [(3, 2), (9, 2), (1, 30), (9, 30)])
    cuts = DataPipeline((source,), CONVERTER).cuts("training")
    assert [(cut.part, cut.count, cut.of) for cut in cuts] == [("prompts", 2, 4), ("targets", 2, 4)]
    strict = DataPipeline((source,), SingleStreamConverter(5, 8, too_long="error"))
    with pytest.raises(ConfigError, match="conditioning has 9 tokens, but the row has room for 5"):
        strict.iterator(2)
    DataPipeline((source,), CONVERTER).check()
    with pytest.raises(ConfigError, match="target has 30 tokens, but the row has room for 7"):
        DataPipeline((source,), CONVERTER).check(evaluation=True)
    text = make_source("t", [(0, 30), (0, 5)])
    assert DataPipeline((text,), CONVERTER, pretraining=CausalLM()).cuts("training")[0].count == 1


def test_mistakes_are_one_sentence(make_source, tmp_path):
    task, text = make_source("task", LENGTHS), make_source("text", [(0, 9)] * 5)
    cases = [
        (lambda: DataPipeline((), CONVERTER), "sources=\\(\\): must not be empty"),
        (lambda: DataPipeline((task,), CONVERTER, weights=(1, 2)), "2 weights for 1 sources"),
        (lambda: DataPipeline((task, text), CONVERTER, weights=(1, 0)), "every weight must be at least 1/10000"),
        (lambda: DataPipeline((text,), CONVERTER).check(), "'text' has only targets"),
        (lambda: DataPipeline((task,), CONVERTER, pretraining=PrefixSplit()).check(), "PrefixSplit: unused, because"),
        (
            lambda: DataPipeline((task,), CONVERTER).batch(0, 3, process_count=2),
            "must be a multiple of the 2 processes",
        ),
        (lambda: DataPipeline((text,), CONVERTER, pretraining=SpanCorruption()).check(), "without a vocabulary"),
        (
            lambda: DataPipeline((text,), EncoderDecoderConverter(8, 8), pack=True, pretraining=PrefixSplit()).check(),
            "changes the lengths every epoch",
        ),
        (lambda: GrainSource("text", root=tmp_path, chunk_length=4).open(), "was written with None"),
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message):
            make()


def test_span_corruption_needs_sentinels(make_source, train_vocabulary):
    vocabulary = train_vocabulary()
    source = make_source("a", [(0, 9)], specials=vocabulary.specials, vocabulary=vocabulary)
    with pytest.raises(ConfigError, match="the vocabulary has none"):
        DataPipeline((source,), CONVERTER, pretraining=SpanCorruption()).check()


@pytest.mark.parametrize("converter", [SingleStreamConverter(5, 8), EncoderDecoderConverter(5, 8, PadFilled())])
def test_one_pipeline_serves_both_layouts(make_source, converter):
    """The same examples with the same lengths; there and back is where it began."""
    pipeline = DataPipeline((make_source("a", LENGTHS),), converter, shuffle=False)
    encoder = pipeline.encoder_length is not None
    assert pipeline.with_encoder(encoder) is pipeline
    other = pipeline.with_encoder(not encoder)
    assert (other.encoder_length is not None) != encoder
    assert other.with_encoder(encoder) == pipeline
    single, double = (other, pipeline) if encoder else (pipeline, other)
    for (one, records), (two, again) in zip(single.prompt_batches(4), double.prompt_batches(4), strict=True):
        assert records == again
        assert (one.target_mask.sum(axis=1) == two.target_mask.sum(axis=1)).all()
        for row, record in enumerate(records):
            given = two.encoder.tokens[row][two.encoder.segment_ids[row] == 1].tolist()
            assert given == [*record.inputs.tolist(), 1]
            conditioning = (one.segment_ids[row] == 1) & ~one.target_mask[row]
            assert one.tokens[row][conditioning].tolist() == [one.tokens[row][0], *record.inputs.tolist()]
