"""From SeqIO tasks to batches and back to text."""

import importlib
import shutil

import numpy as np
import pytest
import tokenizer_folders as folders

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import example_number
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.converters import SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource, OpenSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.materialise import code_digest, is_stale, materialise
from diffusion_lm.data.pretraining import PrefixSplit
from diffusion_lm.data.schema import Manifest
from diffusion_lm.data.vocabulary import Vocabulary, VocabularyNotNamed

pytestmark = pytest.mark.tensorflow
seqio = pytest.importorskip("seqio")
from diffusion_lm.data.seqio_source import _examples, task_vocabulary  # noqa: E402
from diffusion_lm.data.seqio_vocabulary import LazyVocabulary  # noqa: E402

PAIRS = [(f"the cat {i}", f"def f(x):\n    return {i}") for i in range(12)]


def agreement(targets, predictions):
    """A metric with an import path."""
    return {"agreement": float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def add_task(name, vocabulary, *, inputs=True, metric=agreement, append_eos=True):
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        del shuffle_files, seed
        pairs = PAIRS if split == "train" else PAIRS[:3]
        columns = {"targets": [target for _, target in pairs]}
        if inputs:
            columns["inputs"] = [source for source, _ in pairs]
        return tf.data.Dataset.from_tensor_slices(columns)

    def reference(output, example=None, is_target=False):
        return {"answers": [example["targets_pretokenized"]], "number": np.int64(3)} if is_target else output

    names = ("inputs", "targets") if inputs else ("targets",)
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=["train", "validation"]),
        preprocessors=[seqio.preprocessors.tokenize, *([seqio.preprocessors.append_eos] if append_eos else [])],
        output_features={n: seqio.Feature(vocabulary, add_eos=append_eos) for n in names},
        postprocess_fn=reference,
        metric_fns=[metric],
    )


@pytest.fixture
def vocabulary(train_vocabulary, tmp_path):
    train_vocabulary()
    return seqio.SentencePieceVocabulary(str(tmp_path / "tiny.model"), extra_ids=4)


@pytest.mark.parametrize("append_eos", [True, False])
def test_task_survives_materialisation(vocabulary, tmp_path, append_eos):
    add_task("pairs_task", vocabulary, append_eos=append_eos)
    manifest = materialise("pairs_task", "train", tmp_path, modules=(), records_per_shard=5)
    source = GrainSource("pairs_task", root=tmp_path)
    assert manifest == source.manifest
    assert manifest.count == 12
    assert [metric.split(":")[1] for metric in manifest.metrics] == ["agreement"]
    assert len(source.vocabulary.sentinel_ids) == 4
    assert source.vocabulary.sentinel_ids[0] == source.vocabulary.size - 1
    for index, (record, (inputs, targets)) in enumerate(zip(source.records(), PAIRS, strict=True)):
        assert (record.inputs_text, record.targets_text) == (inputs, targets)
        assert source.vocabulary.decode(record.targets) == targets
        assert source.vocabulary.encode(targets) == record.targets.tolist()
        assert record.example_id == example_number(f"pairs_task/train/{index}")
        assert record.reference == {"answers": [targets], "number": 3}
    pipeline = DataPipeline((source,), SingleStreamConverter(32, 64))
    batch = pipeline.batch(0, 12)
    texts = {pipeline.vocabulary.decode(row[mask]) for row, mask in zip(batch.tokens, batch.target_mask, strict=True)}
    assert texts == {target for _, target in PAIRS}


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.llama_folder, folders.json_folder])
def test_the_tokenizer_of_a_folder_travels_with_the_data(make, tmp_path):
    """Training reads the same vocabulary from the data alone; the folder that it came from is gone by then."""
    expected = Vocabulary.load(make(tmp_path / "model"))
    add_task("pairs_task", LazyVocabulary(lambda: expected), append_eos=False)
    manifest = materialise("pairs_task", "train", tmp_path / "data", modules=())
    shutil.rmtree(tmp_path / "model")
    source = GrainSource("pairs_task", root=tmp_path / "data")
    assert source.vocabulary == expected
    assert manifest.vocabulary_sha256 == expected.sha256
    assert manifest.specials == expected.specials
    for record, (inputs, targets) in zip(source.records(), PAIRS, strict=True):
        assert record.inputs.tolist() == source.vocabulary.encode(inputs)
        assert source.vocabulary.decode(record.targets) == targets
    pipeline = DataPipeline((source,), SingleStreamConverter(48, 64))
    batch = pipeline.batch(0, 12)
    texts = {pipeline.vocabulary.decode(row[mask]) for row, mask in zip(batch.tokens, batch.target_mask, strict=True)}
    assert texts == {target for _, target in PAIRS}
    (source.folder / manifest.vocabulary).write_bytes(b"")
    with pytest.raises(ConfigError, match="is not the one that its manifest names"):
        _ = OpenSource(source.folder).vocabulary


def test_seqio_sees_the_same_vocabulary(tmp_path):
    import tensorflow as tf

    expected = Vocabulary.load(folders.gpt2_folder(tmp_path / "model"))
    vocabulary = LazyVocabulary(lambda: expected)
    specials = expected.specials
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (330, 0, 0)
    assert (specials.pad_id, specials.eos_id, specials.bos_id) == (330, 0, 0)
    assert vocabulary.vocab_size == expected.size == 332
    assert vocabulary.unk_id is None
    for text in folders.TEXTS:
        tokens = vocabulary.encode_tf(tf.constant(text))
        assert tokens.dtype == tf.int32
        assert tokens.numpy().tolist() == vocabulary.encode(text) == expected.encode(text)
        assert vocabulary.decode(vocabulary.encode(text)) == text
    rows = tf.constant([[300, 301, specials.eos_id, 302], [303, 304, 305, specials.pad_id]])
    texts = [text.decode() for text in vocabulary.decode_tf(rows).numpy()]
    assert texts == [expected.decode([300, 301]), expected.decode([303, 304, 305])]
    assert vocabulary.decode_tf(rows[0]).numpy().decode() == texts[0]
    mapped = tf.data.Dataset.from_tensors(b"the \xff cat").map(vocabulary.encode_tf)
    assert mapped.element_spec == tf.TensorSpec([None], tf.int32)
    assert next(mapped.as_numpy_iterator()).tolist() == expected.encode("the \ufffd cat")


def test_features_must_share_one_vocabulary(tmp_path, vocabulary):
    expected = Vocabulary.load(folders.gpt2_folder(tmp_path / "model"))
    first, second = LazyVocabulary(lambda: expected), LazyVocabulary(lambda: expected)
    add_task("pairs_task", first, append_eos=False)
    task = seqio.TaskRegistry.get("pairs_task")
    assert task_vocabulary(task) == expected
    for other in (second, vocabulary, seqio.ByteVocabulary()):
        task.output_features["inputs"] = seqio.Feature(other, add_eos=False)
        with pytest.raises(ConfigError, match="must use one vocabulary"):
            task_vocabulary(task)
    seqio.TaskRegistry.remove("pairs_task")


def test_a_second_time_does_nothing_and_other_options_are_refused(vocabulary, tmp_path):
    add_task("pairs_task", vocabulary)
    first = materialise("pairs_task", "validation", tmp_path, modules=(), limit=2)
    assert first.count == 2
    assert materialise("pairs_task", "validation", tmp_path, modules=(), limit=2) == first
    seqio.TaskRegistry.remove("pairs_task")
    assert materialise("pairs_task", "validation", tmp_path, modules=(), limit=2) == first
    with pytest.raises(ConfigError, match="written with limit=2, but limit=None was requested"):
        materialise("pairs_task", "validation", tmp_path, modules=())


def test_a_finished_split_with_another_vocabulary_is_an_error_and_stays_as_it_is(tmp_path):
    first = Vocabulary.load(folders.gpt2_folder(tmp_path / "first"))
    second = Vocabulary.load(tmp_path / "first", mask=300)
    add_task("pairs_task", LazyVocabulary(lambda: first), append_eos=False)
    materialise("pairs_task", "train", tmp_path / "data", modules=())
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    add_task("pairs_task", LazyVocabulary(lambda: second), append_eos=False)
    with pytest.raises(ConfigError, match="written with another vocabulary than task 'pairs_task' uses now") as caught:
        materialise("pairs_task", "train", tmp_path / "data", modules=())
    assert str(tmp_path / "data" / "pairs_task" / "train") in str(caught.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert materialise("pairs_task", "train", tmp_path / "elsewhere", modules=()).vocabulary_sha256 == second.sha256


def test_a_finished_split_is_kept_if_nothing_names_a_vocabulary(tmp_path):
    """A machine with the materialised data needs neither the raw data nor the tokenizer."""
    first = Vocabulary.load(folders.gpt2_folder(tmp_path / "first"))
    add_task("pairs_task", LazyVocabulary(lambda: first), append_eos=False)
    written = materialise("pairs_task", "train", tmp_path / "data", modules=())

    def unknown():
        raise VocabularyNotNamed("the tasks on real data need a vocabulary")

    def broken():
        raise ConfigError("no vocabulary at nowhere")

    add_task("pairs_task", LazyVocabulary(unknown), append_eos=False)
    assert materialise("pairs_task", "train", tmp_path / "data", modules=()) == written
    add_task("pairs_task", LazyVocabulary(broken), append_eos=False)
    with pytest.raises(ConfigError, match="no vocabulary at nowhere"):
        materialise("pairs_task", "train", tmp_path / "data", modules=())


def test_documents_are_cut_into_pieces_that_restore_them(vocabulary, tmp_path):
    add_task("text_task", vocabulary, inputs=False)
    source = GrainSource("text_task", root=tmp_path, chunk_length=7)
    manifest = source.materialise(modules=())
    assert not manifest.has_inputs
    assert manifest.max_targets_length == 7
    tokens = np.concatenate([record.targets for record in source.records()])
    documents = [source.vocabulary.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == 1) + 1)[:-1]]
    assert documents == [target for _, target in PAIRS]
    assert (tokens == 1).sum() == 12
    batch = DataPipeline((source,), SingleStreamConverter(3, 4), pretraining=PrefixSplit()).batch(0, 8)
    assert batch.tokens.shape == (8, 8)


def test_unknown_names_are_one_sentence(vocabulary, tmp_path):
    add_task("pairs_task", vocabulary)
    with pytest.raises(ConfigError, match="did you mean pairs_task"):
        materialise("pair_task", "train", tmp_path, modules=())
    with pytest.raises(ConfigError, match="no split 'valid'; did you mean validation"):
        materialise("pairs_task", "valid", tmp_path, modules=())
    with pytest.raises(ConfigError, match="cannot import 'no_such_tasks'"):
        materialise("pairs_task", "train", tmp_path, modules=("no_such_tasks",))
    with pytest.raises(ConfigError, match="which has inputs"):
        materialise("pairs_task", "train", tmp_path, modules=(), chunk_length=5)


def test_metric_without_a_name_is_an_error(vocabulary, tmp_path):
    add_task("pairs_task", vocabulary, metric=lambda targets, predictions: {})
    with pytest.raises(ConfigError, match="cannot be imported by name"):
        materialise("pairs_task", "train", tmp_path, modules=())


def test_data_know_when_the_code_of_their_task_has_changed(tmp_path, monkeypatch):
    """Only the text of the modules is looked at, of packages all files, and nothing is imported."""
    package = tmp_path / "stale_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("raise RuntimeError('imported')")
    (package / "parts.py").write_text("x = 1")
    (tmp_path / "stale_alone.py").write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = ("stale_tasks.mine", "stale_alone")
    specials = SpecialTokens(vocab_size=8, pad_id=0, eos_id=1, bos_id=2, mask_id=4)
    manifest = Manifest("t", "train", specials, modules=modules, code_sha256=code_digest(modules))
    assert not is_stale(manifest)
    assert not is_stale(Manifest("t", "train", specials)), "data of before know nothing of their code"
    (package / "parts.py").write_text("x = 2")
    assert is_stale(manifest)
    (tmp_path / "stale_alone.py").unlink()
    importlib.invalidate_caches()
    assert not is_stale(manifest), "a machine that only trains need not have the tasks"


@pytest.mark.parametrize("rank", [1, 2, None])
def test_examples_are_those_of_tensorflows_own_iterator(rank):
    """Scalars, texts, lists of texts, empty and ragged rows; what cannot be batched comes one by one."""
    import tensorflow as tf

    def examples():
        for number in range(7):
            rows = np.arange(number * (number % 3), dtype=np.int32)
            extra = rows if rank == 1 else rows.reshape(-1, number % 3 or 1)
            yield {"text": f"é {number}", "number": number, "words": [b"a"] * (number % 2), "extra": extra}

    shape = None if rank is None else [None] * rank
    signature = {
        "text": tf.TensorSpec([], tf.string),
        "number": tf.TensorSpec([], tf.int64),
        "words": tf.TensorSpec([None], tf.string),
        "extra": tf.TensorSpec(shape, tf.int32),
    }
    dataset = tf.data.Dataset.from_generator(examples, output_signature=signature)
    expected = list(dataset.as_numpy_iterator())
    found = list(_examples(dataset))
    assert len(found) == len(expected) == 7
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert type(ours[name]) is type(value)
            np.testing.assert_array_equal(ours[name], value)
            assert np.asarray(ours[name]).dtype == np.asarray(value).dtype


@pytest.fixture
def lossy_vocabulary(tmp_path):
    """T5's normalisation, no bytes: newlines become spaces, and what is not in these words UNK."""
    import sentencepiece

    sentences = tmp_path / "sentences.txt"
    sentences.write_text("the cat 0 1 2 3 4 5 6 7 8 9 def f(x): return\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences), model_prefix=str(tmp_path / "lossy"), vocab_size=60, hard_vocab_limit=False,
        model_type="char", normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, bos_id=-1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    return seqio.SentencePieceVocabulary(str(tmp_path / "lossy.model"))


def test_targets_that_the_vocabulary_cannot_write_are_refused_unless_allowed(lossy_vocabulary, tmp_path):
    add_task("lossy_task", lossy_vocabulary)
    with pytest.raises(ConfigError, match=r"12 of 12 targets of lossy_task/train whole: newline 12; first"):
        materialise("lossy_task", "train", tmp_path, modules=())
    assert not (tmp_path / "lossy_task/train").exists()
    with pytest.raises(ConfigError, match=r"max_lossy = 2 \(GrainSource.max_lossy\)"):
        materialise("lossy_task", "train", tmp_path, modules=(), max_lossy=2)
    source = GrainSource("lossy_task", "train", str(tmp_path), max_lossy=1.0)
    assert source == GrainSource("lossy_task", "train", str(tmp_path)), "how data were made is no part of what they are"
    assert source.command.endswith("--max_lossy 1")
    manifest = source.materialise(modules=())
    assert manifest.unwritten["targets"]["count"] == 12
    assert manifest.unwritten["targets"]["characters"] == {"\n": 12}
    assert list(manifest.unwritten) == ["targets"]
    assert Manifest.from_json(manifest.to_json()).unwritten == manifest.unwritten
    pipeline = DataPipeline((source,), SingleStreamConverter(30, 30))
    assert pipeline.vocabulary_note == (
        "lossy_task/train: the vocabulary cannot write 12 of 12 targets whole: newline 12; "
        "first in example 0: 'def f(x):\\n    return 0'"
    )


def test_lossy_documents_are_refused_and_lossless_data_say_nothing(lossy_vocabulary, vocabulary, tmp_path):
    add_task("lossy_documents", lossy_vocabulary, inputs=False, append_eos=False)
    add_task("whole_documents", vocabulary, inputs=False, append_eos=False)
    with pytest.raises(ConfigError, match="targets of lossy_documents/train"):
        materialise("lossy_documents", "train", tmp_path, modules=(), chunk_length=4)
    manifest = materialise("whole_documents", "train", tmp_path, modules=(), chunk_length=4)
    assert (manifest.unwritten, manifest.empty_targets) == ({}, 0)
