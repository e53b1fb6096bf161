"""`diffusion-lm bench` in this process, with a tiny network and two rounds: tables and JSON. No test asserts a time."""

import json

import pytest

from diffusion_lm.cli.main import main

TINY = [
    *("--gin.TransformerSpec.num_layers=1", "--gin.TransformerSpec.model_dim=16", "--gin.TransformerSpec.num_heads=2"),
    *("--gin.TransformerSpec.head_dim=8", "--gin.TransformerSpec.mlp_dim=16", "--gin.VOCAB_SIZE=64"),
]
TINY_ROWS = [*TINY, "--gin.TARGET_LENGTH=7", "--gin.TransformerSpec.vocab_multiple=8"]


def bench(capsys, tmp_path, *arguments):
    path = tmp_path / "bench.json"
    code = main(["bench", *arguments, "--json", str(path)])
    captured = capsys.readouterr()
    return code, captured, json.loads(path.read_text()) if path.exists() else None


def test_train_has_a_row_with_all_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", *TINY_ROWS, "--rounds", "2", "--steps", "2", "--batch_size", "2")
    code, captured, result = bench(capsys, tmp_path, *arguments)
    assert code == 0, captured.err
    (row,) = result["rows"]
    assert result["kind"] == "train"
    assert row["seconds"]["count"] == len(row["rounds"]) == 2
    assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["seconds"]["median"])
    facts = result["facts"]
    assert (facts["batch_size"], facts["row_length"], facts["scored_per_row"]) == (2, 8, 7)
    assert row["mfu"] == pytest.approx(facts["flops_per_step"] / row["seconds"]["median"] / facts["peak_flops"])
    assert row["peak_memory"] > 0
    assert row["first_call_seconds"] > 0
    assert set(result["load_average"]) == {"before", "after"}
    for heading in ("ms/step", "tokens/s", "MFU", "memory", "first call"):
        assert heading in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"], "no run folder is written"


def test_train_with_zero_rounds_only_takes_the_first_step(capsys, tmp_path):
    code, captured, result = bench(capsys, tmp_path, "train", *TINY_ROWS, "--rounds", "0", "--batch_size", "2")
    assert code == 0, captured.err
    assert result["rows"][0]["seconds"] is None
    assert result["facts"]["first_loss"] == pytest.approx(4.16, abs=0.5), "ln 64"


def test_decode_times_all_arms_of_the_study_and_counts_forward_passes(capsys, tmp_path):
    arguments = ("decode", *TINY, "--rounds", "2", "--target_length", "4", "--prompt_length", "3")
    code, captured, result = bench(capsys, tmp_path, *arguments, "--gin.masked_16/MaskedSampler.steps=2")
    assert code == 0, captured.err
    (study,) = result["lengths"]
    assert (study["length"], study["prompt_length"], study["batch_size"]) == (4, 3, 1)
    passes = {row["label"]: row["forward_passes"] for row in study["rows"]}
    assert passes["AR, greedy"] == passes["AR, temperature 1"] == 4
    assert passes["masked, 16 steps"] == 2
    for row in study["rows"]:
        assert row["seconds_per_completion"] == row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(4 / row["seconds"]["median"])
        assert row["ratio"]["count"] == 2
    assert study["rows"][0]["ratio"]["median"] == 1.0, "the first row is the baseline"
    assert max(map(len, captured.out.splitlines())) <= 100


@pytest.mark.thorough
def test_decode_accepts_a_network_and_several_samplers(capsys, tmp_path):
    (tmp_path / "net.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "include 'models/decoder_only.gin'\ninclude 'models/sizes/nano.gin'\nVOCAB_SIZE = 64\n"
    )
    network = ("--gin_file", str(tmp_path / "net.gin"), "--rounds", "1", "--batch_size", "2", "--target_length", "4")
    samplers = ("--sampler", "gin/samplers/greedy.gin", "--sampler", "gin/samplers/sundae.gin")
    code, captured, result = bench(capsys, tmp_path, "decode", *network, *samplers)
    assert code == 0, captured.err
    rows = {row["label"]: row for row in result["lengths"][0]["rows"]}
    assert set(rows) == {"greedy", "sundae"}
    assert rows["greedy"]["forward_passes"] == 4, "it may not stop early"
    assert rows["greedy"]["seconds_per_completion"] == rows["greedy"]["seconds"]["median"] / 2
    code, captured, _ = bench(capsys, tmp_path, "decode", *network)
    assert code == 2
    assert "no --sampler is given" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--sampler", "gin/samplers/greedy.gin"], "bench data does not accept --sampler"),
        (["startup", "--against", "torch"], "bench startup does not accept --against"),
        (["train", "--torch_python", "python"], "Add --against torch"),
        (["decode", "--rounds", "0"], "rounds=0: must be >= 1 (--rounds)"),
        (["train", "--against", "torch", "--rounds", "0"], "rounds=0: must be >= 1"),
        (["train", "--steps", "0"], "steps=0: must be >= 1"),
        (["decode", *["--sampler", "gin/samplers/greedy.gin"] * 2], "the same sampler file is given twice"),
        (
            ["train", "--against", "torch", "--torch_python", "/no/such/python", *TINY_ROWS],
            "cannot run /no/such/python",
        ),
        (["train", "--against", "torch", "--gin.TransformerSpec.dtype=bfloat16"], "dtype='bfloat16', param_dtype="),
        (
            ["train", "--against", "torch", "--gin.TransformerSpec.norm=rmsnorm"],
            "transformers has no model of",
        ),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
