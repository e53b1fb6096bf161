"""`bench --against torch` runs the same network in both frameworks. No test asserts a time."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from diffusion_lm.cli.main import main

TINY = [
    *("--gin.TransformerSpec.num_layers=2", "--gin.TransformerSpec.model_dim=16", "--gin.TransformerSpec.head_dim=8"),
    *("--gin.TransformerSpec.mlp_dim=32", "--gin.VOCAB_SIZE=60", "--gin.TransformerSpec.vocab_multiple=8"),
]


def bench(tmp_path, capsys, *arguments):
    path = tmp_path / "bench.json"
    assert main(["bench", *arguments, "--against", "torch", "--json", str(path)]) == 0, capsys.readouterr().err
    return json.loads(path.read_text()), capsys.readouterr().out


def test_the_training_steps_are_of_one_network(tmp_path, capsys):
    heads = "--gin.TransformerSpec.num_heads=2"
    rows = ("--gin.TARGET_LENGTH=7", "--batch_size", "2", "--rounds", "2", "--steps", "1")
    result, printed = bench(tmp_path, capsys, "train", *TINY, heads, *rows)
    assert [row["label"] for row in result["rows"]] == ["transformers", "diffusion_lm"]
    assert result["torch"]["model"] == "GPT2LMHeadModel"
    assert result["checks"]["first_loss_difference"] < 1e-5, "the same weights, tokens and loss"
    padding = (64 - 60) * 16
    assert result["checks"]["parameters"] == result["facts"]["parameters"] - padding
    ratio = result["ratios"]["diffusion_lm"]
    assert ratio["least"] <= ratio["low"] <= ratio["median"] <= ratio["high"] <= ratio["most"]
    assert "as fast as transformers" in printed


def test_a_masked_step_is_compared_with_the_autoregressive_one(tmp_path, capsys):
    heads = ("--gin.TransformerSpec.num_heads=2", "--gin.TransformerSpec.num_kv_heads=1")
    rows = ("--gin.TARGET_LENGTH=7", "--batch_size", "2", "--rounds", "1", "--steps", "1")
    file = ("--gin_file", "gin/bench/train_masked.gin")
    result, _ = bench(tmp_path, capsys, "train", *file, *TINY, *heads, *rows)
    assert result["torch"]["model"] == "Qwen3ForCausalLM"
    assert "first_loss_difference" not in result["checks"], "the two losses are not the same"


def test_greedy_decoding_gives_the_tokens_of_generate(tmp_path, capsys):
    heads = ("--gin.TransformerSpec.num_heads=2", "--gin.TransformerSpec.num_kv_heads=1")
    lengths = ("--target_length", "6", "--prompt_length", "5", "--batch_size", "3", "--rounds", "1")
    # Large embeddings make the logits differ by far more than rounding.
    result, _ = bench(
        tmp_path, capsys, "decode", *TINY, *heads, *lengths, "--gin.TransformerSpec.embedding_std=1.0",
        "--sampler", "gin/samplers/greedy.gin",
    )  # fmt: skip
    (study,) = result["lengths"]
    assert study["torch"]["model"] == "Qwen3ForCausalLM"
    assert [row["label"] for row in study["rows"]] == ["transformers", "greedy"]
    assert study["checks"]["same_tokens"] == {"greedy": 1.0}
