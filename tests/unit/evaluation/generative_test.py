"""Generative perplexity and what it must never be reported without."""

import dataclasses
import math
import types

import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.evaluation.generative import Diversity, GenerativePerplexity, Judge
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.decoding import Decoding

LETTERS = types.SimpleNamespace(encode=lambda text: [6 + ord(letter) - ord("a") for letter in text])


def judge(objective=None):
    data = types.SimpleNamespace(
        row_length=9, specials=SpecialTokens(stubs.VOCAB, bos_id=stubs.BOS), vocabulary=LETTERS
    )
    run = types.SimpleNamespace(objective=objective or Autoregressive(), data=data)
    return Judge(run, "runs/ar", 3)


def judged(texts, table=None, prompts=None):
    model = stubs.table_model(np.zeros((stubs.VOCAB, stubs.VOCAB)) if table is None else table, by_token=True)
    prompts = [""] * len(texts) if prompts is None else prompts
    return judge().judge(model, prompts, texts, AutoregressiveSampler(decoding=Decoding(temperature=0.5)), 4)


def test_diversity_by_hand():
    found = Diversity.of([[1, 1, 2, 2], [1, 1, 1, 1], []], orders=2)
    assert found.unigram_entropy == pytest.approx(math.log(2) / 3)
    assert found.distinct == (2 / 8, 3 / 6)
    assert found.mean_length == pytest.approx(8 / 3)
    assert found.empty == pytest.approx(1 / 3)
    assert Diversity.of([[1, 2, 3]], orders=4).distinct == (1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ConfigError, match="no text"):
        Diversity.of([])


def test_a_uniform_judge_gives_every_text_the_size_of_its_vocabulary():
    """Texts longer than a row too; the prompt is conditioning, and an empty text has no token to score."""
    found = judged(["abc", "abcdefghijklmnopqrs", ""], prompts=["x", "yz" * 8, "z"])
    assert found.values["generative_perplexity"] == pytest.approx(stubs.VOCAB, rel=1e-4)
    assert found.tokens == 3 + 19
    assert found.values["empty"] == pytest.approx(1 / 3)
    assert found.sampler["decoding"]["temperature"] == 0.5


def test_a_text_that_repeats_itself_is_likely_and_its_entropy_says_why():
    table = 6.0 * np.eye(stubs.VOCAB)
    dull, varied = judged(["aaaaaaaa"] * 2, table).values, judged(["abcdefgh", "hgfedcba"], table).values
    assert dull["generative_perplexity"] < 0.2 * varied["generative_perplexity"]
    assert dull["unigram_entropy"] == 0.0
    assert varied["unigram_entropy"] == pytest.approx(math.log(8))
    assert dull["distinct_2"] < 0.1 < varied["distinct_2"]


def test_it_cannot_be_built_without_what_shows_degeneration():
    fields = dataclasses.fields(GenerativePerplexity)
    assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)
    diversity = Diversity.of([[1]])
    whole = {"nats_per_token": 1.0, "tokens": 1, "texts": 1, "diversity": diversity, "sampler": {"t": 1}}
    for wrong in ({"diversity": None}, {"sampler": {}}):
        with pytest.raises(ConfigError, match="cannot be interpreted"):
            GenerativePerplexity(**(whole | wrong))
    names = set(judged(["ab"]).values)
    assert {"generative_perplexity", "unigram_entropy", "distinct_1", "distinct_2", "mean_length"} <= names


def test_only_an_exact_likelihood_judges():
    with pytest.raises(ConfigError, match="no exact likelihood"):
        judge(Sundae())
