"""What scored examples say together, against closed forms and against the harness's own definitions."""

import dataclasses
import math

import numpy as np
import pytest

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.schema import Record
from diffusion_lm.evaluation.scoring import Scores, answers
from diffusion_lm.evaluation.scoring_bounds import BlockNelbo
from diffusion_lm.evaluation.scoring_estimators import ExactAutoregressive, ExactCount, LeftToRight
from diffusion_lm.evaluation.scoring_task import NORMALISERS, ScoredExample, _question, mismatches, summary
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.block_diffusion import BlockDiffusion
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion
from diffusion_lm.objectives.uniform_diffusion import UniformDiffusion


def example(nll, tokens, bytes_=1, variance=0.0, **correct):
    return ScoredExample(nll, variance, tokens, bytes_, 1.0, correct)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary():
    """256 equally likely tokens of one byte each: 8 bits a token, 8 bits a byte without EOS, perplexity 256."""
    examples = [example(n * math.log(256), n, n) for n in (3, 10, 1)]
    values = summary(examples, "exact")
    assert values["bits_per_token"] == pytest.approx(8)
    assert values["bits_per_byte"] == pytest.approx(8)
    assert values["perplexity_exact"] == pytest.approx(256)
    assert values["example_error"] == pytest.approx(0, abs=1e-12)
    with_eos = summary([example(4 * math.log(256), 4, 3)], "nelbo")
    assert with_eos["bits_per_byte"] == pytest.approx(4 * 8 / 3), "EOS costs and has no byte"
    assert with_eos["perplexity_bound"] == pytest.approx(256)


def test_perplexity_stands_only_beside_what_it_is():
    names = {kind: set(summary([example(1.0, 1)], kind)) for kind in ("exact", "nelbo", "pseudo")}
    assert {name for name in names["exact"] if "perplexity" in name} == {"perplexity_exact"}
    assert {name for name in names["nelbo"] if "perplexity" in name} == {"perplexity_bound"}
    assert not {name for name in names["pseudo"] if "perplexity" in name or "bits" in name}
    assert "pseudo_nats_per_token" in names["pseudo"]
    assert "nats_per_token" not in names["pseudo"]


def test_errors_are_those_of_simulation():
    """The spread of nats per token over repeated samples of examples, and over repeated draws for the same ones."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (4000, 50))
    nll = tokens * 2.0 + rng.normal(size=tokens.shape) * np.sqrt(tokens)
    found = nll.sum(axis=1) / tokens.sum(axis=1)
    said = summary([example(float(n), int(t)) for n, t in zip(nll[0], tokens[0], strict=True)], "exact")
    assert said["example_error"] == pytest.approx(found.std(), rel=0.35)
    noisy = tokens[0] * 2.0 + rng.normal(size=(4000, 50)) * 0.7
    said = summary([example(2.0 * t, int(t), variance=0.7**2) for t in tokens[0]], "nelbo")
    assert said["draw_error"] == pytest.approx((noisy.sum(axis=1) / tokens[0].sum()).std(), rel=0.1)
    assert math.isnan(summary([example(1.0, 1, variance=math.nan)], "nelbo")["draw_error"])


def test_accuracies_are_those_of_the_harness():
    """lm-evaluation-harness: acc_norm divides by the characters of a choice, acc_bytes by its UTF-8 bytes."""
    choices = ["Österreich ißt Öl", "Austria eats oil ok!!", "no"]
    values = np.array([-12.0, -14.5, -3.0])
    scores = Scores(values, np.zeros(3), np.ones(3, int), np.ones(3, int), "exact", tuple(values[:, None]))
    by_characters = int(np.argmax(values / np.array([float(len(choice)) for choice in choices])))
    by_bytes = int(np.argmax(values / np.array([float(len(choice.encode("utf-8"))) for choice in choices])))
    assert (int(np.argmax(values)), by_characters, by_bytes) == (2, 1, 0), "the three rules differ here"
    found = {name: answers(scores, [7] * 3, [f(choice) for choice in choices])[7] for name, f in NORMALISERS.items()}
    assert found["acc_norm"].best == found["acc_bytes"].best == 2
    assert found["acc_norm"].best_normalised == by_characters
    assert found["acc_bytes"].best_normalised == by_bytes


def test_accuracy_and_its_error():
    """Three of four: the standard error of the harness is the sample deviation over the root of the count."""
    right = np.array([1.0, 1.0, 0.0, 1.0])
    values = summary([example(1.0, 1, acc=bool(one)) for one in right], "exact")
    assert values["acc"] == 0.75
    assert values["acc_error"] == pytest.approx(right.std(ddof=1) / 2)


def test_choices_that_the_vocabulary_loses_are_counted():
    kept, lossy = (ScoredExample(1.0, 0.0, 1, 1, 1.0, {"acc": True}, lossy=count) for count in (0, 2))
    assert "lossy_choices" not in summary([kept, kept], "exact")
    assert summary([kept, lossy, lossy], "exact")["lossy_choices"] == 4


@pytest.mark.parametrize("choices", [["yes", ""], ["yes", []], ["yes", [""]], "ab", ["yes"], [1, 2]])
def test_a_choice_without_text_is_no_choice(choices):
    """It would have no tokens, cost nothing and always win; and a text is not a list of its letters."""
    record = Record([1], [2], 7, reference={"choices": choices, "answer": 0})
    with pytest.raises(ConfigError, match="the reference of example 7 is not a valid question"):
        _question(record)


def test_what_differs_from_training_is_said_and_a_network_without_mask_is_refused():
    masked = MaskedDiffusion()
    assert mismatches(ExactCount(), masked) == ()
    assert ["alignment" in line for line in mismatches(ExactCount(5, Shifted()), masked)] == [True]
    assert "visibility is full in training and causal here" in mismatches(ExactAutoregressive(), masked)
    assert mismatches(ExactAutoregressive(), Autoregressive()) == ()
    blocks = BlockDiffusion(block_size=3, first_block="target")
    full = mismatches(ExactCount(), blocks)
    assert any("visibility is blocks:3 in training and full here" in line for line in full)
    spread = mismatches(ExactCount(visibility="blocks:3"), blocks)
    assert ["the tokens before a noisy block are clean" in line for line in spread] == [True]
    assert mismatches(LeftToRight(visibility="blocks:3"), blocks) == ()
    assert mismatches(BlockNelbo(blocks), blocks) == ()
    examples = dataclasses.replace(blocks, first_block="example")
    assert any("example_blocks:3" in line for line in mismatches(LeftToRight(visibility="blocks:3"), examples))
    for objective in (Autoregressive(), UniformDiffusion()):
        with pytest.raises(ConfigError, match="trained without MASK"):
            mismatches(ExactCount(), objective)
