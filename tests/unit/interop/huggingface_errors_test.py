"""Errors about a checkpoint name the tensor and the file, and come before anything is read or written."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER

from diffusion_lm.architectures.exponents import WithTokenSchedules
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.huggingface import Specials, find_specials, load, save


class Folder:
    """A copy of a fixture to break."""

    def __init__(self, root, name="llama"):
        self.path = root / name
        shutil.copytree(FOLDER / name, self.path)

    def config(self, **changes):
        path = self.path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def weights(self, change):
        path = self.path / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

    def shards(self, drop=()):
        """Two shards with an index instead of the one file."""
        whole = self.path / "model.safetensors"
        tensors = safetensors.numpy.load_file(whole)
        whole.unlink()
        places = {}
        for number, part in enumerate((sorted(tensors)[:9], sorted(tensors)[9:])):
            file = f"model-{number}.safetensors"
            safetensors.numpy.save_file({n: tensors[n] for n in part if n not in drop}, self.path / file)
            places |= dict.fromkeys(part, file)
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def _error(path, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **options)
    return str(caught.value)


def test_no_checkpoint_at_all(tmp_path):
    assert "there is no config.json" in _error(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in _error(tmp_path)


def test_no_weights(folder):
    (folder.path / "model.safetensors").unlink()
    assert "there are no weights" in _error(folder.path)


@pytest.mark.parametrize("size", [4, 200, -1])
def test_a_truncated_file(folder, size):
    file = folder.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    message = _error(folder.path)
    assert "model.safetensors is cut off or damaged" in message
    assert str(file) in message


def test_shards_are_read_and_a_missing_one_is_named(folder, tmp_path):
    whole = load(folder.path).params
    folder.shards()
    np.testing.assert_array_equal(load(folder.path).params["blocks"]["mlp"]["up"], whole["blocks"]["mlp"]["up"])
    (folder.path / "model-1.safetensors").unlink()
    message = _error(folder.path)
    assert "the shard model-1.safetensors is missing" in message
    assert "model.layers" in message


def test_a_shard_without_a_tensor_that_the_index_promises(folder):
    folder.shards(drop=("model.norm.weight",))
    assert "tensor 'model.norm.weight' is not in model-1.safetensors" in _error(folder.path)


def test_a_wrong_shape_names_tensor_and_file(folder):
    folder.weights(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((24, 15), np.float32)}))
    message = _error(folder.path)
    assert "'model.layers.1.mlp.up_proj.weight' has shape [24, 15], but config.json requires [24, 16]" in message
    assert str(folder.path / "model.safetensors") in message


def test_a_vocabulary_of_another_size(folder):
    folder.config(vocab_size=44)
    assert "'model.embed_tokens.weight' has shape [43, 16], but config.json requires [44, 16]" in _error(folder.path)


def test_a_missing_tensor(folder):
    folder.weights(lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    message = _error(folder.path)
    assert "1 tensors of a llama model are missing: model.layers.1.self_attn.k_proj.weight" in message
    # One layer of several is a broken file also where missing parts may be fresh.
    assert "model.layers.1.self_attn.k_proj.weight" in _error(folder.path, fresh_missing=True)


def test_leftover_tensors_are_refused_and_known_ones_ignored(folder):
    folder.weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))
    assert load(folder.path).report.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    folder.weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}))
    message = _error(folder.path)
    assert "1 tensors do not belong to the llama model of config.json: model.layers.0.self_attn.q_proj.bias" in message
    assert "did you mean" in message


def test_gpt2_masks_are_ignored(tmp_path):
    folder = Folder(tmp_path, "gpt2")
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    folder.weights(lambda t: t.update(masks))
    assert load(folder.path).report.ignored == tuple(masks)


def test_tied_weights_may_be_there_twice_but_not_differ(tmp_path):
    folder = Folder(tmp_path, "gpt2")
    folder.weights(lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()}))
    assert load(folder.path).report.ignored == ("lm_head.weight",)
    folder.weights(lambda t: t["lm_head.weight"].__setitem__((5, 3), 9.0))
    assert "'lm_head.weight' differs from 'transformer.wte.weight', but config.json ties them" in _error(folder.path)


def test_tied_weights_may_be_there_under_the_other_name(tmp_path):
    folder = Folder(tmp_path, "gpt2")
    before = load(folder.path).params["embed"]["tokens"]
    folder.weights(lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    np.testing.assert_array_equal(load(folder.path).params["embed"]["tokens"], before)


def test_untied_weights_are_not_filled_in_from_each_other(folder):
    folder.weights(lambda t: t.pop("lm_head.weight"))
    assert "1 tensors of a llama model are missing: lm_head.weight" in _error(folder.path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "lama"}, "is not a known family; did you mean llama"),
        ({"model_type": "mixtral"}, "mixture of experts (model_type = 'mixtral'"),
        ({"num_local_experts": 8}, "mixture of experts (model_type = 'llama', num_local_experts = 8)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "has no language model head"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_routed_experts": 64}, "mixture of experts (model_type = 'llama', n_routed_experts = 64)"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": None}, "the key 'hidden_size' is missing"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "the key 'factor' of RoPE is missing"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": None},
            "the key 'max_position_embeddings' is missing",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "the key 'low_freq_factor' of RoPE is missing"),
    ],
)
def test_configs_that_this_network_cannot_have(changes, complaint, folder):
    folder.config(**changes)
    message = _error(folder.path)
    assert complaint in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("name", "field", "value", "kind"),
    [
        ("llama", "num_attention_heads", 0, "a whole number above 0"),
        ("llama", "num_key_value_heads", "4", "a whole number above 0"),
        ("llama", "hidden_size", True, "a whole number above 0"),
        ("llama", "rms_norm_eps", "1e-5", "a number above 0"),
        ("llama", "model_type", ["llama"], "a string"),
        ("llama", "architectures", "LlamaForCausalLM", "a list of strings"),
        ("llama", "rope_parameters", [1], "an object"),
        ("gemma3", "query_pre_attn_scalar", -1, "a number above 0"),
        ("gemma3", "sliding_window", 4.5, "a whole number"),
        ("modernbert", "layer_types", 3, "a list of strings"),
        ("modernbert", "hidden_activation", {}, "a string"),
        ("t5", "num_decoder_layers", [2], "a whole number from 1 to 10,000"),
        ("gpt2", "n_head", None, None),
    ],
)
def test_values_of_another_kind(name, field, value, kind, tmp_path):
    """Such a file is damaged, or of a network with sizes that differ from layer to layer."""
    folder = Folder(tmp_path, name)
    folder.config(**{field: value})
    expected = f"the key {field!r} is missing" if kind is None else f"{field} = {value!r} must be {kind}"
    assert expected in _error(folder.path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_damaged_index_is_refused(content, folder):
    folder.shards()
    (folder.path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is not an index of shards" in _error(folder.path)


def test_an_index_may_only_name_files_of_its_folder(folder, tmp_path):
    folder.shards()
    index = folder.path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] | {"model.norm.weight": "../other.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    assert "names '../other.safetensors', which is outside of the folder" in _error(folder.path)


def test_encoders_with_an_untied_head_are_refused(tmp_path):
    folder = Folder(tmp_path, "roberta")
    folder.config(tie_word_embeddings=False)
    assert "tie_word_embeddings = False" in _error(folder.path)


def test_older_and_newer_configs_of_modernbert_give_the_same_network(tmp_path):
    folder = Folder(tmp_path, "modernbert")
    before = load(folder.path).architecture
    assert before.spec.window_layers == (1, 2)
    assert before.spec.window == 3
    older = {"global_attn_every_n_layers": 3, "global_rope_theta": 300.0, "local_rope_theta": 20.0}
    folder.config(layer_types=None, rope_parameters=None, **older)
    assert load(folder.path).architecture == before
    folder.config(norm_bias=True)
    assert "norm_bias = True" in _error(folder.path)
    folder.config(norm_bias=False, classifier_activation="gelu_new")
    assert "classifier_activation = 'gelu_new'" in _error(folder.path)


def test_the_first_layer_of_modernbert_has_no_norm(tmp_path):
    folder = Folder(tmp_path, "modernbert")
    folder.weights(lambda t: t.update({"model.layers.0.attn_norm.weight": np.ones(16, np.float32)}))
    assert "tensors do not belong to the modernbert model" in _error(folder.path)
    folder = Folder(tmp_path / "other", "modernbert")
    folder.weights(lambda t: t.pop("model.layers.1.attn_norm.weight"))
    assert "are missing: model.layers.1.attn_norm.weight" in _error(folder.path)


def test_quantised_tensors_are_refused(folder):
    folder.weights(lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    assert "'model.norm.weight' does not hold floats" in _error(folder.path)


def test_a_missing_head_can_be_initialised(tmp_path):
    folder = Folder(tmp_path, "roberta")
    folder.weights(lambda t: [t.pop(name) for name in list(t) if name.startswith("lm_head")])
    assert "5 tensors of a roberta model are missing: lm_head.dense.weight" in _error(folder.path)
    imported = load(folder.path, fresh_missing=True)
    assert imported.report.missing == tuple(
        f"head/{name}" for name in ("transform/dense", "transform/dense_bias", "transform/norm/scale",
                                     "transform/norm/bias", "bias")
    )  # fmt: skip
    fresh = imported.architecture.abstract_params()["head"]["transform"]["dense"]
    found = np.asarray(imported.params["head"]["transform"]["dense"])
    assert found.shape == fresh.shape
    assert 0.5 < found.std() * 4 < 2


def test_token_types_are_folded_into_the_positions():
    tensors = safetensors.numpy.load_file(FOLDER / "roberta" / "model.safetensors")
    types = tensors["roberta.embeddings.token_type_embeddings.weight"]
    assert np.abs(types[0] - types[1]).max() > 0.1
    expected = tensors["roberta.embeddings.position_embeddings.weight"] + types[0]
    np.testing.assert_array_equal(load(FOLDER / "roberta").params["positions"], expected)


def test_specials_come_from_both_files():
    assert find_specials({"pad_token_id": 3, "eos_token_id": 1}, {"eos_token_id": [7, 8], "mask_token_id": 0}) == (
        Specials(pad_id=3, eos_ids=(7, 8), mask_id=0)
    )


def test_the_host_holds_little_more_than_the_largest_array(tmp_path, monkeypatch):
    """By the count of the reader, which agrees with what Python and numpy allocate."""
    import tracemalloc

    from diffusion_lm.interop import assemble

    source = load(FOLDER / "llama")
    largest = source.report.largest_array
    assert largest <= source.report.peak_host <= 2 * largest
    big = Folder(tmp_path)
    big.config(vocab_size=40_000)
    rows = np.ones((40_000, 16), np.float32)
    big.weights(lambda t: t.update({"lm_head.weight": rows, "model.embed_tokens.weight": rows}))
    monkeypatch.setattr(assemble, "SLICE_BYTES", 1 << 16)
    load(big.path)  # compiles and imports what it needs
    tracemalloc.start()
    report = load(big.path).report
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.largest_array == rows.nbytes + 64 * 16 * 4  # padded to a multiple of 128 rows
    assert report.peak_host <= report.largest_array + (1 << 16)
    # On a CPU the devices' memory is the host's, and an array may be the buffer it came from: two arrays at most.
    assert peak < 2.2 * report.largest_array


def test_export_refuses_other_families_and_taken_folders(tmp_path):
    source = load(FOLDER / "llama")
    with pytest.raises(ConfigError, match="family qwen3 does not have this network: qk_norm = False, not True"):
        save(tmp_path / "a", source.architecture, source.params, family="qwen3")
    with pytest.raises(ConfigError, match="no family 'lama'; did you mean llama"):
        save(tmp_path / "a", source.architecture, source.params, family="lama")
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(ConfigError, match="already exists"):
        save(tmp_path / "taken", source.architecture, source.params)


def test_export_refuses_additions_to_a_network(tmp_path):
    source = load(FOLDER / "llama")
    extended = WithTokenSchedules(source.architecture)
    with pytest.raises(ConfigError, match="the family llama has no tensors for exponents"):
        save(tmp_path / "a", extended, extended.init(jax.random.key(0)))
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_network_with_time_conditioning(tmp_path):
    plain = load(FOLDER / "llama").architecture
    timed = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, time_conditioning=True))
    with pytest.raises(ConfigError, match="time_conditioning = True"):
        save(tmp_path / "a", timed, timed.init(jax.random.key(0)))
    assert not list(tmp_path.iterdir())


def test_export_in_shards(tmp_path):
    source = load(FOLDER / "llama")
    save(tmp_path / "out", source.architecture, source.params, shard_bytes=5000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again = load(tmp_path / "out")
    np.testing.assert_array_equal(again.params["blocks"]["mlp"]["up"], source.params["blocks"]["mlp"]["up"])
