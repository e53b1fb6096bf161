"""The registered SeqIO tasks: embedded, local and TFDS (mocked); no network."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("seqio")

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
import tokenizer_folders as folders

from diffusion_lm.cli.main import main
from diffusion_lm.cli.materialise import ensure
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm_tasks import (
    code_synthesis,
    commonsense,
    embedded,
    embedded_qa,
    extractive_qa,
    instruction,
    pretraining,
    reasoning,
    tfds_builders,
    translation,
    vocabularies,
)

pytestmark = pytest.mark.tensorflow

EMBEDDED = ("embedded_translation", "embedded_qa", "embedded_code")


@pytest.fixture(scope="session", autouse=True)
def cached_vocabulary(tmp_path_factory):
    """One folder for the session; a vocabulary that the user has already is used as it is."""
    if "DIFFUSION_LM_CACHE" not in os.environ and not vocabularies.cache_folder().is_dir():
        os.environ["DIFFUSION_LM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
        yield
        del os.environ["DIFFUSION_LM_CACHE"]
    else:
        yield


@pytest.fixture
def mixed(data_folder, monkeypatch):
    """Local data, and the embedded vocabulary in place of the large one."""
    monkeypatch.setenv("DIFFUSION_LM_DATA", str(data_folder))
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", vocabularies.embedded_model())
    for module in (translation, extractive_qa, code_synthesis, pretraining):
        monkeypatch.delitem(vars(module.VOCABULARY), "vocabulary", raising=False)  # as it is before its first use


def read(name, split, limit=None):
    task = seqio.TaskRegistry.get(name)
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    rows = list(dataset.take(-1 if limit is None else limit).as_numpy_iterator())
    texts = [row["targets_pretokenized"].decode() for row in rows]
    references = [task.postprocess_fn(t, example=r, is_target=True) for t, r in zip(texts, rows, strict=True)]
    return task, rows, texts, references


@pytest.mark.thorough
def test_importing_the_tasks_reads_and_trains_nothing(tmp_path):
    program = (
        "import diffusion_lm_tasks.embedded as e, diffusion_lm_tasks.translation, diffusion_lm_tasks.code_synthesis,"
        "diffusion_lm_tasks.extractive_qa, diffusion_lm_tasks.pretraining, sys, os\n"
        "from diffusion_lm_tasks import embedded_qa, vocabularies\n"
        "assert not embedded_qa.examples.cache_info().currsize\n"
        "assert not vocabularies.embedded_model.cache_info().currsize\n"
        f"assert not os.path.exists({str(tmp_path / 'cache')!r})\n"
    )
    environment = {**os.environ, "DIFFUSION_LM_CACHE": str(tmp_path / "cache")}
    environment.pop("DIFFUSION_LM_DATA", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_generators_need_no_tensorflow():
    program = (
        "import sys\nimport diffusion_lm_tasks.embedded_pretraining as p\np.documents('test')\n"
        "assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_tokenise_without_loss_and_without_eos(name):
    task, rows, texts, references = read(name, "test")
    vocabulary = embedded.VOCABULARY.vocabulary
    for row, text in zip(rows, texts, strict=True):
        for feature in ("inputs", "targets"):
            assert row[feature].dtype == np.int32
            assert row[feature].min() > 5  # no pad, eos, bos, unk, mask, sep
            assert vocabulary.decode(row[feature]) == row[f"{feature}_pretokenized"].decode()
        assert vocabulary.encode(text) == row["targets"].tolist()
    json.dumps(references)
    (metric,) = task.metric_fns
    scores = metric(references, texts)
    assert max(scores.values()) == pytest.approx(100)
    assert min(metric(references, ["nonsense"] * len(texts)).values()) <= 1


def test_embedded_sequences_are_short():
    limits = {"embedded_translation": (64, 48), "embedded_qa": (96, 32), "embedded_code": (48, 40)}
    for name, (inputs, targets) in limits.items():
        _, rows, _, _ = read(name, "test")
        assert max(len(row["inputs"]) for row in rows) <= inputs
        assert max(len(row["targets"]) for row in rows) <= targets


def test_pretraining_has_documents_only():
    task, rows, texts, _ = read("embedded_pretraining", "test")
    assert set(task.output_features) == {"targets"}
    assert len(rows) > 50
    for row, text in zip(rows, texts, strict=True):
        assert embedded.VOCABULARY.vocabulary.decode(row["targets"]) == text
    assert any("\n    " in text for text in texts)


def test_T35_no_text_becomes_a_special_token_of_the_embedded_vocabulary():
    vocabulary = embedded.VOCABULARY.vocabulary
    assert [vocabulary.piece(i) for i in range(6)] == ["", "</s>", "<s>", "<unk>", "<mask>", "<sep>"]
    assert vocabulary.size == vocabularies.EMBEDDED_SIZE
    assert min(vocabulary.encode("\n")[1:]) > 5
    assert len(vocabulary.sentinel_ids) == vocabularies.SENTINELS
    # T35: text that spells a special token must not become one.
    text = "a <mask> <sep> </s> <extra_id_0>\n\tif x_1 != {'é': 10}:  # ok\n"
    tokens = vocabulary.encode(text)
    assert min(tokens) > 5
    assert not set(vocabulary.sentinel_ids) & set(tokens)
    assert vocabulary.decode(tokens) == text


def test_training_a_vocabulary_is_reproducible(tmp_path):
    texts = [example.inputs for example in embedded_qa.examples()["train"][:400]] + ["if x:\n    return y"] * 5
    for name in ("a", "b"):
        vocabularies.train_vocabulary(texts, tmp_path / name / "m.model", 500)
    assert (tmp_path / "a/m.model").read_bytes() == (tmp_path / "b/m.model").read_bytes()
    assert sorted(os.listdir(tmp_path / "a")) == ["m.model"]


@pytest.mark.usefixtures("mixed")
def test_local_mbpp_has_unix_lines_and_runnable_tests():
    task, rows, texts, references = read("local_mbpp", "train")
    assert len(rows) == 2
    assert texts[0] == "def f(x):\n\treturn x + 1"
    assert references[0]["tests"] == ["assert f(1) == 2", "assert f(0) == 1"]
    assert rows[0]["inputs_pretokenized"].decode() == (
        "You are an expert Python programmer, and here is your task: Write a function to add one. Your code should "
        "pass these tests:\n\nassert f(1) == 2\nassert f(0) == 1\n[BEGIN]\n"
    )
    assert task.metric_fns[0](references, texts)["pass_at_1"] == 100
    assert [len(read("local_mbpp", split)[1]) for split in ("validation", "test")] == [1, 2]


@pytest.mark.usefixtures("mixed")
def test_local_squad_keeps_the_answer_inside_the_window():
    for split in ("train", "validation"):
        _, rows, texts, references = read("local_squad", split)
        question, context = rows[0]["inputs_pretokenized"].decode().split(" context: ")
        assert question == "question: When was the tower finished?"
        assert len(context) <= extractive_qa.CONTEXT_CHARACTERS
        assert "1889" in context  # at evaluation found by the question's words, not by the answer
        assert (texts, references) == (["1889"], [{"answers": ["1889"]}])


def _replace(data_folder, tmp_path, monkeypatch, name, rows):
    """Makes `tmp_path` the data folder, with one file of its own."""
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("DIFFUSION_LM_DATA", str(tmp_path))


@pytest.mark.usefixtures("mixed")
def test_local_squad_keeps_unanswerable_questions_and_reads_every_form_of_answers(data_folder, tmp_path, monkeypatch):
    qas = [
        {"question": "When?", "answers": ["noon", "at noon"], "answer_starts": [20, 17]},
        {"question": "Who?", "answers": [], "answer_starts": [], "is_impossible": True},
        {"question": "When?", "answers": {"text": ["noon"], "answer_start": [20]}},
        {"question": "When?", "answers": [{"text": "noon", "answer_start": 20}]},
        {"question": "When?", "answers": "noon", "answer_starts": [20]},
    ]
    rows = [{"context": "The train leaves at noon.", "qas": qas}]
    _replace(data_folder, tmp_path, monkeypatch, "squad/squad_v1.1_dev.jsonl", rows)
    (tmp_path / "squad/squad_v1.1_train.jsonl").write_text(json.dumps(rows[0]))
    for split in ("train", "validation"):
        task, _, texts, references = read("local_squad", split)
        assert texts == ["noon", "", "noon", "noon", "noon"]
        assert [len(reference["answers"]) for reference in references] == [2, 0, 1, 1, 1]
    assert task.metric_fns[0](references, texts)["unanswerable"] == 1
    qas[0]["answers"] = [3]
    (tmp_path / "squad/squad_v1.1_train.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(
        ConfigError, match=r"question 'When\?' of the local SQuAD files has reference \[3\]: not a list of answers"
    ):
        list(extractive_qa.read_local("train"))


@pytest.mark.usefixtures("mixed")
def test_tests_of_local_mbpp_are_a_list_of_tests(data_folder, tmp_path, monkeypatch):
    row = {"task_id": 601, "text": "Add.", "code": "x = 1", "test_setup_code": "", "test_list": "assert x == 1"}
    _replace(data_folder, tmp_path, monkeypatch, "code_eval/mbpp.jsonl", [row])
    (example,) = code_synthesis.read_local_mbpp("train")
    assert json.loads(example["reference"])["tests"] == ["assert x == 1"]
    for wrong in ([], [""], [1], None):
        (tmp_path / "code_eval/mbpp.jsonl").write_text(json.dumps(row | {"test_list": wrong}))
        with pytest.raises(ConfigError, match=r"code_eval/mbpp\.jsonl, task_id 601: test_list="):
            list(code_synthesis.read_local_mbpp("train"))


@pytest.mark.usefixtures("mixed")
def test_choices_that_are_one_text_are_refused(data_folder, tmp_path, monkeypatch):
    row = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": "abcd", "label": "0"}
    _replace(data_folder, tmp_path, monkeypatch, "evaluation/hellaswag_validation.jsonl", [row])
    with pytest.raises(ConfigError, match="line 1: not a row of hellaswag"):
        list(commonsense.reader("hellaswag", commonsense.hellaswag)("validation"))
    with pytest.raises(ConfigError, match="choices='abcd'"):
        instruction.mmlu_prompt({"question": "q", "choices": "abcd"})


@pytest.mark.usefixtures("mixed")
def test_a_solution_without_an_answer_does_not_vanish(data_folder, tmp_path, monkeypatch):
    row = {"question": "How many?", "answer": "<<1+1=2>> two"}
    _replace(data_folder, tmp_path, monkeypatch, "reasoning/gsm8k_test.jsonl", [row])
    with pytest.raises(ConfigError, match=r"reasoning/gsm8k_test.jsonl: the solution of 'How many\?' has no answer"):
        list(reasoning.read_local_gsm8k("test"))


def test_squad_window_of_one_endless_sentence_still_holds_the_answer():
    context = "x " * 2000 + "answer " + "y " * 2000
    start = context.index("answer")
    found = extractive_qa.window(context, "?", (start, start + 6), limit=300)
    assert "answer" in found
    assert len(found) <= 300
    assert extractive_qa.window("short.", "?", None) == "short."


@pytest.mark.parametrize(
    ("name", "english", "french"),
    [("local_tatoeba_en_fr", "I am ill.", "Je suis malade."), ("local_multi30k_en_fr", "A dog.", "Un chien.")],
)
@pytest.mark.usefixtures("mixed")
def test_local_translation_drops_held_out_sentences_from_training(name, english, french):
    _, rows, texts, _ = read(name, "train")
    assert texts == [french]
    assert rows[0]["inputs_pretokenized"].decode() == f"translate English to French: {english}"
    assert [len(read(name, split)[1]) for split in ("validation", "test")] == [1, 1]


@pytest.mark.usefixtures("mixed")
def test_local_pretraining_splits_are_disjoint():
    train, held_out = (set(read("local_pretraining", split)[2]) for split in ("train", "validation"))
    assert len(train) > 450
    assert held_out
    assert not train & held_out
    functions = read("local_python_functions", "train")
    assert functions[2][0].startswith("def f")
    assert "\r" not in "".join(functions[2])


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder, folders.llama_folder])
@pytest.mark.parametrize(
    ("name", "split"),
    [("local_mbpp", "test"), ("local_squad", "train"), ("local_tatoeba_en_fr", "train"), ("local_text", "train")],
)
@pytest.mark.usefixtures("mixed")
def test_tasks_run_with_the_tokenizer_of_a_hugging_face_folder(make, name, split, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", str(make(tmp_path / "model")))
    expected = Vocabulary.load(tmp_path / "model")
    _, rows, texts, _ = read(name, split, limit=5)
    assert rows
    for row, text in zip(rows, texts, strict=True):
        assert row["targets"].dtype == np.int32
        assert row["targets"].tolist() == expected.encode(text)
        assert expected.decode(row["targets"]) == text


@pytest.mark.usefixtures("mixed")
def test_a_mask_token_of_the_environment_is_reused(tmp_path, monkeypatch):
    folders.gpt2_folder(tmp_path / "model")
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", str(tmp_path / "model"))
    for named, mask in (("300", 300), ("Ġthe", "Ġthe")):
        monkeypatch.delitem(vars(translation.VOCABULARY), "vocabulary", raising=False)
        monkeypatch.setenv("DIFFUSION_LM_MASK_TOKEN", named)
        assert translation.VOCABULARY.vocabulary == Vocabulary.load(tmp_path / "model", mask=mask)
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere: no such file or directory"):
        vocabularies.mixed_path()


@pytest.mark.usefixtures("mixed")
def test_data_of_another_vocabulary_than_the_environment_names_are_an_error(tmp_path, monkeypatch, capsys):
    """`materialise` exits with code 2 and touches nothing; `train` starts no run on such data."""
    monkeypatch.chdir(tmp_path)
    command = ["materialise", "--task", "local_text", "--root", "data"]

    def use(vocabulary):
        monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", str(vocabulary))
        monkeypatch.delitem(vars(pretraining.VOCABULARY), "vocabulary", raising=False)  # a process of its own

    use(folders.gpt2_folder(tmp_path / "first"))
    assert main(command) == 0, capsys.readouterr().err
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    use("data/local_text/train/vocabulary.model")
    assert main(command) == 0, capsys.readouterr().err

    use(folders.gpt2_folder(tmp_path / "second", ("<|endoftext|>", "<|other|>")))
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "data/local_text/train was written with another vocabulary than task 'local_text' uses now" in error
    assert "DIFFUSION_LM_VOCABULARY" in error
    assert before == {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}

    # `train` and `compare` leave it to a child process: only a registered task knows which vocabulary it uses.
    source = GrainSource("local_text", root="data")
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", run)
    arguments = argparse.Namespace(gin_file=["run.gin"], gin_search_path=[], module=[], gin=[])
    with pytest.raises(SystemExit, match="2"):
        ensure(source, arguments)
    assert commands[0][3:] == ["materialise", "--gin_file", "run.gin"]
    for vocabulary in ("data/local_text/train/vocabulary.model", ""):  # the same one; none is named
        use(vocabulary)
        ensure(source, arguments)
    assert len(commands) == 1


def test_a_vocabulary_in_a_bucket_is_fetched(tmp_path):
    """TensorFlow's file system reads `file://` as it reads `gs://`."""
    folders.gpt2_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("large")
    for path in (tmp_path / "model", folders.llama_folder(tmp_path / "llama") / "tokenizer.model"):
        with vocabularies.fetched(f"file://{path}") as local:
            assert not os.path.exists(os.path.join(local, "model.safetensors"))
            assert Vocabulary.load(local) == Vocabulary.load(path)


def test_a_missing_data_folder_is_one_sentence(monkeypatch):
    monkeypatch.delenv("DIFFUSION_LM_DATA", raising=False)
    monkeypatch.delenv("DIFFUSION_LM_VOCABULARY", raising=False)
    with pytest.raises(ConfigError, match="need a vocabulary"):
        vocabularies.mixed_path()
    with pytest.raises(ConfigError, match="DIFFUSION_LM_DATA"):
        next(iter(code_synthesis.read_local_mbpp("train")))


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wmt14_en_fr", "validation"),
        ("squad_v1_1", "train"),
        ("squad_v1_1_tuning", "train"),
        ("mbpp", "test"),
        ("c4", "train"),
        ("mc4_fr", "train"),
        ("python_code", "train"),
    ],
)
def test_tfds_tasks_on_mock_data(name, split, monkeypatch):
    # Mock data has no recorded split sizes, which SeqIO asks for in order to decide about in-memory caching.
    monkeypatch.setattr(seqio.LazyTfdsLoader, "size", lambda self, dataset_split: 4)
    with tfds.testing.mock_data(num_examples=4):
        task, rows, _, references = read(name, split)
    assert 0 < len(rows) <= 4
    for row, reference in zip(rows, references, strict=True):
        assert set(task.output_features) <= set(row)
        assert row["targets"].ndim == 1
        if name == "squad_v1_1":
            assert reference["answers"]
        if name == "mbpp":
            assert set(reference) == {"setup", "tests"}
            assert row["inputs_pretokenized"].endswith(b"\n[BEGIN]\n")
        json.dumps(reference)


def test_articles_that_select_checkpoints_are_not_trained_on():
    titles = [f"article {number // 3}" for number in range(6000)]
    whole = tf.data.Dataset.from_tensor_slices({"title": titles})
    kept = {
        held_out: [row["title"].decode() for row in extractive_qa.of_articles(held_out)(whole).as_numpy_iterator()]
        for held_out in (False, True)
    }
    assert sorted(kept[False] + kept[True]) == sorted(titles)
    assert not set(kept[False]) & set(kept[True])
    assert 0.01 < len(kept[True]) / len(titles) < 0.03


def test_mbpp_builder_refuses_another_file(tmp_path):
    file = tmp_path / "mbpp.jsonl"
    file.write_text('{"task_id": 1}\n')

    class Downloads:
        def download(self, url):
            assert url.endswith("mbpp.jsonl")
            return file

    builder = tfds_builders.Mbpp(data_dir=str(tmp_path / "tfds"))
    with pytest.raises(ValueError, match="the published file has changed"):
        builder._split_generators(Downloads())
