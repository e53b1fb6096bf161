"""What the tests of the tasks share: a small local data folder in the public formats, tiny tokenizers."""

import gzip
import json
import pathlib
import sys

import pyarrow
import pytest
from pyarrow import parquet

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "data"))

MBPP = [
    {
        "task_id": task_id,
        "text": "Write a function to add one.\r\n",
        "code": "def f(x):\r\n\treturn x + 1",
        "test_setup_code": "",
        "test_list": ["assert f(1) == 2", "assert f(0) == 1"],
        "challenge_test_list": [],
    }
    for task_id in (2, 11, 12, 511, 601, 974)
]
GSM8K = [
    {
        "question": "Janet has 16 eggs,\n eats 3 and bakes with 4. She sells the rest at $2.  How much?",
        "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18",
    },
    {"question": "How far?", "answer": "<<700*2=1400>> #### 1,400"},
]
SENTENCE = "The tower of Paris was finished in 1889 after two years of work. "


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")

    def write(name, text):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8", newline="")

    def json_lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    write("code_eval/mbpp.jsonl.gz", json_lines(MBPP))
    filler = "Nothing of interest happened here for a long while. " * 40
    qas = [{"id": "1", "question": "When was the tower finished?", "answers": ["1889"], "answer_starts": [0]}]
    context = filler + SENTENCE + filler
    qas[0]["answer_starts"] = [context.index("1889")]
    for split in ("train", "dev"):
        write(f"squad/squad_v1.1_{split}.jsonl", json_lines([{"title": "t", "context": context, "qas": qas}]))
    for name, pairs in {
        "tatoeba_train": [("Hello.", "Bonjour."), ("I am ill.", "Je suis malade."), ("hi", "salut")],
        "tatoeba_dev": [("hello.", "Salut.")],
        "tatoeba_test": [("Hi", "Salut !")],
        "multi30k_train": [("A dog.", "Un chien."), ("A cat.", "Un chat.")],
        "multi30k_val": [("A bird.", "Un oiseau.")],
        "multi30k_test_2016_flickr": [("A CAT.", "Un chat !")],
    }.items():
        write(f"translation/{name}.en-fr.tsv.gz", "".join(f"{en}\t{fr}\n" for en, fr in pairs))
    write(
        "code/python_functions.jsonl.gz",
        json_lines(
            {"name": f"f{i}", "doc": f"Return {i}.", "code": f"def f{i}():\r\n    return {i}"} for i in range(200)
        ),
    )
    write("code/python_stdlib_pypi.jsonl.gz", json_lines({"text": f"x = {i}\ny = x"} for i in range(200)))
    for split, count in (("train", 300), ("test", 2)):
        write(f"reasoning/gsm8k_{split}.jsonl", json_lines(GSM8K[:2] * (count // 2)))
    write("text/fineweb/data/a.jsonl", json_lines({"text": f"page {i}", "dump": "x"} for i in range(4)))
    write("text/slimpajama/b.jsonl.gz", json_lines({"text": f"page {i}", "meta": {}} for i in range(4)))
    (root / "code/starcoder").mkdir()
    for number in range(2):
        table = pyarrow.table({"id": [1, 2], "content": [f"x = {number}\r\n", f"y = {number}"]})
        parquet.write_table(table, root / f"code/starcoder/train-{number}.parquet")
    for name in ("c4_sample", "openwebtext_1k", "wikipedia_sample"):
        write(f"text/{name}.jsonl.gz", json_lines({"text": f"{name} {i}"} for i in range(100)))
    return root
