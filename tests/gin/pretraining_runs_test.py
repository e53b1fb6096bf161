"""The runs of gin/runs that pretrain on plain text as a paper does: what their data pipelines do to a piece."""

import numpy as np
import pytest

from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.data.pretraining import CausalLM, DenoiserMixture, RandomLength
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion


def run(name):
    return build_root(config.load([f"gin/runs/{name}.gin"]))


def test_llada_pretrains_on_pieces_of_which_one_in_a_hundred_has_a_random_length():
    built = run("llada_pretraining")
    assert isinstance(built.objective, MaskedDiffusion)
    assert built.data.pretraining == RandomLength(CausalLM(), share=0.01)
    (evaluation,) = built.evaluations
    assert evaluation.data.pretraining == CausalLM()


def test_ul2_pretrains_on_the_denoisers_of_the_paper():
    built = run("ul2_pretraining")
    assert built.objective == Autoregressive("prefix")
    assert built.data.pretraining == built.evaluations[0].data.pretraining == DenoiserMixture()


@pytest.mark.parametrize("name", ["llada_pretraining", "ul2_pretraining"])
def test_pieces_fit_the_rows_and_spans_the_sentinels(name):
    """The vocabulary of the embedded tasks has 32 sentinels, three of which are UL2's mode tokens."""
    data = run(name).data
    piece = data.converter.max_piece(data.pretraining)
    inputs, targets = data.pretraining.lengths(np.array([piece]))
    assert 60 < piece <= inputs[0] + targets[0] <= data.row_length
    spans = [
        part.counts(np.array([piece]))[1][0]
        for part in getattr(data.pretraining, "parts", ())
        if hasattr(part, "counts")
    ]
    assert max(spans, default=0) <= 32 - 3
