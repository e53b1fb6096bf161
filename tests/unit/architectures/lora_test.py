"""Low-rank adapters: what they add to a network, what merging makes of them, and what must not get lost (T58)."""

import functools

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.length_head import WithLengthHead
from diffusion_lm.architectures.lora import TARGETS, WithLoRA, merge
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn.masks import Full
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.training.transfer import transfer

pytestmark = pytest.mark.thorough

ROPE = {"num_kv_heads": 1, "position": "rope", "mlp": "swiglu", "attention_scale": "inverse_sqrt"}
BIASED = {"use_bias": True, "mlp": "gelu", "norm": "layernorm", "position": "learned", "max_positions": 16}
FAMILIES = {
    "single_stream": stubs.nano(),
    "grouped_heads": stubs.nano(**stubs.QUICK, **ROPE),
    "biases": stubs.nano(**stubs.QUICK, **BIASED),
    "encoder_decoder": stubs.nano_encoder_decoder(**stubs.QUICK),
}
PLAIN = FAMILIES["single_stream"]


def batch_for(model):
    return stubs.make_batch([2, 5, 3], [6, 2, 4], 11, encoder=model.architecture.needs_encoder)


def adapted_model(model, seed=7, **fields):
    """The network under adapters that have been trained: their B is random."""
    architecture = WithLoRA(model.architecture, rank=4, **fields)
    fresh = jax.jit(architecture.init)(jax.random.key(seed))["lora"]
    keys = iter(jax.random.split(jax.random.key(seed), 100))

    def trained(path, leaf):
        is_b = jax.tree_util.keystr(path, simple=True, separator="/").endswith("/b")
        return 0.2 * jax.random.normal(next(keys), leaf.shape, leaf.dtype) if is_b else leaf

    return BoundModel(architecture, {**model.params, "lora": jax.tree_util.tree_map_with_path(trained, fresh)})


def logits(model):
    return np.asarray(_logits(model.params, model.architecture, batch_for(model)))


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, architecture, batch):
    bound = BoundModel(architecture, params)
    inputs = dict(positions=batch.positions, segment_ids=batch.segment_ids, encoder=batch.encoder)
    return bound.logits(bound(batch.tokens, visibility=Full(), **inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_no_bit(family):
    model = FAMILIES[family]
    architecture = WithLoRA(model.architecture)
    fresh = jax.jit(architecture.init)(jax.random.key(0))
    assert all(np.asarray(pair["a"]).any() for pair in fresh["lora"]["blocks"]["attention"].values())
    got = BoundModel(architecture, {**model.params, "lora": fresh["lora"]})
    np.testing.assert_array_equal(logits(got), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_T58_adapter_not_loaded(family):
    """Merged and unmerged logits are equal and differ from the plain network's; what is missing is an error."""
    model = FAMILIES[family]
    adapted = adapted_model(model)
    merged = BoundModel(model.architecture, adapted.architecture.merge(adapted.params))
    assert jax.tree.structure(merged.params) == jax.tree.structure(dict(model.params))
    with_adapters = logits(adapted)
    np.testing.assert_allclose(logits(merged), with_adapters, atol=2e-4 * np.abs(with_adapters).max())
    assert np.abs(with_adapters - logits(model)).max() > 0.02 * np.abs(with_adapters).max()
    with pytest.raises(ConfigError, match="lora is not among the parameters"):
        logits(BoundModel(adapted.architecture, model.params))


@pytest.mark.parametrize("old", ["scale", "query", "a"])
def test_T58_adapter_not_loaded_under_another_name(old):
    adapted = adapted_model(PLAIN)

    def renamed(tree):
        if not isinstance(tree, dict):
            return tree
        return {("other" if name == old else name): renamed(node) for name, node in tree.items()}

    params = {**adapted.params, "lora": renamed(adapted.params["lora"])}
    target = adapted.architecture.init(jax.random.key(1))
    with pytest.raises(ConfigError, match=f"array lora/.*{old}.* of the checkpoint is missing"):
        transfer(params, target, adapted.architecture.logical_axes())
    with pytest.raises(ConfigError, match=r"(lora/scale is not among)|(other has no matrix)|(not have exactly)"):
        merge(params)
    if old != "query":  # the call cannot know how many adapters there were
        with pytest.raises(ConfigError):
            logits(BoundModel(adapted.architecture, params))


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("query", {"attention/query", "cross_attention/query"}),
        ("key", {"attention/key", "cross_attention/key"}),
        ("value", {"attention/value", "cross_attention/value"}),
        ("output", {"attention/output", "cross_attention/output"}),
        ("mlp", {"mlp/up", "mlp/gate", "mlp/down"}),
    ],
)
def test_every_target_reaches_the_logits_of_both_stacks(target, names):
    model = FAMILIES["encoder_decoder"]
    adapted = adapted_model(model, targets=(target,))
    paths = {name for name in _names(adapted.params["lora"]) if name.endswith("/a")}
    decoder = {f"blocks/{name}/a" for name in names}
    encoder = {f"encoder/blocks/{name}/a" for name in names if "cross" not in name}
    assert paths == decoder | encoder
    reference = logits(adapted)
    for path in decoder | encoder:
        assert np.abs(logits(_without(adapted, path)) - reference).max() > 1e-4


def test_adapters_lie_like_their_matrices():
    model = FAMILIES["grouped_heads"]
    architecture = WithLoRA(model.architecture, rank=3)
    axes, shapes = architecture.logical_axes()["lora"]["blocks"], architecture.abstract_params()["lora"]["blocks"]
    assert axes["attention"]["key"] == {
        "a": ("layers", "embed", None),
        "b": ("layers", None, "kv_heads", "head_dim"),
    }
    assert axes["attention"]["output"] == {
        "a": ("layers", "heads", "head_dim", None),
        "b": ("layers", None, "embed"),
    }
    assert shapes["attention"]["key"]["b"].shape == (1, 3, 1, 16)
    assert shapes["attention"]["output"]["a"].shape == (1, 2, 16, 3)
    assert shapes["mlp"]["down"]["a"].shape == (1, 64, 3)
    half = WithLoRA(stubs.nano(param_dtype="bfloat16").architecture)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.abstract_params()["lora"])} == {jnp.dtype("float32")}


def test_merged_weights_keep_their_dtype():
    model = stubs.nano(param_dtype="bfloat16", **stubs.QUICK)
    merged = merge(adapted_model(model).params)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_what_is_frozen():
    architecture = WithLoRA(PLAIN.architecture, trained_too=("embed", "blocks/mlp_norm"))
    own = set(_names(PLAIN.params))
    trained = {"embed/tokens", "blocks/mlp_norm/scale"}
    assert architecture.frozen_arrays() == (own - trained) | {"lora/scale"}
    assert PLAIN.architecture.frozen_arrays() == frozenset()
    # A head on top is none of the adapters' business; one below is a part of the frozen network.
    assert WithLengthHead(architecture).frozen_arrays() == architecture.frozen_arrays()
    assert "length_head/output/bias" in WithLoRA(WithLengthHead(PLAIN.architecture)).frozen_arrays()


def test_a_plain_checkpoint_gets_fresh_adapters_and_an_adapted_one_is_merged_into_a_plain_network():
    adapted = adapted_model(PLAIN)
    fresh = adapted.architecture.init(jax.random.key(5))
    got, report = transfer(PLAIN.params, fresh, adapted.architecture.logical_axes())
    assert set(report.added) == {f"lora/{name}" for name in _names(fresh["lora"])}
    assert report.dropped == report.resized == ()
    np.testing.assert_array_equal(got["blocks"]["mlp"]["up"], PLAIN.params["blocks"]["mlp"]["up"])
    own = PLAIN.architecture.init(jax.random.key(6))
    back, report = transfer(adapted.params, own, PLAIN.architecture.logical_axes())
    assert len(report.merged) == 7
    assert "7 adapters merged" in str(report)
    assert "merged   blocks/attention/query" in str(report)
    expected = logits(adapted)
    np.testing.assert_allclose(
        logits(BoundModel(PLAIN.architecture, back)), expected, atol=2e-4 * np.abs(expected).max()
    )


def test_adapters_keep_the_scale_they_were_trained_with():
    adapted = adapted_model(PLAIN)
    louder = WithLoRA(PLAIN.architecture, rank=4, alpha=640.0)
    got, _ = transfer(adapted.params, louder.init(jax.random.key(5)), louder.logical_axes())
    np.testing.assert_array_equal(logits(BoundModel(louder, got)), logits(adapted))


def test_a_length_head_on_an_adapted_network_reads_it():
    adapted = adapted_model(PLAIN)
    headed = stubs.with_length_head(adapted)
    np.testing.assert_array_equal(logits(headed), logits(adapted))


@pytest.mark.parametrize("family", ["single_stream", "encoder_decoder"])
def test_cached_decoding_uses_the_adapters(family):
    """Keys and values of a cache, and of a source that is encoded once, are those of the adapted network."""
    model = FAMILIES[family]
    prompt, keys = stubs.as_prompt(batch_for(model)), StreamKeys.create(3)
    adapted = adapted_model(model)
    merged = BoundModel(model.architecture, merge(adapted.params))
    sampler = AutoregressiveSampler()
    got, expected, plain = (stubs.generate(sampler, one, prompt, keys) for one in (adapted, merged, model))
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-4)
    assert np.abs(got.scores - plain.scores).max() > 1e-2


def test_counts_and_flops():
    architecture = WithLoRA(PLAIN.architecture, rank=4)
    counts, plain = architecture.count_parameters(), PLAIN.architecture.count_parameters()
    attention, mlp = 2 * 4 * (4 * (32 + 32)), 2 * 4 * (3 * (32 + 64))
    assert counts["lora"] == attention + mlp + 1
    assert counts["total"] == plain["total"] + counts["lora"]
    added = architecture.flops_per_token(16) - PLAIN.architecture.flops_per_token(16)
    assert added == 2 * (attention + mlp)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    head = 32 * PLAIN.spec.padded_vocab_size
    assert architecture.saved_flops_per_token(16) == 2 * (matrices + head)
    assert WithLoRA(PLAIN.architecture, trained_too=("embed",)).saved_flops_per_token(16) == 2 * matrices


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rank": 0}, "rank=0: must be an integer >= 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be a positive"),
        ({"targets": ()}, "no matrix is named"),
        ({"targets": ("querry",)}, "no such matrix; did you mean query"),
        ({"trained_too": ("embeds",)}, "trained_too='embeds': .*did you mean embed"),
    ],
)
def test_settings_that_mean_nothing(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        WithLoRA(PLAIN.architecture, **fields)


def test_adapters_on_adapters_are_refused():
    with pytest.raises(ConfigError, match="already has adapters"):
        WithLoRA(WithLoRA(PLAIN.architecture))
    assert hash(WithLoRA(PLAIN.architecture)) == hash(WithLoRA(PLAIN.architecture, targets=list(TARGETS)))


def _names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _without(model, name):
    """The model with one adapter's `a` set to zero."""

    def cut(path, leaf):
        return jnp.zeros_like(leaf) if jax.tree_util.keystr(path, simple=True, separator="/") == name else leaf

    params = {**model.params, "lora": jax.tree_util.tree_map_with_path(cut, model.params["lora"])}
    return BoundModel(model.architecture, params)
