"""What must hold for every family of networks, whatever its fields."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.types import EncoderInputs
from diffusion_lm.nn import masks, named_masks
from diffusion_lm.nn.rope import YarnRope
from diffusion_lm.nn.transformer import TransformerSpec

T5 = TransformerSpec(
    vocab_size=37, num_layers=2, model_dim=16, num_heads=4, head_dim=6, mlp_dim=24, relative_max_distance=12
)
LLAMA = dataclasses.replace(
    T5, position="rope", mlp="swiglu", num_kv_heads=2, attention_scale="inverse_sqrt", tied_embeddings=False
)
QWEN = dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True, scan_layers=False)
GPT = dataclasses.replace(
    T5, position="learned", max_positions=32, norm="layernorm", mlp="gelu", use_bias=True, scan_layers=False
)
T5_DOUBLE = dataclasses.replace(T5, encoder_layers=2, tied_embeddings=False)
LLAMA_DOUBLE = dataclasses.replace(LLAMA, encoder_layers=1)
MISTRAL = dataclasses.replace(
    LLAMA,
    window=4,
    window_layers=(1,),
    rope_scaling=YarnRope(2.0, original_max_positions=8),
    attention_output_bias=True,
    mlp_bias=True,
)
BERT = dataclasses.replace(
    GPT,
    gelu="exact",
    norm_placement="post",
    embedding_norm=True,
    position_offset=2,
    attention_scale="inverse_sqrt",
    head_transform=True,
    head_bias=True,
)
GEMMA = dataclasses.replace(
    T5,
    position="rope",
    num_kv_heads=2,
    norm_placement="both",
    norm_around_one=True,
    scaled_embeddings=True,
    attention_scale="inverse_sqrt",
    attention_scale_size=9.0,
    window=4,
    window_layers=(0,),
    window_rope_theta=50.0,
)
FAMILIES = {
    "t5": T5,
    "qwen": QWEN,
    "gpt": GPT,
    "mistral": MISTRAL,
    "bert": BERT,
    "gemma": GEMMA,
    "t5_double": T5_DOUBLE,
    "llama_double": LLAMA_DOUBLE,
}
every_family = pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
# For tests that compile for seconds: two families that differ in most fields, the others in `make test-thorough`.
quick_families = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=name, marks=() if name in ("gemma", "llama_double") else pytest.mark.thorough)
        for name, spec in FAMILIES.items()
    ],
)
VISIBILITIES = named_masks.VISIBILITY_NAMES


def network(spec):
    return EncoderDecoder(spec) if spec.encoder_layers else SingleStream(spec)


@functools.cache
def bind(spec) -> BoundModel:
    """A network with parameters that leave no bias at 0 and no norm at 1, or a test could not see them."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        match path[-1].key:
            case "scale":
                return 1 + 0.1 * values
            case "tokens" | "positions" | "relative_bias":
                return values
        return values / 4

    return BoundModel(network(spec), jax.tree_util.tree_map_with_path(fill, network(spec).abstract_params()))


def given(visibility, length):
    """A visibility written out, so that one compiled program serves all of them."""
    return masks.ExplicitMask(visibility.dense(None, length))


def token_ids(rows, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 37)


def slots(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def until(lengths, total):
    return (jnp.arange(total) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)


def source(spec, lengths, total=6):
    """Encoder inputs with rows of these lengths, or None for a single stream."""
    if not spec.encoder_layers:
        return None
    tokens = token_ids(len(lengths), total, seed=9)
    return EncoderInputs(tokens, until(lengths, total), slots(tokens))


def logits_of(model, tokens, visibility, segment_ids, positions=None, encoder=None):
    positions = slots(tokens) if positions is None else positions
    visibility = given(visibility, tokens.shape[1])
    return _logits_of(model.architecture, model.params, tokens, visibility, segment_ids, positions, encoder)


@functools.partial(jax.jit, static_argnums=0)
def _logits_of(architecture, params, tokens, visibility, segment_ids, positions, encoder):
    model = BoundModel(architecture, params)
    hidden = model(tokens, visibility=visibility, positions=positions, segment_ids=segment_ids, encoder=encoder)
    return model.logits(hidden)


@every_family
def test_logical_axes_match_the_parameters(spec):
    architecture = network(spec)
    params, axes = architecture.abstract_params(), architecture.logical_axes()
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=is_axes)
    jax.tree.map(lambda leaf, names: None if len(names) == leaf.ndim else pytest.fail(str(names)), params, axes)
    for tree in (params["blocks"], params.get("encoder", {}).get("blocks", {})):
        assert {leaf.shape[0] for leaf in jax.tree.leaves(tree)} <= {spec.num_layers, spec.encoder_layers}
    assert all(type(leaf).__name__ == "ShapeDtypeStruct" for leaf in jax.tree.leaves(params)), "no boxes outside nn/"
    count = architecture.count_parameters()
    assert count["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))


@quick_families
def test_scanned_and_unrolled_and_rematerialised_agree(spec):
    model, tokens = bind(spec), token_ids(2, 5)
    encoder, visibility = source(spec, [6, 4]), masks.Causal()

    def loss_and_gradient(**changes):
        architecture = network(dataclasses.replace(spec, **changes))

        def loss(params):
            bound = BoundModel(architecture, params)
            args = {"positions": slots(tokens), "segment_ids": until([5, 3], 5), "encoder": encoder}
            return bound.nll(bound(tokens, visibility=visibility, **args), tokens).sum()

        return jax.jit(jax.value_and_grad(loss))(model.params)

    reference = loss_and_gradient(scan_layers=True)
    for changes in ({"scan_layers": False, "remat": "dots_no_batch"}, {"remat": "full", "logits_chunk": 4}):
        other = loss_and_gradient(**changes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), reference, other)


@every_family
@pytest.mark.parametrize("name", ["causal", "full", "prefix"])
def test_T33_packed_logits_equal_unpacked(spec, name):
    lengths, model = [4, 5], bind(spec)
    rows = [token_ids(1, n, seed=n) for n in lengths]
    conditioning = [jnp.arange(n)[None] < 2 for n in lengths]
    encoders = [source(spec, [n], n) for n in (3, 6)]
    packed = jnp.concatenate([*rows, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segment_ids = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([*lengths, 2]), total_repeat_length=11)[None]
    positions = jnp.concatenate([jnp.arange(4), jnp.arange(5), jnp.arange(2)])[None]
    encoder = None
    if spec.encoder_layers:
        segments = jnp.repeat(jnp.array([1, 2]), jnp.array([3, 6]), total_repeat_length=9)[None]
        fields = [jnp.concatenate([getattr(e, f) for e in encoders], axis=1) for f in ("tokens", "positions")]
        encoder = EncoderInputs(fields[0], segments, fields[1])
    target_mask = jnp.concatenate([*(~c for c in conditioning), jnp.zeros((1, 2), bool)], axis=1)
    together = logits_of(
        model, packed, named_masks.named_visibility(name, target_mask), segment_ids, positions, encoder=encoder
    )
    start = 0
    for row, conditioned, alone_encoder in zip(rows, conditioning, encoders, strict=True):
        visibility = named_masks.named_visibility(name, ~conditioned)
        alone = logits_of(model, row, visibility, jnp.ones_like(row), encoder=alone_encoder)
        np.testing.assert_allclose(together[:, start : start + row.shape[1]], alone, rtol=1e-4, atol=1e-5)
        start += row.shape[1]
    assert jnp.isfinite(together).all(), "padding sees nothing and must not turn into NaN"


@every_family
@pytest.mark.parametrize("name", VISIBILITIES)
def test_T41_logits_do_not_depend_on_padding(spec, name):
    model, row = bind(spec), token_ids(1, 5)
    for pads in (0, 1, 7):
        tokens = jnp.concatenate([row, token_ids(1, pads, seed=3)], axis=1)
        encoder = source(spec, [4], 4 + pads)
        if encoder is not None:
            known = source(spec, [4], 4).tokens
            encoder = encoder.replace(tokens=jnp.concatenate([known, token_ids(1, pads, seed=4)], axis=1))
        target_mask = jnp.arange(5 + pads)[None] >= 2
        visibility = named_masks.named_visibility(name, target_mask)
        logits = logits_of(model, tokens, visibility, until([5], 5 + pads), encoder=encoder)[:, :5]
        if pads == 0:
            reference = logits
        np.testing.assert_allclose(logits, reference, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("name", ["causal", "prefix"])
def test_T43_cached_decoding_equals_full_forward_on_ragged_rows(spec, name):
    """Prefill of unequal prompts, then one token a row at its own slot; a finished row writes to slot T and stands."""
    B, T, prompts, ends = 3, 9, jnp.array([2, 4, 1]), jnp.array([9, 6, 8])
    model, tokens = bind(spec), token_ids(B, T)
    encoder = source(spec, [6, 2, 4])
    segment_ids = until(ends, T)
    target_mask = slots(tokens) >= prompts[:, None]
    visibility = named_masks.named_visibility(name, target_mask)
    full = logits_of(model, tokens, visibility, segment_ids, encoder=encoder)

    prefill, at, logits = _decode(
        model.architecture, model.params, tokens, prompts, ends, given(visibility, T), segment_ids, encoder
    )
    for row in range(B):
        np.testing.assert_allclose(prefill[row, : prompts[row]], full[row, : prompts[row]], rtol=1e-4, atol=2e-5)
        steps = int(ends[row] - prompts[row])
        assert at[:steps, row].tolist() == list(range(int(prompts[row]), int(ends[row])))
        np.testing.assert_allclose(logits[:steps, row], full[row, prompts[row] : ends[row]], rtol=1e-4, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def _decode(architecture, params, tokens, prompts, ends, visibility, segment_ids, encoder):
    B, T = tokens.shape
    model = BoundModel(architecture, params)
    state = None if encoder is None else model.encode(encoder)
    shared = {"visibility": visibility, "segment_ids": segment_ids, "encoder": state}
    canvas = jnp.where(slots(tokens) >= prompts[:, None], 0, tokens)
    hidden = model(canvas, positions=slots(tokens), cache=model.init_cache(B, T), **shared)

    def step(cache, offset):
        cursor = prompts + offset
        at = jnp.where(cursor < ends, cursor, T)[:, None]
        new = jnp.take_along_axis(tokens, at, axis=1, mode="clip")
        hidden = model(new, positions=at, cache=cache, **shared)
        return hidden.cache, (at[:, 0], model.logits(hidden)[:, 0])

    _, (at, logits) = jax.lax.scan(step, hidden.cache, jnp.arange(T))
    return model.logits(hidden), at, logits


@every_family
def test_T40_rows_do_not_depend_on_neighbours(spec):
    model, tokens, lengths = bind(spec), token_ids(4, 6), [6, 3, 5, 1]
    encoder = source(spec, [6, 2, 4, 0])
    everyone = logits_of(model, tokens, masks.Full(), until(lengths, 6), encoder=encoder)
    one = None if encoder is None else jax.tree.map(lambda x: x[2:3], encoder)
    alone = logits_of(model, tokens[2:3], masks.Full(), until(lengths, 6)[2:3], encoder=one)
    np.testing.assert_allclose(everyone[2:3], alone, rtol=1e-4, atol=1e-5)


@every_family
def test_order_matters_under_full_visibility(spec):
    """The position scheme of each family tells past from future: the reversed row gives other logits."""
    model, tokens = bind(spec), token_ids(1, 6)
    forward = logits_of(model, tokens, masks.Full(), jnp.ones_like(tokens), encoder=source(spec, [4]))
    backward = logits_of(model, tokens[:, ::-1], masks.Full(), jnp.ones_like(tokens), encoder=source(spec, [4]))
    assert jnp.abs(forward - backward[:, ::-1]).max() > 0.05


@quick_families
@pytest.mark.parametrize("field", ["dropout_rate", "attention_dropout_rate"])
def test_dropout_is_keyed_by_row(spec, field):
    spec = dataclasses.replace(spec, **{field: 0.3})
    model, tokens = bind(spec), token_ids(3, 5)
    encoder = source(spec, [6, 2, 4])
    keys = jax.random.split(jax.random.key(3), 3)

    @jax.jit
    def run(tokens, encoder, keys):
        args = {"visibility": masks.Causal(), "positions": slots(tokens), "segment_ids": jnp.ones_like(tokens)}
        return model(tokens, encoder=encoder, dropout_keys=keys, **args).values_BTD

    whole, deterministic = run(tokens, encoder, keys), run(tokens, encoder, None)
    last = run(tokens[2:], jax.tree.map(lambda x: x[2:], encoder), keys[2:])
    np.testing.assert_allclose(whole[2:], last, rtol=1e-4, atol=1e-5)
    assert jnp.abs(whole - deterministic).max() > 0.02
    other = run(tokens, encoder, jax.random.split(jax.random.key(4), 3))
    assert jnp.abs(whole - other).max() > 0.02


@quick_families
def test_bfloat16_computes_near_float32_with_float32_parameters(spec):
    model, tokens = bind(spec), token_ids(2, 5)
    half = BoundModel(network(dataclasses.replace(spec, dtype="bfloat16")), model.params)
    args = (tokens, masks.Causal(), jnp.ones_like(tokens), None, source(spec, [6, 3]))
    logits, reference = logits_of(half, *args), logits_of(model, *args)
    assert logits.dtype == jnp.float32
    assert jnp.abs(logits - reference).mean() < 0.05 * jnp.abs(reference).mean()
    hidden = half(
        tokens, visibility=args[1], positions=slots(tokens), segment_ids=args[2], encoder=source(spec, [6, 3])
    )
    assert hidden.values_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half.architecture.abstract_params())} == {jnp.dtype("float32")}


@pytest.mark.parametrize("spec", [T5, LLAMA, GPT], ids=["t5", "llama", "gpt"])
@pytest.mark.thorough
def test_initial_logits_are_of_order_one(spec):
    """Variance-preserving initialisation; a tied output projection, as in T5, starts out preferring the input token."""
    spec = dataclasses.replace(spec, model_dim=64, head_dim=16, mlp_dim=128)
    model = BoundModel(SingleStream(spec), jax.jit(SingleStream(spec).init)(jax.random.key(0)))
    tokens = token_ids(8, 24)
    logits = logits_of(model, tokens, masks.Causal(), jnp.ones_like(tokens))
    is_input = jnp.arange(37) == tokens[..., None]
    assert 0.3 < float(logits[~is_input].std()) < 2
    own = float(logits[is_input].mean())
    if spec.tied_embeddings:
        assert 1 < own < spec.model_dim**0.5
    else:
        assert abs(own) < 0.5
        guess = float(model.nll(model(tokens, **_causal(tokens)), token_ids(8, 24, seed=1)).mean())
        assert np.log(37) - 0.1 < guess < np.log(37) + 1.2


def _causal(tokens):
    return {"visibility": masks.Causal(), "positions": slots(tokens), "segment_ids": jnp.ones_like(tokens)}


@pytest.mark.parametrize("spec", [T5, LLAMA, T5_DOUBLE], ids=["t5", "llama", "t5_double"])
@pytest.mark.thorough
def test_a_few_adamw_steps_learn_the_last_token(spec):
    spec = dataclasses.replace(spec, model_dim=32, head_dim=8, mlp_dim=64)
    architecture, optimizer = network(spec), optax.adamw(1e-3)
    params = jax.jit(architecture.init)(jax.random.key(0))

    @jax.jit
    def step(params, state, key):
        tokens = jax.random.randint(key, (32, 8), 0, 37)

        def loss(params):
            bound = BoundModel(architecture, params)
            encoder = EncoderInputs(tokens, jnp.ones_like(tokens), slots(tokens)) if spec.encoder_layers else None
            args = {"positions": slots(tokens), "segment_ids": jnp.ones_like(tokens), "encoder": encoder}
            return bound.nll(bound(tokens, visibility=masks.Causal(), **args), tokens).mean()

        loss, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), 60):
        params, state, loss = step(params, state, key)
        losses.append(float(loss))
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("implementation", ["cudnn", "flash"])
def test_parameters_do_not_depend_on_the_attention_kernel(implementation):
    """They are drawn under vmap and on any device, which not every kernel knows."""
    spec = TransformerSpec(vocab_size=64, model_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32)
    other = dataclasses.replace(spec, attention=implementation, dtype="bfloat16")
    drawn, wanted = (SingleStream(one).init(jax.random.key(0)) for one in (other, spec))
    jax.tree.map(np.testing.assert_array_equal, drawn, wanted)


def test_users_get_errors_that_say_what_to_do():
    with pytest.raises(ConfigError, match="must be 0 for a single-stream network"):
        SingleStream(T5_DOUBLE)
    with pytest.raises(ConfigError, match="encoder_layers=0"):
        EncoderDecoder(T5)
    tokens = token_ids(1, 40)
    with pytest.raises(ConfigError, match="max_positions=32: the stream has 40 tokens"):
        logits_of(bind(GPT), tokens, masks.Causal(), jnp.ones_like(tokens))
    with pytest.raises(ConfigError, match="no encoder's stream"):
        logits_of(bind(T5_DOUBLE), tokens, masks.Causal(), jnp.ones_like(tokens))
    with pytest.raises(ConfigError, match="has an encoder's stream"):
        logits_of(bind(T5), tokens, masks.Causal(), jnp.ones_like(tokens), encoder=source(T5_DOUBLE, [1]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mlp", "geglue", "did you mean geglu"),
        ("num_kv_heads", 3, "must divide num_heads"),
        ("model_dim", 0, "model_dim=0: must be an integer >= 1"),
        ("dropout_rate", 1.0, "must be in"),
        ("attention_dropout_rate", -0.1, "must be in"),
        ("position", "learned", "max_positions"),
        ("relative_buckets", 2, "buckets"),
        ("attention", "splash", "Use one of xla, cudnn, flash"),
        ("norm_placement", "behind", "Use one of pre, post, both"),
        ("position_offset", -1, "must be an integer >= 0"),
        ("window", 0, "must be an integer >= 1"),
        ("window_layers", (0,), "need indices from 0 up, and a window"),
        ("window_rope_theta", 10.0, "applies to window_layers, which is None"),
    ],
)
def test_wrong_fields_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(T5, **{field: value})


@pytest.mark.parametrize("implementation", ["flash", "cudnn"])
def test_kernels_without_attention_dropout_are_refused(implementation):
    with pytest.raises(ConfigError, match=r"attention_dropout_rate.*xla"):
        dataclasses.replace(T5, attention_dropout_rate=0.1, attention=implementation)
