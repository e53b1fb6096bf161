r"""Gaps to fill as DiffuGPT and DiffuLLaMA are evaluated (arXiv 2410.17891, section 4.1, and its released code).

| task | before the gap | the gap | behind it | examples | metric |
|---|---|---|---|---|---|
| `lambada` | a passage | its last word | | 5,153 | exact match |
| `triviaqa` | `Question: QUESTION?\nAnswer: ` | the longest alias, in tokens | | first 2,000 | contains an alias |
| `rocstories_infilling` | two sentences | the third of five | two sentences | first 1,000 | ROUGE-1/2/L |
| `humaneval_infilling` | prompt, lines | a line | other lines | those up to 1,000 tokens of 1,033 | pass@1 |
| `humaneval_lines` | the same, made of HumanEval's own file | | | | |

The parts are encoded apart and nothing is put between them, as in the code; LAMBADA's word has the space that continues
its passage under the tokenizer at hand. The question mark of TriviaQA's prompt is the code's, behind the question's
own. How long the gap is, the protocol gives away (`target_window.OracleLength(closing=False)`, with `extra=10` for
TriviaQA). An autoregressive model sees what stands before the gap only.
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
    """Returns `word` with the space before it, or without where the tokenizer puts one before every text.

    So that the tokens of the passage and of the word are those of both together (GPT-2's BPE needs the space, LLaMA's
    SentencePiece must not have it); with the space where neither does it.
    """
    whole = [*encode(f"{passage} {word}")]
    return word if [*encode(passage), *encode(word)] == whole else f" {word}"


def read_lambada(split: str) -> Iterator[dict[str, str]]:
    """Yields the passages of `evaluation/lambada_test_plain_text.txt`, one a line, and their last words."""
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
    """Yields stories of `evaluation/cloze_test_val__spring2016.csv`, each with its right ending, without sentence 3."""
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
    """Yields the gaps of `evaluation/HumanEval-SingleLineInfilling.jsonl`, as released with arXiv 2207.14255."""
    del split
    for row in local_files.json_lines("evaluation/HumanEval-SingleLineInfilling.jsonl"):
        yield from _code_gap(row, row["prompt"], row["canonical_solution"], row["suffix"])


def read_humaneval_lines(split: str) -> Iterator[dict[str, str]]:
    """Yields every line of HumanEval's solutions (`code_eval/HumanEval.jsonl`) that is not blank, as a gap.

    There are 1,033, as many as in the released benchmark. Its newline stays behind the gap.
    """
    del split
    for row in local_files.json_lines("code_eval/HumanEval.jsonl"):
        lines = row["canonical_solution"].split("\n")
        for number, line in enumerate(lines):
            if line.strip():
                before = row["prompt"] + "".join(f"{one}\n" for one in lines[:number])
                yield from _code_gap(row, before, line, "".join(f"\n{one}" for one in lines[number + 1 :]))


def _code_gap(row: dict[str, Any], before: str, gap: str, behind: str) -> Iterator[dict[str, str]]:
    """Yields the example, unless it is longer than the protocol takes."""
    if sum(len(VOCABULARY.encode(text)) for text in (before, gap, behind)) <= HUMANEVAL_TOKENS:
        tests = [row["test"], f"check({row['entry_point']})"]
        reference = {"before": before, "after": behind, "tests": tests}
        yield {"inputs": before, "targets": gap, "suffix": behind, "reference": json.dumps(reference)}


def checked(read: preprocessors.Reader) -> preprocessors.Reader:
    """Returns the reader; a row without the fields it needs is an error that says which file to look at."""

    def checked_read(split: str) -> Iterator[Any]:
        rows = iter(read(split))
        for number in itertools.count(1):
            try:
                row = next(rows)
            except StopIteration:
                return
            except (KeyError, TypeError) as error:
                raise ConfigError(
                    f"example {number} of {getattr(read, '__name__', 'the task')[5:]} lacks {error}",
                    fix="docs/data.md says what the files of `evaluation/` hold.",
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
