"""The tasks of Diffusion-LLM on a few rows: local files in the public formats, stand-ins for TFDS sets."""

import json

import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("seqio")

import seqio
import tensorflow_datasets as tfds

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm_tasks import instruction, summarization, tfds_sources, translation, vocabularies

pytestmark = pytest.mark.tensorflow


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Returns `write(name, text or rows)` into a local data folder; the vocabulary is the embedded one."""
    monkeypatch.setenv("DIFFUSION_LM_DATA", str(tmp_path))
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", vocabularies.embedded_model())
    # What is cached in the process stays for the other tests.
    for module in (translation, summarization, instruction):
        monkeypatch.setitem(module.VOCABULARY.__dict__, "vocabulary", Vocabulary.load(vocabularies.embedded_model()))

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8")

    return write


def read(name, split):
    task = seqio.TaskRegistry.get(name)
    rows = list(task.get_dataset(sequence_length=None, split=split, shuffle=False).as_numpy_iterator())
    inputs, targets = ([row[f"{part}_pretokenized"].decode() for row in rows] for part in ("inputs", "targets"))
    references = [task.postprocess_fn(t, example=r, is_target=True) for t, r in zip(targets, rows, strict=True)]
    scores = task.metric_fns[0](references, targets) if task.metric_fns else None
    return inputs, targets, references, scores


def test_iwslt14_reads_parallel_lines(data):
    data("translation/iwslt14.de-en/valid.de", "Guten Morgen.\nDas Haus.\n")
    data("translation/iwslt14.de-en/valid.en", "Good morning.\nThe house.\n")
    inputs, targets, references, scores = read("iwslt14_de_en", "validation")
    assert inputs == ["translate German to English: Guten Morgen.", "translate German to English: Das Haus."]
    assert targets == references == ["Good morning.", "The house."]
    assert scores["length_ratio"] == 100
    data("translation/iwslt14.de-en/test.de", "eins\nzwei\n")
    data("translation/iwslt14.de-en/test.en", "one\n")
    with pytest.raises(ConfigError, match="one ends before line 2"):
        list(translation.read_iwslt14("test"))


def test_the_two_translations_are_scored_by_the_papers_tokenisations():
    names = {name: seqio.TaskRegistry.get(name).metric_fns[0].__name__ for name in ("iwslt14_de_en", "wmt14_en_de")}
    assert names == {"iwslt14_de_en": "bleu", "wmt14_en_de": "bleu_intl"}


@pytest.mark.parametrize(("name", "split", "start"), [
    ("wmt14_en_de", "test", "translate English to German: "),
    ("gigaword", "validation", "summarize: "),
    ("gigaword_10k", "train", "summarize: "),
])  # fmt: skip
@pytest.mark.usefixtures("data")
def test_tfds_tasks_on_mock_data(name, split, start, monkeypatch):
    monkeypatch.setattr(seqio.LazyTfdsLoader, "size", lambda self, dataset_split: 4)
    with tfds.testing.mock_data(num_examples=4):
        inputs, targets, references, _ = read(name, split)
    assert 0 < len(inputs) <= 4
    assert all(text.startswith(start) for text in inputs)
    assert targets == references


def test_the_subset_depends_on_the_examples_and_not_on_their_order():
    examples = [{"document": f"d{number}", "summary": f"s{number}"} for number in range(200)]
    chosen = summarization.subset(iter(examples), 20)
    assert len(chosen) == 20
    assert summarization.subset(iter(examples[::-1] + examples[:50]), 20) == chosen, "neither on repetitions"
    assert chosen != examples[:20]
    more = summarization.subset(iter(examples), 21)
    assert more[:20] == chosen


def test_flan_is_split_by_its_inputs(data, monkeypatch):
    rows = [{"inputs": f"question {number}", "targets": f"answer {number}"} for number in range(3000)]
    data("flan/flan_2022_cot_zsopt.jsonl", rows)
    reader = instruction.read_flan("flan_2022_cot_zsopt")
    train, held_out = (list(reader(split)) for split in ("train", "validation"))
    assert 0 < len(held_out) < 12
    assert len(train) > 2980
    assert not {row["inputs"] for row in train} & {row["inputs"] for row in held_out}
    assert read("flan_2022_cot_zsopt", "validation")[1] == [row["targets"] for row in held_out]
    assert len(instruction.FLAN_2022) == 13
    data("flan/flan_2021.jsonl", [{"inputs": "no targets"}])
    with pytest.raises(ConfigError, match=r"flan_2021.jsonl, example 1: 'inputs' and 'targets'"):
        list(instruction.read_flan("flan_2021")("train"))


def mmlu_row(question, answer, subject="law"):
    return {"question": question, "choices": ["w", "x", "y", "z"], "answer": answer, "subject": subject}


def test_mmlu_asks_with_shots_of_the_same_subject(data):
    dev = [mmlu_row("D1", 0), mmlu_row("M1", 1, "math"), mmlu_row("D2", 2), mmlu_row("D3", 3)]
    data("instruction/mmlu_dev.jsonl", dev)
    data("instruction/mmlu_test.jsonl", [mmlu_row(" Q? ", 3), mmlu_row("P", 1, "math")])
    options = "\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer:"
    inputs, targets, references, scores = read("mmlu", "test")
    assert inputs == [f"Question: Q?{options}", f"Question: P{options}"]
    assert targets == ["D", "B"]
    assert references[0] == {"choices": ["A", "B", "C", "D"], "answer": 3, "answers": ["D"]}
    assert scores == {"exact_match": 100}
    inputs, _, _, _ = read("mmlu_2shot", "test")
    assert inputs[0] == f"Question: D1{options} A\n\nQuestion: D2{options} C\n\nQuestion: Q?{options}"
    assert inputs[1] == f"Question: M1{options} B\n\nQuestion: P{options}"


def gold(language, number, answers=("in 1889", "1889")):
    answers = {"text": np.array([answer.encode() for answer in answers], object)}
    row = {"id": f"{language}-{number}", "context": f"Passage {number}.", "question": f"When {number}?"}
    return {name: text.encode() for name, text in row.items()} | {"answers": answers}


@pytest.mark.usefixtures("data")
def test_tydiqa_has_shots_of_the_same_language(monkeypatch):
    splits = {
        "train": [gold("finnish", 1), gold("telugu", 2, ["kaksi"]), gold("finnish", 3)],
        "validation": [gold("telugu", 7), gold("finnish", 8), gold("korean", 9), gold("korean", 10, [])],
    }
    monkeypatch.setattr(tfds_sources, "rows", lambda name, split: iter(splits[split]))
    inputs, targets, references, scores = read("tydiqa", "validation")
    assert inputs[0] == "Passage: Passage 7.\nQuestion: When 7?\nAnswer:"
    assert (targets[0], references[0]) == ("in 1889", {"answers": ["in 1889", "1889"]})
    assert (len(inputs), targets[3], references[3]) == (4, "", {"answers": []}), "an unanswerable question is counted"
    assert (scores["f1"], scores["em"], scores["unanswerable"]) == (100, 100, 1)
    inputs, _, _, _ = read("tydiqa_1shot", "validation")
    assert (
        inputs[0]
        == "Passage: Passage 2.\nQuestion: When 2?\nAnswer: kaksi\n\nPassage: Passage 7.\nQuestion: When 7?\nAnswer:"
    )
    assert inputs[1].startswith("Passage: Passage 1.\n")
    assert inputs[2] == "Passage: Passage 9.\nQuestion: When 9?\nAnswer:", "no training example of that language"


def test_word_problems_are_scored_by_their_last_number(data, monkeypatch):
    data("instruction/mgsm_de.tsv", "Wie viele? \t18\nUnd nun?\t1,000.0\n")
    inputs, targets, references, scores = read("mgsm_de", "test")
    assert inputs == ["Question: Wie viele?\nAnswer:", "Question: Und nun?\nAnswer:"]
    assert targets == references == ["18", "1000"]
    assert scores == {"accuracy": 100}
    rows = [{"question": f"q{n}".encode(), "answer": f"{n} and 1\n#### {n + 1}".encode()} for n in range(5)]
    monkeypatch.setattr(tfds_sources, "rows", lambda name, split: iter(rows))
    inputs, targets, references, _ = read("gsm8k_3shot", "test")
    assert inputs[4].startswith("Question: q0\nAnswer: 0 and 1\n#### 1\n\nQuestion: q1\n")
    assert inputs[4].endswith("#### 3\n\nQuestion: q4\nAnswer:")
    assert (targets[4], references[4]) == ("4 and 1\n#### 5", "5")
    assert read("gsm8k", "test")[0][4] == "Question: q4\nAnswer:"
