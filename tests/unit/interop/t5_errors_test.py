"""Errors of T5 checkpoints, and settings that their files do not determine alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.huggingface import load, save
from diffusion_lm.nn.transformer import TransformerSpec

BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


@pytest.fixture
def broken(tmp_path):
    """A function that copies a fixture, changes its config and its tensors, and returns the folder."""

    def make(name, change=lambda tensors: None, **config):
        folder = tmp_path / name
        shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
        values = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(values))
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def _error(path, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_bias_of_the_first_layer_is_missing(stack, broken):
    folder = broken("t5", lambda t: t.pop(f"{stack}.{BIAS}"))
    assert f"1 tensors of a t5 model are missing: {stack}.{BIAS}" in _error(folder)


def test_a_bias_with_another_number_of_buckets(broken):
    folder = broken("t5", relative_attention_num_buckets=16)
    assert f"'encoder.{BIAS}' has shape [8, 4], but config.json requires [16, 4]" in _error(folder)


def test_a_bias_in_every_layer_is_another_network(broken):
    name = f"encoder.{BIAS}".replace("block.0", "block.1")
    message = _error(broken("t5", lambda t: t.update({name: t[f"encoder.{BIAS}"]})))
    assert f"1 tensors do not belong to the t5 model of config.json: {name}" in message


def test_the_bias_of_cross_attention_is_ignored(broken):
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert load(broken("t5", lambda t: t.update({name: np.ones((8, 4), np.float32)}))).report.ignored == (name,)


def test_heads_of_another_size(broken):
    assert "SelfAttention.q.weight' has shape [24, 16], but config.json requires [16, 16]" in _error(
        broken("t5", d_kv=4)
    )


def test_a_gate_that_the_files_do_not_have(broken):
    message = _error(broken("t5", feed_forward_proj="gated-gelu"))
    assert "10 tensors of a t5 model are missing: encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in message
    message = _error(broken("t5_1_1", feed_forward_proj="relu"))
    assert "5 tensors of a t5 model are missing: encoder.block.0.layer.1.DenseReluDense.wi.weight" in message


def test_other_depths(broken):
    assert "are missing: decoder.block.3.layer.0.layer_norm.weight" in _error(broken("t5", num_decoder_layers=4))
    # Files without the field mean as many layers as in the encoder.
    assert "do not belong to the t5 model of config.json: decoder.block.2.layer.0" in _error(
        broken("t5", num_decoder_layers=None)
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = False"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"architectures": ["T5EncoderModel"]}, "has no language model head"),
        ({"model_type": "mt6"}, "is not a known family; did you mean mt5"),
        ({"tie_word_embeddings": False}, "scale_decoder_outputs = True"),
    ],
)
def test_configs_that_this_network_cannot_have(changes, complaint, broken):
    message = _error(broken("t5", **changes))
    assert complaint in message
    assert "config.json" in message


def test_tied_heads_may_be_there_twice_but_not_differ(broken):
    def double(tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()

    folder = broken("t5", double)
    assert load(folder).report.ignored == ("lm_head.weight",)
    folder = broken("t5", lambda t: [double(t), t["lm_head.weight"].__setitem__((5, 3), 9.0)])
    assert "'lm_head.weight' differs from 'shared.weight', but config.json ties them" in _error(folder)


def test_the_embeddings_of_both_streams_are_one_array(broken):
    name = "decoder.embed_tokens.weight"
    folder = broken("t5_1_1", lambda t: t.update({name: t["shared.weight"].copy()}))
    assert load(folder).report.ignored == (name,)
    assert not load(folder).architecture.spec.tied_embeddings
    folder = broken("t5_1_1", lambda t: t.update({name: t["shared.weight"] + 1}))
    assert f"'{name}' differs from 'shared.weight', but a t5 model has one parameter for both" in _error(folder)


def test_files_may_have_only_the_embedding_of_one_stack(broken):
    before = load(FOLDER / "t5_1_1").params["embed"]["tokens"]
    folder = broken("t5_1_1", lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    np.testing.assert_array_equal(load(folder).params["embed"]["tokens"], before)


@pytest.mark.parametrize("name", ["t5_1_1", "mt5"])
def test_config_or_tensors_determine_whether_the_head_is_tied(name, broken):
    """config.json does in files of transformers 4. Version 5 declares every T5 tied, so the tensors do in its files."""
    source = load(FOLDER / name)
    assert not source.architecture.spec.tied_embeddings
    says_5 = {"tie_word_embeddings": True, "scale_decoder_outputs": False, "transformers_version": "5.23.0"}
    assert load(broken(name, **says_5)).architecture == source.architecture
    by_4 = {"scale_decoder_outputs": None, "transformers_version": "4.57.0"}
    assert load(broken(name, **by_4, tie_word_embeddings=False)).architecture == source.architecture
    assert "differs from 'shared.weight', but config.json ties" in _error(
        broken(name, **by_4, tie_word_embeddings=True)
    )
    message = _error(broken(name, lambda t: t.pop("lm_head.weight"), **by_4, tie_word_embeddings=False))
    assert "are missing: lm_head.weight" in message


def test_logits_are_scaled_where_the_version_that_wrote_the_file_scales_them(broken):
    def scale(name, **config):
        return load(broken(name, lambda t: t.pop("lm_head.weight"), **config)).architecture.spec.logit_scale

    tied = {"tie_word_embeddings": True}
    assert scale("t5_1_1", **tied, scale_decoder_outputs=None, transformers_version=None) == 16**-0.5
    assert scale("t5_1_1", **tied, scale_decoder_outputs=False, transformers_version="5.1.0") == 1
    assert scale("mt5", **tied, transformers_version="4.2.0") == 16**-0.5
    assert scale("mt5", **tied, transformers_version="5.0.0.dev0") == 1


def test_an_umt5_with_a_separate_head(broken):
    """The published files, by transformers 4, do not scale their logits; transformers 5 would."""

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"] + 1

    spec = load(broken("umt5", add_head, tie_word_embeddings=False, transformers_version="4.31.0")).architecture.spec
    assert (spec.tied_embeddings, spec.logit_scale, spec.relative_per_layer) == (False, 1, True)
    assert "transformers 5 scales the logits of an umT5" in _error(broken("umt5", add_head))


def test_a_layer_of_umt5_without_its_bias(broken):
    name = f"decoder.{BIAS}".replace("block.0", "block.2")
    assert f"1 tensors of a umt5 model are missing: {name}" in _error(broken("umt5", lambda t: t.pop(name)))


def test_export_refuses_networks_that_transformers_computes_differently(tmp_path):
    shape = dict(vocab_size=11, num_layers=1, model_dim=8, num_heads=2, head_dim=3, mlp_dim=8, encoder_layers=1)
    ours = TransformerSpec(**shape, relative_max_distance=40)

    def error(spec, family="t5"):
        model = EncoderDecoder(spec) if spec.encoder_layers else SingleStream(spec)
        with pytest.raises(ConfigError) as caught:
            save(tmp_path / "out", model, model.init(jax.random.key(0)), family=family)
        return str(caught.value)

    # Ours tell future distances apart in the decoder too.
    assert "relative_bidirectional = True, not False" in error(ours)
    assert "no family has networks of this shape" in error(ours, family=None)
    causal = dataclasses.replace(ours, relative_bidirectional=False)
    assert "transformers 4 scales the logits of an mT5" in error(causal, family="mt5")
    own = dataclasses.replace(causal, relative_per_layer=True)
    assert "relative_per_layer = True, not False" in error(own)
    untied = dataclasses.replace(own, tied_embeddings=False)
    assert "transformers 5 scales the logits of an umT5 with a separate head" in error(untied, family="umt5")
    assert "tied_logit_scale" in error(dataclasses.replace(causal, tied_logit_scale=False))
    assert "num_layers = 0" in error(dataclasses.replace(causal, encoder_layers=0))
    assert not list(tmp_path.iterdir())
    model = EncoderDecoder(causal)
    assert save(tmp_path / "out", model, model.init(jax.random.key(0))) == "t5"
    read = load(tmp_path / "out").architecture.spec
    assert read.relative_max_distance == 40
