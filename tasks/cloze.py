r"""Cloze and infilling tasks of DiffuGPT and DiffuLLaMA (arXiv 2410.17891, section 4.1, and its released code).

| task | before the gap | the gap | after the gap | examples | metric |
|---|---|---|---|---|---|
| `lambada` | a passage | its last word | | 5,153 | exact match |
| `triviaqa` | `Question: QUESTION?\nAnswer: ` | the longest alias, in tokens | | first 2,000 | contains an alias |
| `rocstories_infilling` | two sentences | the third of five | two sentences | first 1,000 | ROUGE-1/2/L |
| `humaneval_infilling` | prompt, lines | a line | other lines | those up to 1,000 tokens of 1,033 | pass@1 |
| `humaneval_lines` | the same, made from HumanEval's own file | | | | |

As in the released code, the parts are encoded separately and joined without a separator. LAMBADA's word begins with a
space if the tokenizer needs one to continue the passage. The prompt of TriviaQA adds a question mark to that of the
question, as the released code does. The protocol reveals the length of the gap (`target_window.OracleLength(closing=
False)`, with `extra=10` for TriviaQA). An autoregressive model only sees the text before the gap.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.evaluation import metrics
from diffusion_lm_tasks import local_files, preprocessors, vocabularies

TRIVIAQA_QUESTIONS = 2000
STORIES = 1000
HUMANEVAL_TOKENS = 1000

Encode = Callable[[str], Sequence[int]]


def continuation(encode: Encode, passage: str, word: str) -> str:
    """Returns `word`, with a leading space unless the tokenizer adds one to every text.

    The tokens of passage and word should be those of both together: GPT-2's BPE needs the space, LLaMA's SentencePiece
    must not have it. If neither form gives these tokens, the space is kept.
    """
    whole = [*encode(f"{passage} {word}")]
    return word if [*encode(passage), *encode(word)] == whole else f" {word}"


def read_lambada(split: str) -> Iterator[dict[str, str]]:
    """Yields the passages of `evaluation/lambada_test_plain_text.txt`, one per line, and their last words."""
    del split
    with local_files.open_text("evaluation/lambada_test_plain_text.txt") as file:
        for line in file:
            *passage, word = line.split() or [""]
            if passage:
                before = " ".join(passage)
                yield {"inputs": before, "targets": continuation(VOCABULARY.encode, before, word)}


def read_triviaqa(split: str) -> Iterator[dict[str, str]]:
    """Yields the first questions of `evaluation/triviaqa_validation.jsonl` (`question`, `answer: {aliases: [...]}`)."""
    del split
    rows = local_files.json_lines("evaluation/triviaqa_validation.jsonl")
    for row in itertools.islice(rows, TRIVIAQA_QUESTIONS):
        aliases = row["answer"]["aliases"]
        aliases = [aliases] if isinstance(aliases, str) else aliases
        yield {
            "inputs": f"Question: {row['question']}?\nAnswer: ",
            "targets": max(aliases, key=lambda alias: len(VOCABULARY.encode(alias))),
            "reference": json.dumps({"answers": aliases}, ensure_ascii=False),
        }


def read_rocstories(split: str) -> Iterator[dict[str, str]]:
    """Yields stories of `evaluation/cloze_test_val__spring2016.csv` with their right ending; sentence 3 is the gap."""
    del split
    with local_files.open_text("evaluation/cloze_test_val__spring2016.csv") as file:
        for row in itertools.islice(csv.DictReader(file), STORIES):
            sentences = [row[f"InputSentence{number}"] for number in range(1, 5)]
            sentences.append(row[f"RandomFifthSentenceQuiz{row['AnswerRightEnding']}"])
            yield {
                "inputs": " ".join(sentences[:2]),
                "targets": sentences[2],
                "suffix": " ".join(sentences[3:]),
            }


def read_humaneval_infilling(split: str) -> Iterator[dict[str, str]]:
    """Yields the examples of `evaluation/HumanEval-SingleLineInfilling.jsonl`, as released with arXiv 2207.14255."""
    del split
    for row in local_files.json_lines("evaluation/HumanEval-SingleLineInfilling.jsonl"):
        yield from _code_gap(row, row["prompt"], row["canonical_solution"], row["suffix"])


def read_humaneval_lines(split: str) -> Iterator[dict[str, str]]:
    """Yields one example per non-blank line of HumanEval's solutions (`code_eval/HumanEval.jsonl`), which is the gap.

    There are 1,033, as in the released benchmark. The newline of the line comes after the gap.
    """
    del split
    for row in local_files.json_lines("code_eval/HumanEval.jsonl"):
        lines = row["canonical_solution"].split("\n")
        for number, line in enumerate(lines):
            if line.strip():
                before = row["prompt"] + "".join(f"{one}\n" for one in lines[:number])
                yield from _code_gap(row, before, line, "".join(f"\n{one}" for one in lines[number + 1 :]))


def _code_gap(row: dict[str, Any], before: str, gap: str, after: str) -> Iterator[dict[str, str]]:
    """Yields the example, unless it is longer than `HUMANEVAL_TOKENS`."""
    if sum(len(VOCABULARY.encode(text)) for text in (before, gap, after)) <= HUMANEVAL_TOKENS:
        tests = [row["test"], f"check({row['entry_point']})"]
        reference = {"before": before, "after": after, "tests": tests}
        yield {"inputs": before, "targets": gap, "suffix": after, "reference": json.dumps(reference)}


def checked(read: preprocessors.Reader) -> preprocessors.Reader:
    """Wraps a reader so that a row without a required field raises a `ConfigError`."""

    def checked_read(split: str) -> Iterator[Any]:
        rows = iter(read(split))
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"example {number} of {getattr(read, '__name__', 'the task')[5:]}: bad field: {error}",
                    fix="Use the file format described in docs/data.md.",
                ) from error
            yield row

    return checked_read


VOCABULARY = vocabularies.mixed_vocabulary()


def _add(name: str, read: preprocessors.Reader, split: str, metric: Callable[..., Any], *extra: str) -> None:
    features = preprocessors.paired_features(VOCABULARY)
    if "suffix" in extra:
        features["suffix"] = features["inputs"]
    preprocessors.add(
        name,
        source=preprocessors.python_source(checked(read), ("inputs", "targets", *extra), (split,)),
        preprocessors=(),
        features=features,
        postprocess_fn=preprocessors.json_reference if "reference" in extra else preprocessors.text_reference,
        metric_fns=(metric,),
    )


_add("lambada", read_lambada, "test", metrics.exact_match)
_add("triviaqa", read_triviaqa, "validation", metrics.contains, "reference")
_add("rocstories_infilling", read_rocstories, "validation", metrics.rouge, "suffix")
_add("humaneval_infilling", read_humaneval_infilling, "test", metrics.pass_at_k, "suffix", "reference")
_add("humaneval_lines", read_humaneval_lines, "test", metrics.pass_at_k, "suffix", "reference")
