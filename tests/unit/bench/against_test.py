"""Checks before a comparison with PyTorch, and the order of measurements."""

import dataclasses

import pytest

from diffusion_lm.bench.against import _check_parameters, run_rounds, same_tokens
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.nn.transformer import TransformerSpec


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [
        ([[5, 6], [7, 8]], [[5, 6], [7, 8]], 1.0),
        ([[5, 6], [7, 8]], [[5, 9], [7, 8]], 0.75),
        ([[5, 6], [7, 8]], [[5, 6], [1, 1]], 1.0),
        ([[5, 6]], [[0, 6]], None),
    ],
)
def test_rows_with_forbidden_tokens_are_excluded(ours, theirs, share):
    assert same_tokens({"window": ours, "forbidden": [0, 1]}, theirs) == share


@pytest.mark.parametrize(("tied", "padding"), [(True, 4 * 8), (False, 2 * 4 * 8)])
def test_parameter_counts_are_equal_without_vocabulary_padding(tied, padding):
    spec = TransformerSpec(
        vocab_size=60, vocab_multiple=8, num_layers=1, model_dim=8, num_heads=1, head_dim=8, mlp_dim=8
    )
    spec = dataclasses.replace(spec, tied_embeddings=tied)
    _check_parameters(spec, 1000 + padding, 1000)
    with pytest.raises(ConfigError, match=r"has 1,001 parameters, but the one of transformers has 1,000"):
        _check_parameters(spec, 1001 + padding, 1000)


class Recorder:
    """Records the order in which two benchmarks are measured."""

    measured: list = []  # noqa: RUF012

    def __init__(self, *labels):
        self.labels = labels

    def measure(self, label, number):
        self.measured.append(label)
        return float(number)


def test_rounds_alternate_over_all_benchmarks_and_the_first_is_discarded():
    Recorder.measured = []
    assert run_rounds([Recorder("a"), Recorder("b", "c")], 2) == {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}
    assert Recorder.measured == ["a", "b", "c"] * 3
    Recorder.measured = []
    assert run_rounds([Recorder("a")], 0) == {"a": []}
    assert Recorder.measured == []
