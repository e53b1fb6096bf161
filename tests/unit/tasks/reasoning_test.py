"""GSM8K as equations, and generated countdown problems; no network."""

import json

import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("seqio")

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import countdown, local_files, pretraining, reasoning, splits, vocabularies

pytestmark = pytest.mark.tensorflow

SIZES = {"train": 40, "validation": 5, "test": 5}


@pytest.fixture
def mixed(data_folder, monkeypatch):
    """Local data, and the embedded vocabulary in place of the large one."""
    monkeypatch.setenv("DIFFUSION_LM_DATA", str(data_folder))
    monkeypatch.setenv("DIFFUSION_LM_VOCABULARY", vocabularies.embedded_model())
    for module in (reasoning, pretraining):
        monkeypatch.delitem(vars(module.VOCABULARY), "vocabulary", raising=False)  # as it is before its first use


def read(name, split, limit=-1):
    task = seqio.TaskRegistry.get(name)
    rows = list(task.get_dataset(sequence_length=None, split=split, shuffle=False).take(limit).as_numpy_iterator())
    texts = [row["targets_pretokenized"].decode() for row in rows]
    references = [task.postprocess_fn(t, example=r, is_target=True) for t, r in zip(texts, rows, strict=True)]
    return task, rows, texts, references


@pytest.mark.usefixtures("mixed")
def test_gsm8k_keeps_the_equations_and_the_answer():
    task, rows, texts, references = read("local_gsm8k_symbolic", "test")
    assert texts == ["<<16-3-4=9>> <<9*2=18>> #### 18", "<<700*2=1400>> #### 1400"]
    assert references == [{"answer": "18"}, {"answer": "1400"}]
    question = "Janet has 16 eggs, eats 3 and bakes with 4. She sells the rest at $2. How much?"
    assert rows[0]["inputs_pretokenized"].decode() == question
    (metric,) = task.metric_fns
    assert metric(references, texts) == {"accuracy": 100, "answered": 100}
    assert [len(read("local_gsm8k_symbolic", split)[1]) for split in ("train", "validation")] == [44, 256]


def test_a_chain_without_prose_stays_what_it_is():
    chain = "<<16-3-4=9>> <<9*2=18>> #### 18"
    assert reasoning.symbolic_chain(chain) == chain
    assert reasoning.symbolic_chain("no answer at all") is None


def test_gsm8k_from_tfds_is_the_same_as_from_files():
    rows = [
        {"question": "How\n many?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        {"question": "What?", "answer": "nothing marked"},
    ]
    dataset = tf.data.Dataset.from_generator(
        lambda: rows, output_signature={name: tf.TensorSpec((), tf.string) for name in ("question", "answer")}
    )
    (found,) = reasoning.symbolic(dataset).as_numpy_iterator()
    assert {name: text.decode() for name, text in found.items()} == reasoning.symbolic_example(**_renamed(rows[0]))


@pytest.mark.usefixtures("mixed")
def test_gsm8k_task_reads_tfds(monkeypatch):
    monkeypatch.setattr(seqio.LazyTfdsLoader, "size", lambda self, dataset_split: 4)

    def examples(builder, *arguments, **options):
        row = {"question": "How many?", "answer": "<<1+1=2>> #### 2", "short_answer": "2", "annotation": ""}
        return tf.data.Dataset.from_generator(
            lambda: [row] * 2, output_signature={name: tf.TensorSpec((), tf.string) for name in row}
        )

    with tfds.testing.mock_data(num_examples=2, as_dataset_fn=examples):
        _, _, texts, references = read("gsm8k_symbolic", "test")
    assert texts == ["<<1+1=2>> #### 2"] * 2
    assert references == [{"answer": "2"}] * 2


def test_countdown_problems_are_solved_by_their_targets_and_splits_share_no_numbers():
    examples = splits.deal(countdown.make, SIZES, seed="test", attempts=4000)
    assert examples == splits.deal(countdown.make, SIZES, seed="test", attempts=4000)
    keys = {split: {example.key for example in found} for split, found in examples.items()}
    assert not keys["train"] & (keys["validation"] | keys["test"])
    for example in [one for found in examples.values() for one in found]:
        reference = json.loads(example.reference)
        assert metrics.countdown([reference], [example.targets]) == {"solved": 100}
        assert [*reference["numbers"], reference["goal"]] == [int(number) for number in example.inputs.split(",")]
        assert len(reference["numbers"]) == 4
        assert example.targets.count("=") == 3
        assert 10 <= reference["goal"] <= 100
    operators = "".join(example.targets for example in examples["train"])
    assert set("+-*/") <= set(operators)


@pytest.mark.usefixtures("mixed")
def test_countdown_task_is_tokenised_without_loss(monkeypatch):
    monkeypatch.setattr(countdown, "SIZES", SIZES)
    countdown.examples.cache_clear()
    try:
        task, rows, texts, references = read("countdown4", "test")
    finally:
        countdown.examples.cache_clear()
    assert len(rows) == 5
    (metric,) = task.metric_fns
    assert metric(references, texts) == {"solved": 100}
    assert metric(references, texts[1:] + texts[:1])["solved"] < 50
    assert reasoning.VOCABULARY.vocabulary.decode_all(row["targets"] for row in rows) == texts


@pytest.mark.usefixtures("mixed")
def test_large_corpora_are_read_from_whatever_files_they_come_in():
    def texts(name):
        return {text for split in splits.SPLITS for text in read(name, split)[2]}

    pages = {f"page {i}" for i in range(4)}
    assert texts("fineweb") == texts("slimpajama") == pages
    assert texts("starcoder") == {"x = 0", "y = 0", "x = 1", "y = 1"}


@pytest.mark.usefixtures("mixed")
def test_missing_corpora_and_fields_are_one_sentence(data_folder):
    with pytest.raises(ConfigError, match=r"no .*parquet files in text/nothing"):
        next(local_files.rows("text/nothing", "text"))
    for folder in ("text/fineweb", "code/starcoder"):
        with pytest.raises(ConfigError, match="has no field 'body'"):
            next(local_files.rows(folder, "body"))
    (data_folder / "text/zst").mkdir()
    (data_folder / "text/zst/a.jsonl.zst").write_bytes(b"")
    try:
        import zstandard

        del zstandard
    except ModuleNotFoundError:
        with pytest.raises(ConfigError, match="pip install zstandard"):
            next(local_files.rows("text/zst", "text"))


def _renamed(row):
    return {"question": row["question"], "solution": row["answer"]}
