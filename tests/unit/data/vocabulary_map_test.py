"""A vocabulary cut to what the data use: ids in batches, texts, special tokens, and what is said about the rest."""

import dataclasses

import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import example_number
from diffusion_lm.data.converters import SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.pretraining import PrefixSplit
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary_map import FILE, PrunedVocabulary, StoredMap, UsedTokens, read_map

CONVERTER = SingleStreamConverter(8, 16)


@pytest.fixture
def write(tmp_path, train_vocabulary):
    """Returns `write(split, [(inputs, targets), ...]) -> GrainSource` of texts under one tiny vocabulary."""
    vocabulary = train_vocabulary(symbols=("<mask>", "\n", "<extra_id_0>"))

    def make(split, texts, task="echo", model=vocabulary):
        records = [
            Record(
                model.encode(inputs) if inputs else [],
                model.encode(targets),
                example_number(f"{task}/{split}/{number}"),
                inputs_text=inputs,
                targets_text=targets,
            )
            for number, (inputs, targets) in enumerate(texts)
        ]
        write_records(
            split_folder(task, split, tmp_path), records, Manifest(task, split, model.specials), vocabulary=model
        )
        return GrainSource(task, split, root=tmp_path)

    return make


@pytest.fixture
def train(write):
    return write("train", [("the cat", "sat on"), ("the mat", "the cat")])


def pipeline(source, rule, **fields):
    return DataPipeline((source,), CONVERTER, vocabulary_map=rule, **fields)


def test_special_tokens_first_then_the_used_ones_in_order(train):
    kept = pipeline(train, UsedTokens((train,))).pruned.kept
    full = train.vocabulary
    used = {int(token) for record in train.records() for token in (*record.inputs, *record.targets)}
    assert kept[:5] == (0, 1, 2, 3, 4), "PAD, EOS, BOS, UNK, MASK"
    assert list(kept[5:6]) == list(full.sentinel_ids)
    assert list(kept[6:]) == sorted(used - set(kept[:6]))
    assert len(kept) < full.size


def test_batches_have_new_ids_that_lead_back_to_the_old_ones(train):
    plain, mapped = DataPipeline((train,), CONVERTER), pipeline(train, UsedTokens((train,)))
    kept = np.asarray(mapped.pruned.kept)
    for make in (
        lambda data: data.batch(0, 2),
        lambda data: next(data.eval_batches(2))[0],
        lambda data: next(data.prompt_batches(2))[0],
    ):
        before, after = make(plain), make(mapped)
        assert after.tokens.max() < mapped.specials.vocab_size == len(kept)
        np.testing.assert_array_equal(kept[after.tokens], before.tokens)
        np.testing.assert_array_equal(after.loss_weights, before.loss_weights)
    assert mapped.specials.mask_id == 4
    records = next(mapped.prompt_batches(2))[1]
    assert [mapped.vocabulary.decode(record.targets) for record in records] == ["sat on", "the cat"]
    assert records[0].targets_text == "sat on"


def test_special_tokens_move_to_the_front_wherever_they_stood(write, train_vocabulary):
    model = train_vocabulary(symbols=("\n", "<extra_id_0>", "<mask>"))
    source = write("train", [("the cat", "sat on")], task="late", model=model)
    assert model.specials.mask_id == 6
    data = pipeline(source, UsedTokens((source,)))
    assert data.specials == dataclasses.replace(model.specials, vocab_size=len(data.pruned.kept), mask_id=4)
    assert data.pruned.kept[4] == 6


def test_a_token_outside_becomes_unk_and_is_counted(train, write):
    held_out = write("validation", [("the cat", "{x}: the mat")])
    data = pipeline(held_out, UsedTokens((train,)))
    batch = next(data.eval_batches(1))[0]
    used = {int(token) for record in train.records() for token in (*record.inputs, *record.targets)}
    cut = [int(token) not in used for token in held_out.records()[0].targets]
    assert 0 < sum(cut) < len(cut)
    assert (batch.tokens == data.pruned.unk_id).sum() == sum(cut)
    total = sum(len(part) for part in (held_out.records()[0].inputs, held_out.records()[0].targets))
    assert data.unknown == ((sum(cut), total),)
    size = train.vocabulary.size
    assert data.vocabulary_note == (
        f"vocabulary: {data.pruned.size} of {size} tokens kept; UNK for {sum(cut)} of {total} tokens of echo/validation"
    )
    assert pipeline(train, UsedTokens((train,))).unknown[0][0] == 0
    assert pipeline(held_out, UsedTokens((train, held_out))).unknown[0][0] == 0, "every named split counts"
    assert DataPipeline((held_out,), CONVERTER).unknown == ((0, total),)


def test_texts_of_the_pruned_vocabulary(train):
    pruned = pipeline(train, UsedTokens((train,))).vocabulary
    assert isinstance(pruned, PrunedVocabulary)
    assert pruned.decode(pruned.encode("the cat sat")) == "the cat sat"
    assert pruned.unk_id in pruned.encode("the {cat}")
    words = pruned.encode("the cat")
    specials = pruned.specials
    assert (
        pruned.decode([specials.bos_id, *words, specials.mask_id, pruned.size + 3, specials.eos_id, *words])
        == "the cat"
    )
    assert pruned.decode_all([words, []]) == ["the cat", ""]
    assert [pruned.piece(token) for token in (words[0], specials.pad_id, pruned.size)] == [
        pruned.full.piece(pruned.kept[words[0]]),
        "",
        "",
    ]
    assert pruned.sentinel_ids == (5,)
    assert len(pruned) == pruned.size
    assert pruned.sha256 != pruned.full.sha256


def test_a_size_is_filled_up_with_the_next_tokens(train):
    used = pipeline(train, UsedTokens((train,))).pruned.kept
    rule = UsedTokens((train,), size=len(used) + 3)
    kept = pipeline(train, rule).pruned.kept
    assert len(kept) == len(used) + 3
    assert set(used) < set(kept)
    added = sorted(set(kept) - set(used))
    assert added == [token for token in range(train.vocabulary.size) if token not in used][:3]
    assert list(kept[6:]) == sorted(kept[6:])
    message = f"size={len(used) - 1}: the data use {len(used)} of {train.vocabulary.size} tokens"
    with pytest.raises(ConfigError, match=message):
        _ = pipeline(train, UsedTokens((train,), size=len(used) - 1)).pruned
    with pytest.raises(ConfigError, match="size=100000"):
        _ = pipeline(train, UsedTokens((train,), size=100000)).pruned


def test_tokens_are_counted_once_and_kept_beside_the_records(train):
    counts = train.open().token_counts
    expected = np.zeros(train.vocabulary.size, int)
    for record in train.records():
        for token in (*record.inputs, *record.targets):
            expected[token] += 1
    np.testing.assert_array_equal(counts, expected)
    np.save(train.folder / "token_counts.npy", counts * 2)
    del train.open().__dict__["token_counts"]
    np.testing.assert_array_equal(train.open().token_counts, 2 * expected)


def test_a_stored_map_says_the_same_without_the_data(train, tmp_path):
    data = pipeline(train, UsedTokens((train,)))
    data.pruned.save(tmp_path / "run")
    again = pipeline(train, StoredMap(str(tmp_path / "run")))
    assert again.pruned == data.pruned
    assert read_map(tmp_path / "run" / "checkpoints" / "4")["kept"] == list(data.pruned.kept)
    (tmp_path / "inner/run").mkdir(parents=True)
    (tmp_path / "inner" / FILE).write_text("{}")
    (tmp_path / "inner/run/run_card.json").write_text("{}")
    assert read_map(tmp_path / "inner/run") is None, "a run without a map has none, whatever lies above it"
    with pytest.raises(ConfigError, match=f"has no {FILE}"):
        _ = pipeline(train, StoredMap(str(tmp_path / "nothing"))).pruned


def test_another_vocabulary_is_refused(train, write, train_vocabulary, tmp_path):
    other = write("train", [("the cat", "sat")], task="other", model=train_vocabulary(symbols=("<mask>",), size=290))
    with pytest.raises(ConfigError, match="'other' was materialised with another vocabulary"):
        _ = pipeline(train, UsedTokens((other,))).pruned
    pipeline(other, UsedTokens((other,))).pruned.save(tmp_path / "run")
    with pytest.raises(ConfigError, match="was made from another vocabulary"):
        _ = pipeline(train, StoredMap(str(tmp_path / "run"))).pruned
    with pytest.raises(ConfigError, match="missing ids"):
        PrunedVocabulary(train.vocabulary, (0, 1, 2))


def test_pretraining_splits_speak_the_new_ids(write):
    text = write("train", [("", "the cat sat on the mat"), ("", "the mat sat on")], task="text")
    plain = DataPipeline((text,), CONVERTER, pretraining=PrefixSplit())
    mapped = dataclasses.replace(plain, vocabulary_map=UsedTokens((text,)))
    before, after = plain.batch(3, 2), mapped.batch(3, 2)
    np.testing.assert_array_equal(np.asarray(mapped.pruned.kept)[after.tokens], before.tokens)
    np.testing.assert_array_equal(after.target_mask, before.target_mask)
