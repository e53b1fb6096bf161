r"""Instruction tuning and its zero- and few-shot evaluation (Diffusion-LLM, arXiv 2308.12219).

Training: the Flan collections as local JSON lines `{"inputs", "targets"}` (`flan/NAME.jsonl`), templates already
applied; `flan_2021` and the thirteen sources of Flan 2022. Evaluation:

| task | data | prompt ends in | metric |
|---|---|---|---|
| `mmlu`, `mmlu_2shot` | `instruction/mmlu_{dev,val,test}.jsonl` | `Answer:` | the letter: exact match, or choices |
| `tydiqa`, `tydiqa_1shot` | TFDS `tydi_qa/goldp` | `Answer:` | SQuAD's F1 and exact match, as GoldP is scored |
| `mgsm_LANGUAGE` | `instruction/mgsm_LANGUAGE.tsv` | `Answer:` | the last number |
| `gsm8k`, `gsm8k_3shot` | TFDS `gsm8k` | `Answer:` | the last number |

The paper does not give its prompts; these are ours. A shot is the same text followed by its answer. Shots and question
are separated by empty lines. Shots come from the development split (MMLU, same subject) or the training split (same
language), in stored order, so prompts are the same in every run.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import local_files, preprocessors, tfds_sources, vocabularies
from diffusion_lm_tasks.splits import split_of

FLAN_2022 = (
    *(f"flan_{kind}" for kind in ("zsopt", "zsnoopt", "fsopt", "fsnoopt")),
    *(f"t0_{kind}" for kind in ("zsopt", "zsnoopt", "fsnoopt")),
    *(f"niv2_{kind}" for kind in ("zsopt", "fsopt")),
    *(f"cot_{kind}" for kind in ("zsopt", "fsopt")),
    *(f"dialog_{kind}" for kind in ("zsopt", "fsopt")),
)
"""Sources of Flan 2022 (arXiv 2301.13688): zero- and few-shot templates, with and without answer options."""

LETTERS = "ABCD"
MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")

Row = dict[str, str]


def few_shot(shots: list[tuple[str, str]], question: str) -> str:
    """Returns the prompt: each shot with its answer, then the question, separated by empty lines."""
    return "\n\n".join([*(f"{prompt} {answer}" for prompt, answer in shots), question])


def read_flan(name: str) -> preprocessors.Reader:
    """Returns a reader of `flan/NAME.jsonl`; a hash of the inputs assigns one in 1,000 examples to validation."""

    def read(split: str) -> Iterator[Row]:
        for number, row in enumerate(local_files.json_lines(f"flan/{name}.jsonl"), 1):
            if not isinstance(row.get("inputs"), str) or not isinstance(row.get("targets"), str):
                raise ConfigError(
                    f"flan/{name}.jsonl, example {number}: 'inputs' and 'targets' must be strings",
                    fix='Write one {"inputs": "...", "targets": "..."} per line.',
                )
            if split_of(row["inputs"], held_out=0.001) == split:
                yield {"inputs": row["inputs"], "targets": row["targets"]}

    return read


def mmlu_prompt(row: dict[str, Any]) -> str:
    """Returns question, four options and `Answer:` of an MMLU row (`question`, `choices`, `answer`, `subject`)."""
    if not isinstance(row["choices"], list) or len(row["choices"]) != len(LETTERS):
        raise ConfigError(
            f"question {row['question']!r}: choices={row['choices']!r} must be a list of four strings",
            where="instruction/mmlu_*.jsonl",
            fix="Correct or remove the line.",
        )
    options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"Question: {row['question'].strip()}\n{options}\nAnswer:"


def read_mmlu(shots: int) -> preprocessors.Reader:
    """Returns a reader of MMLU; each prompt begins with the first `shots` development questions of its subject.

    References are `{"choices": letters, "answer": index, "answers": [letter]}`, for multiple choice and exact match.
    """

    def read(split: str) -> Iterator[Row]:
        name = {"train": "dev", "validation": "val", "test": "test"}[split]
        examples: dict[str, list[tuple[str, str]]] = {}
        for row in local_files.json_lines("instruction/mmlu_dev.jsonl") if shots else ():
            examples.setdefault(row["subject"], []).append((mmlu_prompt(row), LETTERS[row["answer"]]))
        for row in local_files.json_lines(f"instruction/mmlu_{name}.jsonl"):
            letter = LETTERS[row["answer"]]
            reference = {"choices": list(LETTERS), "answer": row["answer"], "answers": [letter]}
            prompt = few_shot(examples.get(row["subject"], [])[:shots], mmlu_prompt(row))
            yield {"inputs": prompt, "targets": letter, "reference": json.dumps(reference)}

    return read


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def tydiqa_prompt(row: dict[str, Any]) -> str:
    """Returns passage, question and `Answer:` of a GoldP row."""
    return f"Passage: {_text(row['context'])}\nQuestion: {_text(row['question'])}\nAnswer:"


def read_tydiqa(shots: int) -> preprocessors.Reader:
    """Returns a reader of TyDiQA-GoldP; shots are the first training examples of the question's language."""

    def read(split: str) -> Iterator[Row]:
        examples: dict[str, list[tuple[str, str]]] = {}
        for row in tfds_sources.rows("tydi_qa/goldp:3.0.0", "train") if shots else ():
            known = examples.setdefault(_language(row), [])
            if len(known) < shots and len(row["answers"]["text"]):
                known.append((tydiqa_prompt(row), _text(row["answers"]["text"][0])))
        for row in tfds_sources.rows("tydi_qa/goldp:3.0.0", split):
            answers = [_text(answer) for answer in row["answers"]["text"]]
            prompt = few_shot(examples.get(_language(row), []), tydiqa_prompt(row))
            reference = json.dumps({"answers": answers}, ensure_ascii=False)
            yield {"inputs": prompt, "targets": answers[0] if answers else "", "reference": reference}

    return read


def _language(row: dict[str, Any]) -> str:
    """Returns the language of a GoldP row, the beginning of its id (`finnish-...`)."""
    return _text(row["id"]).split("-", 1)[0]


def number_prompt(question: str) -> str:
    """Returns the prompt of a word problem."""
    return f"Question: {question.strip()}\nAnswer:"


def read_mgsm(language: str) -> preprocessors.Reader:
    """Returns a reader of `instruction/mgsm_LANGUAGE.tsv` (arXiv 2210.03057); a line is question TAB number."""

    def read(split: str) -> Iterator[Row]:
        del split
        for question, answer in local_files.pairs(f"instruction/mgsm_{language}.tsv"):
            number = metrics.last_number(answer)
            if number is None:
                raise ConfigError(
                    f"mgsm_{language}.tsv: the answer {answer!r} is not a number", fix="Write question<TAB>number."
                )
            yield {"inputs": number_prompt(question), "targets": number, "reference": json.dumps(number)}

    return read


def read_gsm8k(shots: int) -> preprocessors.Reader:
    """Returns a reader of GSM8K (arXiv 2110.14168); targets are the solutions, references their final numbers.

    Shots are the first training problems.
    """

    def read(split: str) -> Iterator[Row]:
        examples = []
        if shots:
            first = (row for row, _ in zip(tfds_sources.rows("gsm8k:1.0.0", "train"), range(shots), strict=False))
            examples = [(number_prompt(_text(row["question"])), _text(row["answer"]).strip()) for row in first]
        for row in tfds_sources.rows("gsm8k:1.0.0", split):
            solution = _text(row["answer"]).strip()
            prompt = few_shot(examples, number_prompt(_text(row["question"])))
            yield {"inputs": prompt, "targets": solution, "reference": json.dumps(metrics.last_number(solution))}

    return read


VOCABULARY = vocabularies.mixed_vocabulary()


def _add(name: str, read: preprocessors.Reader, splits: tuple[str, ...], *metric_fns: Callable[..., Any]) -> None:
    fields = ("inputs", "targets", *(("reference",) if metric_fns else ()))
    preprocessors.add(
        name,
        source=preprocessors.python_source(read, fields, splits),
        preprocessors=(),
        features=preprocessors.paired_features(VOCABULARY),
        postprocess_fn=preprocessors.json_reference if metric_fns else preprocessors.text_reference,
        metric_fns=metric_fns,
    )


for _name in ("flan_2021", *(f"flan_2022_{source}" for source in FLAN_2022)):
    _add(_name, read_flan(_name), ("train", "validation"))
for _name, _shots in (("mmlu", 0), ("mmlu_2shot", 2)):
    _add(_name, read_mmlu(_shots), ("train", "validation", "test"), metrics.exact_match)
for _name, _shots in (("tydiqa", 0), ("tydiqa_1shot", 1)):
    _add(_name, read_tydiqa(_shots), ("train", "validation"), metrics.squad)
for _language_code in MGSM_LANGUAGES:
    _add(f"mgsm_{_language_code}", read_mgsm(_language_code), ("test",), metrics.number_match)
for _name, _shots in (("gsm8k", 0), ("gsm8k_3shot", 3)):
    _add(_name, read_gsm8k(_shots), ("train", "test"), metrics.number_match)
