"""The evaluation tasks of DiffuGPT and DiffuLLaMA: prompts, gaps and references as in the code of the paper."""

import csv
import gzip
import json

import pytest
import seqio
import tokenizer_folders as folders

from diffusion_lm.cli.main import main
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.evaluation.metrics_code import program_with_tests
from diffusion_lm_tasks import cloze, commonsense, vocabularies

ROWS = {
    "hellaswag": {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "endings": [
            " is using wrap.",
            "is [substeps] ripping  level tiles off.",
            "is holding a cube.",
            "starts [title] x",
        ],
        "label": "3",
    },
    "winogrande": {
        "sentence": "Ian volunteered to eat Dennis's menudo because _ despised eating intestine.",
        "option1": "Ian",
        "option2": "Dennis",
        "answer": "2",
    },
    "siqa": {
        "context": "Tracy didn't go home.",
        "question": "What does Tracy need to do?",
        "answerA": "make a plan",
        "answerB": "Go home",
        "answerC": "Find somewhere to go",
        "label": "3",
    },
    "piqa": {"goal": "How do I boil?", "sol1": "Use water.", "sol2": "Use sand.", "label": 0},
}
STORY = [f"Sentence {number}." for number in range(1, 5)]
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    total = a + b\n\n    return total\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of local data with a few rows of everything, and the embedded vocabulary."""
    monkeypatch.setenv("DIFFUSION_LM_DATA", str(tmp_path))
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", vocabularies.embedded_model())
    for module in (cloze, commonsense):
        monkeypatch.delitem(vars(module.VOCABULARY), "vocabulary", raising=False)  # as it is before its first use
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for name, row in ROWS.items():
        (folder / f"{name}_validation.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "lambada_test_plain_text.txt").write_text("he looked at the  old house\n\nagain and again\n")
    aliases = ["Sinclair Lewis", "Harry Sinclair Lewis", "Lewis"]
    question = {"question": "Who won the prize?", "answer": {"aliases": aliases}}
    (folder / "triviaqa_validation.jsonl").write_text((json.dumps(question) + "\n") * 2003)
    with open(folder / "cloze_test_val__spring2016.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = [f"InputSentence{number}" for number in range(1, 5)]
        quiz = [f"RandomFifthSentenceQuiz{number}" for number in (1, 2)]
        writer.writerow(["InputStoryid", *names, *quiz, "AnswerRightEnding"])
        for answer in ("1", "2"):
            writer.writerow(["id", *STORY, "One, then.", "Two.", answer])
    (tmp_path / "code_eval").mkdir()
    with gzip.open(tmp_path / "code_eval/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n")
    gap = {**PROBLEM, "suffix": "\n    return total\n", "canonical_solution": "    total = a + b"}
    (folder / "HumanEval-SingleLineInfilling.jsonl").write_text(json.dumps(gap) + "\n")
    return tmp_path


def read(name, split):
    task = seqio.TaskRegistry.get(name)
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    rows = list(dataset.as_numpy_iterator())
    parts = ("inputs", "targets", "suffix")
    texts = [tuple(row.get(f"{part}_pretokenized", b"").decode() for part in parts) for row in rows]
    references = [
        task.postprocess_fn(text[1], example=row, is_target=True) for text, row in zip(texts, rows, strict=True)
    ]
    return task, texts, references


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("name", "prompt", "choices", "answer"),
    [
        (
            "hellaswag",
            "Roof shingle removal: A man is sitting on a roof. He",
            ["is using wrap.", "is ripping level tiles off.", "is holding a cube.", "starts. x"],
            3,
        ),
        (
            "winogrande",
            "Ian volunteered to eat Dennis's menudo because ",
            [["Ian", "despised eating intestine."], ["Dennis", "despised eating intestine."]],
            1,
        ),
        (
            "siqa",
            "Question: Tracy didn't go home. What does Tracy need to do?\nAnswer: ",
            ["make a plan", "Go home", "Find somewhere to go"],
            2,
        ),
        ("piqa", "Question: How do I boil?\nAnswer: ", [" Use water.", " Use sand."], 0),
    ],
)
def test_questions_are_those_of_the_code(name, prompt, choices, answer):
    _, texts, references = read(name, "validation")
    right = choices[answer]
    assert texts == [(prompt, right if isinstance(right, str) else "".join(right), "")]
    assert references == [{"choices": choices, "answer": answer}]


@pytest.mark.usefixtures("files")
def test_gaps_and_references_are_those_of_the_code():
    task, texts, references = read("lambada", "test")
    assert texts[0][0] == "he looked at the old"
    assert [text[1].strip() for text in texts] == [text.strip() for text in references] == ["house", "again"]
    assert task.metric_fns[0](references, ["house", " again "]) == {"exact_match": 100}

    task, texts, references = read("triviaqa", "validation")
    assert len(texts) == 2000
    assert texts[0] == ("Question: Who won the prize??\nAnswer: ", "Harry Sinclair Lewis", "")
    assert task.metric_fns[0](references[:2], ["it was the lewis!", "nobody"]) == {"contains": 50}

    task, texts, references = read("rocstories_infilling", "validation")
    ends = ("One, then.", "Two.")
    assert texts == [(f"{STORY[0]} {STORY[1]}", STORY[2], f"{STORY[3]} {end}") for end in ends]
    assert references == [STORY[2]] * 2
    assert task.metric_fns[0](references, [STORY[2]] * 2)["rougeL"] == 100


@pytest.mark.usefixtures("files")
def test_code_around_a_gap_is_run_with_what_fills_it():
    task, texts, references = read("humaneval_lines", "test")
    assert texts == [
        ("def add(a, b):\n", "    total = a + b", "\n\n    return total\n"),
        ("def add(a, b):\n    total = a + b\n\n", "    return total", "\n"),
    ]
    assert task.metric_fns[0](references, [["    total = b + a"], ["    return 4"]])["pass_at_1"] == 50
    assert program_with_tests(references[0], "X") == (
        "def add(a, b):\nX\n\n    return total\n\n\n" + PROBLEM["test"] + "\ncheck(add)\n"
    )
    task, texts, references = read("humaneval_infilling", "test")
    assert texts == [("def add(a, b):\n", "    total = a + b", "\n    return total\n")]
    assert task.metric_fns[0](references, [["    total = 1 + b"]])["pass_at_1"] == 100


@pytest.mark.usefixtures("files")
def test_long_programs_are_left_out(monkeypatch):
    monkeypatch.setattr(cloze, "HUMANEVAL_TOKENS", 10)
    assert not list(cloze.read_humaneval_lines("test"))


@pytest.mark.parametrize("make", [folders.gpt2_folder, folders.json_folder, folders.llama_folder])
def test_the_tokens_of_the_last_word_continue_the_passage(make, tmp_path):
    """GPT-2's BPE wants the space before the word, LLaMA's SentencePiece writes one itself."""
    vocabulary = Vocabulary.load(make(tmp_path / "model"))
    for passage, word in (("the cat", "sat"), ("def f", "return")):
        found = cloze.continuation(vocabulary.encode, passage, word)
        assert found.strip() == word
        assert [*vocabulary.encode(passage), *vocabulary.encode(found)] == [*vocabulary.encode(f"{passage} {word}")]


RUN = """
from __gin__ import dynamic_registration
from diffusion_lm.data import grain_source
from diffusion_lm.nn import transformer
include 'runs/train.gin'
include 'models/sizes/nano.gin'
include 'objectives/%s.gin'
VOCAB_SIZE = 1280
TASK = 'siqa'
INPUTS_LENGTH = 60
TARGET_LENGTH = 20
TRAIN_STEPS = 1
BATCH_SIZE = 2
transformer.TransformerSpec.num_layers = 1
grain_source.GrainSource.root = 'data'
train/grain_source.GrainSource.split = 'validation'
"""


@pytest.mark.thorough
@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("objective", "suite", "ids"),
    [("diffullama", "diffullama", ["--gin.MASK_ID=4"]), ("autoregressive", "diffullama_ar", [])],
)
def test_the_suite_is_one_command_after_materialising(objective, suite, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored = ("hellaswag", "winogrande", "siqa", "piqa")
    for split, names in (
        ("validation", (*scored, "triviaqa", "rocstories_infilling")),
        ("test", ("lambada", "humaneval_infilling")),
    ):
        named = [flag for name in names for flag in ("--task", name)]
        assert main(["materialise", *named, "--split", split, "--root", "data", "--limit", "2"]) == 0
    (tmp_path / "run.gin").write_text(RUN % objective)
    assert main(["train", "--gin_file", "run.gin", "--workdir", "run"]) == 0
    flags = [*ids, "--gin.EOS_ID=1", "--gin.PAD_ID=0", "--gin.GrainSource.root='data'", "--limit", "1"]
    assert main(["evaluate", "--workdir", "run", "--suite", f"gin/suites/{suite}.gin", "--json", "s.json", *flags]) == 0
    found = json.loads((tmp_path / "s.json").read_text())["evaluations"]
    for name in scored:
        assert found[name]["values"]["examples"] == 1
        assert found[name]["values"]["acc_tokens"] in (0, 1)
    gaps = {
        "lambada": "exact_match",
        "triviaqa": "contains",
        "rocstories_infilling": "rougeL",
        "humaneval_infilling": "pass_at_1",
    }
    for name, metric in gaps.items():
        assert 0 <= found[f"decode/{name}/oracle_length"]["values"][metric] <= 100
    assert set(found) == {*scored, *(f"decode/{name}/oracle_length" for name in gaps)}


def test_rows_without_their_fields_are_named(files):
    (files / "evaluation/piqa_validation.jsonl").write_text('{"goal": "?"}\n')
    with pytest.raises(ConfigError, match=r"piqa_validation.jsonl, line 1: not a row of piqa: KeyError\('sol1'\)"):
        list(commonsense.reader("piqa", commonsense.piqa)("validation"))
    (files / "evaluation/triviaqa_validation.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ConfigError, match="example 1 of triviaqa: bad field: 'answer'"):
        list(cloze.checked(cloze.read_triviaqa)("validation"))
