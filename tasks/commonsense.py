r"""Multiple-choice tasks of DiffuGPT and DiffuLLaMA (arXiv 2410.17891, section 4.1, and its released code).

| task | conditioning | a choice |
|---|---|---|
| `hellaswag` | `ACTIVITY: CTX_A Ctx_b`, cleaned | an ending, cleaned |
| `winogrande` | the sentence up to the blank | two parts: the option, and the text after the blank |
| `siqa` | `Question: CONTEXT QUESTION\nAnswer: ` | an answer |
| `piqa` | `Question: GOAL\nAnswer: ` | a space and a solution |

Texts are joined as in the released code: prompt and choice are encoded separately, without a space between WinoGrande's
option and rest, and with two spaces in PIQA. All tasks read validation splits in JSON lines, with the fields of the
Hugging Face data sets. The released code answers with the choice of the lowest mean loss per token: `acc_tokens` under
`gin/scoring/diffullama_grid.gin`. lm-evaluation-harness uses different prompts.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from diffusion_lm.core.errors import ConfigError
from diffusion_lm_tasks import local_files, preprocessors, vocabularies

Row = dict[str, Any]
Question = tuple[str, list[Any], int]


def clean_hellaswag(text: str) -> str:
    """Returns a text of HellaSwag without WikiHow's markup: ` [title]` becomes ". ", other brackets are removed."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(row: Row) -> Question:
    """Returns conditioning, choices and answer of `activity_label`, `ctx_a`, `ctx_b`, `endings`, `label`."""
    prompt = clean_hellaswag(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return prompt, [clean_hellaswag(ending) for ending in row["endings"]], int(row["label"])


def winogrande(row: Row) -> Question:
    """Returns conditioning, choices and answer of `sentence`, with a `_`, `option1`, `option2`, `answer` (1 or 2)."""
    before, _, after = row["sentence"].partition("_")
    return before, [[row[f"option{number}"], after.strip()] for number in (1, 2)], int(row["answer"]) - 1


def siqa(row: Row) -> Question:
    """Returns conditioning, choices and answer of `context`, `question`, `answerA` to `answerC`, `label` (1 to 3)."""
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return f"Question: {row['context']} {row['question']}\nAnswer: ", choices, int(row["label"]) - 1


def piqa(row: Row) -> Question:
    """Returns conditioning, choices and answer of `goal`, `sol1`, `sol2`, `label` (0 or 1)."""
    return f"Question: {row['goal']}\nAnswer: ", [f" {row['sol1']}", f" {row['sol2']}"], int(row["label"])


def reader(name: str, question: Callable[[Row], Question]) -> preprocessors.Reader:
    """Returns a reader of `evaluation/NAME_validation.jsonl`; references are `{"choices": [...], "answer": index}`."""

    def read(split: str) -> Iterator[dict[str, str]]:
        del split
        file = f"evaluation/{name}_validation.jsonl"
        for number, row in enumerate(local_files.json_lines(file), 1):
            try:
                prompt, choices, answer = question(row)
                # A string would be indexed by letter, and a negative index would count from the end.
                if not all(isinstance(value, list) for value in (row.get("endings", []), choices)) or answer < 0:
                    raise ValueError("the choices are not a list, or the answer is not one of them")
                right = choices[answer]
            except (KeyError, ValueError, AttributeError, IndexError, TypeError) as error:
                raise ConfigError(
                    f"{file}, line {number}: not a row of {name}: {error!r}",
                    fix=f"Use the fields that docs/data.md lists for {name}.",
                ) from error
            yield {
                "inputs": prompt,
                "targets": right if isinstance(right, str) else "".join(right),
                "reference": json.dumps({"choices": choices, "answer": answer}, ensure_ascii=False),
            }

    return read


VOCABULARY = vocabularies.mixed_vocabulary()

for _question in (hellaswag, winogrande, siqa, piqa):
    preprocessors.add(
        _question.__name__,
        source=preprocessors.python_source(
            reader(_question.__name__, _question), ("inputs", "targets", "reference"), ("validation",)
        ),
        preprocessors=(),
        features=preprocessors.paired_features(VOCABULARY),
        postprocess_fn=preprocessors.json_reference,
    )
