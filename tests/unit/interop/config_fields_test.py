"""Keys of config.json that change the network are read as transformers reads them, refused, or reported."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from diffusion_cases import FOLDER as DIFFUSION
from huggingface_cases import FOLDER

from diffusion_lm.cli.main import main
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.huggingface import describe, load
from diffusion_lm.interop.name_maps import FAMILIES
from diffusion_lm.interop.name_maps.config_checks import IGNORED_KEYS, UNSUPPORTED_KEYS, unread_keys
from diffusion_lm.nn.rope import LinearRope, YarnRope

LINEAR = {"rope_type": "linear", "factor": 2.0}
SLIDING, FULL = "sliding_attention", "full_attention"


def _folder(tmp_path, name, drop=(), **changes):
    """A copy of a fixture with other values in config.json."""
    root = FOLDER if (FOLDER / name).is_dir() else DIFFUSION
    target = tmp_path / "in"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / name, target, ignore=shutil.ignore_patterns("golden*"))
    values = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in drop}))
    return target


def _refusal(*args, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        describe(_folder(*args, **changes))
    return str(caught.value)


def test_rope_scaling_takes_precedence_over_rope_parameters_as_in_transformers(tmp_path):
    """`self.rope_parameters = rope_scaling or self.rope_parameters`; without a theta, the top-level one or 10,000."""
    parameters = {"rope_type": "default", "rope_theta": 300.0}
    read = describe(_folder(tmp_path, "llama", rope_parameters=parameters, rope_scaling=LINEAR))
    assert (read.spec.rope_theta, read.spec.rope_scaling) == (10000.0, LinearRope(2.0))
    assert "rope_scaling {'rope_type': 'linear', 'factor': 2.0} with rope_theta 10000 is used" in read.config.notes[0]
    read = describe(_folder(tmp_path, "llama", rope_parameters=parameters, rope_scaling=LINEAR, rope_theta=50.0))
    assert (read.spec.rope_theta, read.spec.rope_scaling) == (50.0, LinearRope(2.0))
    read = describe(_folder(tmp_path, "llama", rope_parameters=parameters, rope_scaling=LINEAR | {"rope_theta": 7.0}))
    assert (read.spec.rope_theta, read.spec.rope_scaling) == (7.0, LinearRope(2.0))
    # No note where both give the same RoPE.
    both = describe(_folder(tmp_path, "llama", rope_parameters=LINEAR, rope_scaling=LINEAR))
    assert both.config.notes == []


def test_rope_by_type_of_layer(tmp_path):
    """Gemma 3's class adds `rope_scaling` to the layers with full attention, ModernBERT's to all layers."""
    given = {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "default"}}
    read = describe(_folder(tmp_path, "gemma3", rope_parameters=given, rope_scaling=LINEAR, rope_local_base_freq=9.0))
    spec = read.spec
    assert (spec.rope_theta, spec.window_rope_theta, spec.rope_scaling) == (1e6, 9.0, LinearRope(2.0))
    assert "layers with a window" in _refusal(tmp_path, "modernbert", rope_parameters=given, rope_scaling=LINEAR)
    # transformers ignores parameters that are not given per type of layer.
    for name in ("gemma3", "modernbert"):
        assert "not 'rope_type'" in _refusal(tmp_path, name, rope_parameters=LINEAR)
        legacy = {"type": "linear", "factor": 2.0}
        assert "versions differ" in _refusal(tmp_path, name, rope_parameters=None, rope_scaling=legacy)


def test_the_original_length_of_yarn_is_given_once(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    outside = describe(_folder(tmp_path, "llama", rope_parameters=yarn, original_max_position_embeddings=16))
    assert outside.spec.rope_scaling == YarnRope(4.0, original_max_positions=16)
    twice = {"rope_parameters": yarn | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 16}
    assert "original_max_position_embeddings = 16 at the top level and 32 in the parameters of RoPE" in _refusal(
        tmp_path, "llama", **twice
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": [1, 2]},
        {"rope_type": "linear", "factor": "x"},
        {"rope_type": "linear", "factor": True},
        {"rope_type": "linear", "factor": -1.0},
        {"rope_type": "default", "rope_theta": "abc"},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "partial_rotary_factor": "1"},
        {"rope_type": ["linear"], "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "1", "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": [4.0]},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": "8192"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16.5},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"},
        {"rope_type": "yarn", "factor": 4.0, "beta_slow": {}},
        {"rope_type": "yarn", "factor": 4.0, "mscale": "x", "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "truncate": "no"},
        {"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]},
        {"rope_type": "default", "mrope_section": [1, 1]},
    ],
)  # fmt: skip
def test_values_of_rope_parameters_are_checked_by_type(parameters, tmp_path):
    assert "config.json: " in _refusal(tmp_path, "llama", rope_parameters=parameters)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2_some_windows", "qwen3", "gemma2", "gemma3",
                                  "modernbert", "dream", "sdar"])  # fmt: skip
def test_layer_types_of_other_types_or_another_length_are_refused(name, tmp_path):
    layers = describe(_folder(tmp_path, name)).spec.num_layers
    for kind in ("chunked_attention", "linear_attention", "conv"):
        said = _refusal(tmp_path, name, layer_types=[FULL] * (layers - 1) + [kind])
        assert f"layer_types = {kind!r} of layer {layers - 1} is not supported" in said
    for length in (layers - 1, layers + 1):
        assert f"layer_types has {length} entries for {layers} layers" in _refusal(
            tmp_path, name, layer_types=[FULL] * length
        )


def test_contradictory_windows_are_refused(tmp_path):
    assert "no sliding window" in _refusal(tmp_path, "llama", layer_types=[FULL, SLIDING])
    assert "in all layers or in none" in _refusal(tmp_path, "mistral_window", layer_types=[FULL, SLIDING])
    said = _refusal(tmp_path, "qwen2_some_windows", use_sliding_window=False)
    assert "layer_types gives layer 1 a sliding window, but sliding_window is not enabled" in said
    assert "sliding_window is not enabled" in _refusal(tmp_path, "gemma2", sliding_window=None)
    assert "sliding_window_pattern = 3" in _refusal(tmp_path, "gemma2", sliding_window_pattern=3)


def test_absent_keys_take_the_default_of_the_class_and_null_is_off(tmp_path):
    """Defaults of the classes in transformers 5.23."""
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    spec = describe(_folder(tmp_path, "gemma2", drop=caps)).spec
    assert (spec.attention_softcap, spec.logit_softcap) == (50.0, 30.0)
    spec = describe(_folder(tmp_path, "gemma2", **dict.fromkeys(caps))).spec
    assert (spec.attention_softcap, spec.logit_softcap) == (None, None)
    assert describe(_folder(tmp_path, "mistral_window", drop=["sliding_window"])).spec.window == 4096
    assert describe(_folder(tmp_path, "mistral_window", sliding_window=None)).spec.window is None
    old = ("layer_types", "max_window_layers", "sliding_window")
    spec = describe(_folder(tmp_path, "qwen2_some_windows", drop=old, use_sliding_window=True)).spec
    assert (spec.window, spec.window_layers) == (None, None)  # from layer 28 on
    spec = describe(_folder(tmp_path, "qwen2_some_windows", drop=old[::2], max_window_layers=1)).spec
    assert (spec.window, spec.window_layers) == (4096, (1,))
    assert describe(_folder(tmp_path, "xlm_roberta_xl", drop=["layer_norm_eps"])).spec.norm_eps == 1e-5
    assert describe(_folder(tmp_path, "roberta", drop=["layer_norm_eps"])).spec.norm_eps == 1e-12


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "embedding_multiplier", 12.0),
        ("llama", "attention_multiplier", 0.0156),
        ("llama", "residual_multiplier", 0.22),
        ("llama", "logits_scaling", 8.0),
        ("llama", "sliding_window", 4096),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "use_qk_norm", True),
        ("llama", "clip_qkv", 8.0),
        ("llama", "attention_chunk_size", 8192),
        ("llama", "no_rope_layers", [1, 0]),
        ("llama", "partial_rotary_factor", 0.5),
        ("qwen2_some_windows", "scale_depth", 1.4),
        ("qwen3", "moe_intermediate_size", 8),
        ("gemma2", "attention_multiplier", 1.0),
        ("gpt2", "rotary_dim", 4),
        ("gpt2", "use_parallel_residual", True),
        ("bert", "rope_scaling", LINEAR),
        ("modernbert", "sliding_window", 4),
        ("t5", "layer_types", [SLIDING]),
        ("llada", "logit_scale", 2.0),
        ("dream", "use_mrope", True),
    ],
)
def test_keys_that_change_networks_of_other_families_are_refused(name, field, value, tmp_path):
    assert f"{field} = {value!r}" in _refusal(tmp_path, name, **{field: value})
    assert describe(_folder(tmp_path, name, **{field: None})).unread == ()


def test_neutral_values_of_such_keys_are_accepted(tmp_path):
    neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1, "clip_qkv": False, "use_qk_norm": False}
    assert describe(_folder(tmp_path, "llama", **neutral)).unread == ()
    assert describe(_folder(tmp_path, "llama", layer_types=[FULL, FULL])).unread == ()


def test_unknown_keys_are_reported(tmp_path, capsys):
    folder = _folder(tmp_path, "llama", wave_gain=3, another_thing={"a": 1}, nothing=None)
    assert describe(folder).unread == ("another_thing", "wave_gain")
    assert main(["import", str(folder), "--workdir", str(tmp_path / "run")]) == 0
    assert "another_thing, wave_gain" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "import.json").read_text())["report"]
    assert report["unread_fields"] == ["another_thing", "wave_gain"]


FIXTURES = [path.name for root in (FOLDER, DIFFUSION) for path in sorted(root.iterdir()) if path.is_dir()]


@pytest.mark.parametrize("name", FIXTURES)
def test_every_key_that_transformers_writes_is_known(name):
    assert describe(_fixture(name)).unread == ()


def _fixture(name):
    return (FOLDER if (FOLDER / name).is_dir() else DIFFUSION) / name


# Read before the family is known: `family_of`, `find_specials`, and `trained_as` for MASK.
COMMON = {"architectures", "model_type", "transformers_version", "quantization_config", "diffusion_lm"}
COMMON |= {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "pad_token_id", "mask_token_id"}
# Keys that only some configs lead to, here of networks that no fixture has.
CONDITIONAL = {"vocab_size", "mlp_ratio", "type_vocab_size", "original_max_position_embeddings"}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_family_declares_the_keys_that_it_reads(name):
    read = describe(_fixture(name))
    declared = {key.name for key in read.family.keys}
    assert read.config.read - declared <= COMMON
    assert declared - read.config.read <= CONDITIONAL


def test_a_key_is_declared_alike_by_all_families():
    """Types are checked before the family is known, so a key cannot have two."""
    declared = {key.name: key for family in FAMILIES for key in family.keys}
    assert all(key == declared[key.name] for family in FAMILIES for key in family.keys)
    refused = {name for name, key in declared.items() if key.is_neutral}
    assert not refused & set(UNSUPPORTED_KEYS)
    assert [name for name in (*refused, *UNSUPPORTED_KEYS) if IGNORED_KEYS.fullmatch(name)] == []


# All keys that change a network of some family, with a value that changes nothing elsewhere (None: no such value). When
# this list was one table for all families, these were its keys and values.
NEUTRAL = {
    "layer_types": [FULL],
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window")),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention", "is_causal", "attention_sinks"), False),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "softcap")),
    **dict.fromkeys(("query_pre_attn_scalar", "attention_multiplier", "attn_scale", "softmax_scale")),
    **dict.fromkeys(("clip_qkv", "attn_temperature_tuning", "attention_scale", "logn_attn"), False),
    **dict.fromkeys(("use_logn_attn", "use_qk_norm", "qk_norm", "qk_layernorm", "use_attention_sinks"), False),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "scale_attention_softmax_in_fp32_only"), False),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "rope_ratio", "rotary_dim", "no_rope_layers")),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_percent"), 1.0),
    **dict.fromkeys(("alibi", "use_alibi", "use_mrope", "rope_interleave", "rope_interleaved"), False),
    "use_dynamic_ntk": False,
    "position_embedding_type": "absolute",
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1),
    **dict.fromkeys(("lm_head_multiplier", "key_multiplier", "attention_in_multiplier", "scale_emb"), 1),
    **dict.fromkeys(("attention_out_multiplier", "mup_width_scale", "width_scale", "embedding_scale"), 1),
    **dict.fromkeys(("scale_depth", "dim_model_base", "mup_base_width", "residual_scale", "mlp_multipliers")),
    **dict.fromkeys(("scale_embedding", "scale_logits", "normalize_embedding"), False),
    **dict.fromkeys(("apply_residual_connection_post", "apply_layernorm_1p"), False),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "parallel_block", "new_decoder_architecture"), False),
    **dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder"), False),
    **dict.fromkeys(("mlp_layer_types", "block_configs", "per_layer_config", "num_kv_shared_layers")),
    **dict.fromkeys(("moe_intermediate_size", "num_experts_per_tok", "kv_lora_rank", "q_lora_rank")),
    **dict.fromkeys(("layer_norm_type", "norm_type", "block_type", "mlp_type", "attention_type")),
    "pretraining_tp": 1,
}


def test_the_families_together_know_every_key_that_changes_a_network():
    declared = {key.name for family in FAMILIES for key in family.keys if key.is_neutral}
    assert declared | set(UNSUPPORTED_KEYS) == set(NEUTRAL)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_family_refuses_the_keys_that_change_networks_of_other_families(name):
    """Of every key that the family does not read: 2, true and a string are refused, neutral values are accepted."""
    read = describe(_fixture(name))
    for key in sorted(set(NEUTRAL) - read.config.read):
        for value in (2, True, "other"):
            with pytest.raises(ConfigError, match=f"{key} = "):
                unread_keys(read.config.replaced(**{key: value}), read.family)
        assert unread_keys(read.config.replaced(**{key: NEUTRAL[key]}), read.family) == ()
        assert unread_keys(read.config.replaced(**{key: None}), read.family) == ()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_config_json_is_json(value, tmp_path):
    folder = _folder(tmp_path, "llama")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", f'{{"anything": {value}, ', 1))
    with pytest.raises(ConfigError, match="is not JSON"):
        describe(folder)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert describe(folder).unread == ()
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        describe(folder)


def _tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_and_infinity_are_refused_with_the_tensor(value, dtype, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    folder = _folder(tmp_path, "llama")

    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][3, 3:5] = value

    _tensors(folder, change)
    for param_dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError, match=f"'{name}' holds 2 values that are NaN or infinite") as caught:
            load(folder, param_dtype=param_dtype)
        assert "model.safetensors" in str(caught.value)


def test_tied_copies_with_nan_are_equal_and_reported_by_name(tmp_path):
    folder = _folder(tmp_path, "gpt2")

    def change(tensors):
        tensors["transformer.wte.weight"][1, 1] = np.nan
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    _tensors(folder, change)
    with pytest.raises(ConfigError, match=r"'transformer\.wte\.weight' holds 1 values"):
        load(folder)


def test_values_that_overflow_float32_are_refused(tmp_path):
    folder = _folder(tmp_path, "llama")
    _tensors(folder, lambda t: t.update({"model.norm.weight": np.full(16, 1e60)}))
    with pytest.raises(ConfigError, match=r"'model\.norm\.weight' holds 16 values that are too large for float32"):
        load(folder)


def test_nothing_is_written_for_a_checkpoint_with_nan(tmp_path, capsys):
    folder = _folder(tmp_path, "sdar")
    name = next(iter(safetensors.numpy.load_file(folder / "model.safetensors")))
    _tensors(folder, lambda t: t[name].__setitem__(Ellipsis, np.nan))
    assert main(["import", str(folder), "--workdir", str(tmp_path / "run")]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _shards(folder, extra):
    """Two shards and an index; `extra` are further tensors of the second."""
    whole = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(whole)
    whole.unlink()
    parts = {"model-1.safetensors": sorted(tensors)[:9], "model-2.safetensors": sorted(tensors)[9:]}
    for file, names in parts.items():
        more = extra if file == "model-2.safetensors" else {}
        safetensors.numpy.save_file({name: tensors[name] for name in names} | more, folder / file)
    places = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sorted(tensors)[0], tensors


def test_the_index_is_the_list_of_what_is_read(tmp_path):
    """A stale copy in another shard and a tensor that no index names are listed, not read."""
    folder = _folder(tmp_path, "llama")
    first = sorted(safetensors.numpy.load_file(folder / "model.safetensors"))[0]
    assert first == "lm_head.weight"
    extra = {first: np.zeros((43, 16), np.float32), "model.layers.9.mlp.up_proj.weight": np.ones(3, np.float32)}
    wanted = load(folder).params["head"]["tokens"]
    _shards(folder, extra)
    imported = load(folder)
    np.testing.assert_array_equal(imported.params["head"]["tokens"], wanted)
    assert imported.report.ignored == tuple(f"{name} of model-2.safetensors" for name in sorted(extra))


def test_files_of_tensors_that_are_not_read_are_listed(tmp_path):
    folder = _folder(tmp_path, "llama")
    for name in ("optimizer.pt", "consolidated.00.pth", "model-00001-of-00002.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"")
    assert load(folder).report.unread_files == (
        *("consolidated.00.pth", "model-00001-of-00002.safetensors", "optimizer.pt"),
    )
