"""Extractive questions over passages of CLDR facts; every answer is a span of its passage.

A passage states two facts, in half of the cases of the same kind, and the question asks for one of them. No held-out
combination of passage and question occurs in training, but single facts do, in other combinations.
"""

import datetime
import functools
import json
import random
from collections.abc import Callable

from diffusion_lm_tasks import cldr
from diffusion_lm_tasks.splits import Example, deal

SIZES = {"train": 16_000, "validation": 400, "test": 400}

LONGEST_PASSAGE = 84
"""Maximum number of characters of a passage. Most are shorter; longer rows would be mostly padding."""

Fact = tuple[str, str, str]
"""(statement, question, answer)."""


def _country(rng: random.Random) -> cldr.Country:
    return rng.choice(cldr.countries())


def _name(country: cldr.Country) -> str:
    """Returns the name as used in an English sentence: 'Japan', 'the Netherlands'."""
    plural = country.english.startswith("United") or country.english in ("Netherlands", "Philippines")
    return f"the {country.english}" if plural else country.english


def _currency(rng: random.Random) -> Fact:
    country = _country(rng)
    answer = cldr.currency_label(country.currency, "en")
    name = _name(country)
    return f"The currency of {name} is the {answer}.", f"What is the currency of {name}?", answer


def _language(rng: random.Random) -> Fact:
    country = _country(rng)
    answer, name = cldr.language_name(country.language, "en"), _name(country)
    return f"An official language of {name} is {answer}.", f"What is an official language of {name}?", answer


def _french_country(rng: random.Random) -> Fact:
    country = rng.choice([c for c in cldr.countries() if c.english != c.french])
    name = _name(country)
    return f"The French name of {name} is {country.french}.", f"What is the French name of {name}?", country.french


def _country_code(rng: random.Random) -> Fact:
    country = _country(rng)
    name = _name(country)
    return f"The country code of {name} is {country.code}.", f"What is the country code of {name}?", country.code


def _city(rng: random.Random) -> Fact:
    country = rng.choice([c for c in cldr.countries() if c.city])
    name = _name(country)
    return f"The clocks of {name} follow {country.city}.", f"Which city do the clocks of {name} follow?", country.city


def _currency_code(rng: random.Random) -> Fact:
    code = _country(rng).currency
    name = cldr.currency_label(code, "en")
    return f"The code of the {name} is {code}.", f"What is the code of the {name}?", code


def _french_currency(rng: random.Random) -> Fact:
    code = rng.choice([c.currency for c in cldr.countries() if c.currency != "EUR"])
    name, answer = cldr.currency_label(code, "en"), cldr.currency_label(code, "fr")
    return f"The French name of the {name} is {answer}.", f"What is the French name of the {name}?", answer


def _script(rng: random.Random) -> Fact:
    # CLDR's name of the script of Chinese is "Simplified", which is not an informative answer.
    language = rng.choice(sorted({c.language for c in cldr.countries()} - {"zh"}))
    name, answer = cldr.language_name(language, "en"), cldr.script_name(language)
    return f"{name} is written in {answer} script.", f"In which script is {name} written?", answer


def _number(rng: random.Random) -> Fact:
    value = rng.randint(2, 99)
    answer = cldr.number_words(value, "fr")
    return f"The number {value} in French is {answer}.", f"What is the number {value} in French?", answer


def _weekday(rng: random.Random) -> Fact:
    date = datetime.date(rng.randint(1990, 2039), rng.randint(1, 12), rng.randint(1, 28))
    day, answer = cldr.long_date(date, "en"), cldr.weekday(date.weekday(), "en")
    return f"The day {day} is a {answer}.", f"Which weekday is {day}?", answer


KINDS: tuple[Callable[[random.Random], Fact], ...] = (
    _currency,
    _language,
    _french_country,
    _country_code,
    _city,
    _currency_code,
    _french_currency,
    _script,
    _number,
    _weekday,
)


def _passage(rng: random.Random) -> list[Fact]:
    kind = rng.choice(KINDS)
    kinds = [kind, kind if rng.random() < 0.5 else rng.choice(KINDS)]
    facts: list[Fact] = []
    while len(facts) < len(kinds):
        fact = kinds[len(facts)](rng)
        if fact[1] not in {question for _, question, _ in facts}:
            facts.append(fact)
    return facts


def make(rng: random.Random) -> Example:
    """Draws one passage, question and answer."""
    facts = _passage(rng)
    while sum(len(statement) for statement, _, _ in facts) > LONGEST_PASSAGE:
        facts = _passage(rng)
    _, question, answer = facts[0]
    rng.shuffle(facts)
    inputs = f"question: {question} context: {' '.join(statement for statement, _, _ in facts)}"
    key = question + "|" + " ".join(sorted(statement for statement, _, _ in facts))
    return Example(inputs, answer, key, json.dumps({"answers": [answer]}, ensure_ascii=False))


@functools.cache
def examples() -> dict[str, tuple[Example, ...]]:
    """Returns the examples by split; no question over the same facts occurs in two splits."""
    return deal(make, SIZES, "embedded_qa")
