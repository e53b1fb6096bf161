"""Multiple choice: the held-out questions of `embedded_qa`, with four answers of the kind that the question asks for.

If the other fact of the passage is of the same kind, its answer is one of the wrong choices. So choosing any answer
that occurs in the passage does not suffice. Inputs and targets are those of `embedded_qa`. There is no training split.
"""

import functools
import json
import random

from diffusion_lm_tasks import cldr, embedded_qa
from diffusion_lm_tasks.splits import Example

SIZES = {split: embedded_qa.SIZES[split] for split in ("validation", "test")}

CHOICES = 4


def kind(question: str) -> str:
    """Returns the kind of a question: its words before the name, with "/currency" for the French name of a currency."""
    opening, of, name = question.removesuffix("?").partition(" of ")
    if not of:  # "Which weekday is ...", "In which script is ...", "What is the number ..."
        opening, name = " ".join(question.split()[: 4 if question.startswith("What") else 2]), ""
    return f"{opening}/currency" if opening.endswith("French name") and name in _currencies() else opening


@functools.cache
def _currencies() -> frozenset[str]:
    return frozenset(f"the {cldr.currency_label(country.currency, 'en')}" for country in cldr.countries())


@functools.cache
def examples() -> dict[str, tuple[Example, ...]]:
    """Returns the examples by split; references are `{"choices": [four texts], "answer": index}`."""
    by_kind: dict[str, set[str]] = {}
    for found in embedded_qa.examples().values():
        for example in found:
            by_kind.setdefault(kind(_split(example)[0]), set()).add(example.targets)
    answers = {name: sorted(texts) for name, texts in by_kind.items()}
    return {split: tuple(_choose(one, answers) for one in embedded_qa.examples()[split]) for split in SIZES}


def _split(example: Example) -> tuple[str, str]:
    question, _, passage = example.inputs.removeprefix("question: ").partition(" context: ")
    return question, passage


def _choose(example: Example, answers: dict[str, list[str]]) -> Example:
    question, passage = _split(example)
    rng = random.Random(f"embedded_choices/{example.inputs}")
    others = [text for text in answers[kind(question)] if text != example.targets]
    # Facts end with their answer. Matching the space and period around it keeps "Oman" from matching "Roman".
    near = [text for text in others if any(end in f"{passage} " for end in (f" {text}. ", f" {text} script. "))]
    rest = [text for text in others if text not in near]
    wrong = [*near, *rng.sample(rest, CHOICES)][: CHOICES - 1]
    choices = [example.targets, *wrong]
    rng.shuffle(choices)
    reference = {"choices": choices, "answer": choices.index(example.targets)}
    return Example(example.inputs, example.targets, example.key, json.dumps(reference, ensure_ascii=False))
