import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_lm.nn import chunks, cross_entropy
from diffusion_lm.nn.head import Head

B, T, D, V = 3, 7, 8, 50


@pytest.fixture
def setup():
    keys = jax.random.split(jax.random.key(0), 4)
    head = Head(jax.random.normal(keys[0], (64, D)), bias_V=jax.random.normal(keys[1], (64,)), scale=0.5, vocab_size=V)
    return jax.random.normal(keys[2], (B, T, D)), head, jax.random.randint(keys[3], (B, T), 0, V)


def _optax(hidden, head, targets):
    logits = 0.5 * hidden @ head.weight_VD[:V].T + head.bias_V[:V]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.mark.parametrize("chunk", [1, 6, 9, 1000])
def test_chunked_nll_equals_optax_in_value_and_gradient(setup, chunk):
    hidden, head, targets = setup
    weights = jax.random.uniform(jax.random.key(5), (B, T))

    def loss(function):
        return jax.value_and_grad(lambda h, w: (function(h, head.replace(weight_VD=w)) * weights).sum(), (0, 1))

    ours = loss(lambda h, w: cross_entropy.chunked_nll(h, w, targets, chunk))(hidden, head.weight_VD)
    plain = loss(lambda h, w: _optax(h, w, targets))(hidden, head.weight_VD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, plain)


@pytest.mark.parametrize("some", [False, True], ids=["all slots", "some slots"])
def test_a_loop_has_the_gradients_of_all_that_its_chunks_read(setup, monkeypatch, some):
    """Bias and transform of the head, the states, and a float beside them, against all logits at once."""
    monkeypatch.setattr(chunks, "_min_slots", lambda *sizes: 2)
    monkeypatch.setattr(chunks, "UNROLLED_BYTES", 0)
    hidden, head, targets = setup
    head = head.replace(transform=jnp.eye(D) + 0.1, run_transform=lambda w, x: jnp.tanh(x @ w))
    where = jax.random.bernoulli(jax.random.key(6), 0.5, (B, T)) if some else None
    scale = jax.random.uniform(jax.random.key(7), (B, T))

    def fn(logits, tokens, scale):
        return scale * jnp.take_along_axis(jnp.square(jax.nn.log_softmax(logits)), tokens[..., None], -1)[..., 0]

    def graded(chunk):
        def loss(hidden, head, scale):
            mapped = cross_entropy.chunked_map(fn, hidden, head, (targets, scale), chunk, where_BT=where)
            terms = cross_entropy.chunked_nll_terms(hidden, head, targets, chunk, where_BT=where)
            return mapped.sum() + (terms.nll + 0.3 * terms.log_z**2 + 0.1 * terms.uniform_nll).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(hidden, head, scale)

    looped, jaxpr = graded(6), str(jax.make_jaxpr(lambda: graded(6))())
    assert "while" in jaxpr
    everywhere = jnp.ones((B, T), bool) if where is None else where
    whole = graded_dense(fn, hidden, head, targets, scale, everywhere)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), looped, whole)


def graded_dense(fn, hidden, head, targets, scale, where):
    def loss(hidden, head, scale):
        logits = cross_entropy.logits(hidden, head)[..., :V]
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        log_z = jax.nn.logsumexp(logits, -1)
        losses = fn(logits, targets, scale) + nll + 0.3 * log_z**2 - 0.1 * log_p.mean(-1)
        return jnp.where(where, losses, 0.0).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(hidden, head, scale)


@pytest.mark.parametrize("chunk", [6, 1000])
def test_nll_terms(setup, chunk):
    hidden, head, targets = setup
    terms = cross_entropy.chunked_nll_terms(hidden, head, targets, chunk)
    logits = 0.5 * hidden @ head.weight_VD[:V].T + head.bias_V[:V]
    np.testing.assert_allclose(terms.nll, _optax(hidden, head, targets), rtol=1e-5)
    np.testing.assert_allclose(terms.log_z, jax.nn.logsumexp(logits, -1), rtol=1e-5)
    np.testing.assert_allclose(terms.uniform_nll, -jax.nn.log_softmax(logits).mean(-1), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_token_stats_do_not_depend_on_chunks(setup, temperature):
    hidden, head, targets = setup
    keys = jax.random.split(jax.random.key(1), (B, T))
    arguments = {
        "keys_BT": keys,
        "temperature": temperature,
        "top_k": 20,
        "top_p": 0.95,
        "score": targets,
        "forbidden": (4,),
    }
    whole = cross_entropy.chunked_token_stats(hidden, head, 1000, **arguments)
    parts = cross_entropy.chunked_token_stats(hidden, head, 6, **arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, parts)
    logits = (0.5 * hidden @ head.weight_VD[:V].T + head.bias_V[:V]).at[..., 4].set(-jnp.inf)
    log_p = jax.nn.log_softmax(logits)
    assert (whole.argmax == logits.argmax(-1)).all()
    np.testing.assert_allclose(
        whole.sample_log_prob, jnp.take_along_axis(log_p, whole.sample[..., None], -1)[..., 0], rtol=1e-4
    )
    scored = targets != 4
    target = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(whole.target_log_prob[scored], target[scored], rtol=1e-4)


def test_T35_padding_rows_and_forbidden_ids_are_never_emitted(setup):
    hidden, head, _ = setup
    head = head.replace(bias_V=head.bias_V.at[V:].set(100.0).at[7].set(100.0))
    keys = jax.random.split(jax.random.key(1), (B, T))
    for temperature in (0.0, 5.0):
        stats = cross_entropy.chunked_token_stats(
            hidden, head, 1000, keys_BT=keys, temperature=temperature, forbidden=(7,)
        )
        for tokens in (stats.argmax, stats.sample):
            assert (tokens < V).all()
            assert (tokens != 7).all()
    assert jnp.isfinite(jax.grad(lambda h: cross_entropy.chunked_nll(h, head, stats.argmax, 6).sum())(hidden)).all()


def test_summaries_and_forbidden_ids_are_those_of_the_distribution(setup):
    hidden, head, targets = setup
    logits = (0.5 * hidden @ head.weight_VD[:V].T + head.bias_V[:V]).at[..., 4].set(-jnp.inf)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    stats = cross_entropy.chunked_token_stats(hidden, head, 6, forbidden=(4,), summaries=("entropy", "margin"))
    np.testing.assert_allclose(stats.entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(-1), rtol=1e-4)
    ordered = np.sort(p, axis=-1)
    np.testing.assert_allclose(stats.margin, ordered[..., -1] - ordered[..., -2], atol=1e-5)
    assert cross_entropy.chunked_token_stats(hidden, head, 6).entropy is None
    targets = jnp.where(targets == 4, 5, targets)
    expected = -np.log(np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0])
    np.testing.assert_allclose(cross_entropy.chunked_nll(hidden, head, targets, 6, forbidden=(4,)), expected, rtol=1e-4)
    terms = cross_entropy.chunked_nll_terms(hidden, head, targets, 6, forbidden=(4,))
    np.testing.assert_allclose(terms.uniform_nll, -np.log(np.delete(p, 4, -1)).mean(-1), rtol=1e-4)


def test_drawing_without_keys_is_an_error(setup):
    hidden, head, _ = setup
    with pytest.raises(ValueError, match="keys_BT"):
        cross_entropy.chunked_token_stats(hidden, head, 1000, temperature=1.0)


@pytest.mark.parametrize("slots", [1, 4, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 32))])
@pytest.mark.parametrize(("chunk", "unrolled"), [(6, False), (1000, False), (1000, True)])
def test_unwanted_slots_are_zero_and_change_nothing_else(setup, monkeypatch, chunk, unrolled, slots):
    """Ragged rows, one of them empty: values and gradients on the wanted slots are those of the whole row."""
    monkeypatch.setattr(chunks, "UNROLLED_BYTES", 2**28 if unrolled else 0)
    monkeypatch.setattr(chunks, "_min_slots", lambda *sizes: slots)
    hidden, head, targets = setup
    where = jnp.asarray([[0, 0, 1, 1, 1, 0, 0], [0] * 7, [1, 0, 1, 0, 1, 1, 1]], bool)
    weights = jax.random.uniform(jax.random.key(5), (B, T)) * where

    def graded(**wanted):
        def loss(hidden, weight):
            nll = cross_entropy.chunked_nll(hidden, head.replace(weight_VD=weight), targets, chunk, **wanted)
            return (nll * weights).sum(), nll

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head.weight_VD)

    (loss, nll), gradients = graded(where_BT=where)
    (whole_loss, whole_nll), whole_gradients = graded()
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    np.testing.assert_allclose(nll, jnp.where(where, whole_nll, 0), rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, whole_gradients)
    arguments = {"keys_BT": jax.random.split(jax.random.key(1), (B, T)), "temperature": 0.7, "score": targets}
    part = cross_entropy.chunked_token_stats(hidden, head, chunk, where_BT=where, **arguments)
    whole = cross_entropy.chunked_token_stats(hidden, head, 1000, **arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, jnp.where(where, b, 0), rtol=1e-5, atol=1e-5), part, whole)


@pytest.mark.parametrize("chunk_tokens", [1000, 2 * B], ids=["all logits fit", "a loop"])
def test_chunks_without_wanted_slots_are_skipped(setup, monkeypatch, chunk_tokens):
    monkeypatch.setattr(chunks, "_min_slots", lambda *sizes: 2)
    computed, logits = [], cross_entropy.logits

    def watched(hidden, *settings):
        jax.debug.callback(lambda: computed.append(hidden.shape[1]))
        return logits(hidden, *settings)

    monkeypatch.setattr(cross_entropy, "logits", watched)
    hidden, head, targets = setup
    where = jnp.zeros((B, T), bool).at[0, 4:7].set(True).at[1, 0].set(True)
    jax.block_until_ready(cross_entropy.chunked_nll(hidden, head, targets, chunk_tokens, where_BT=where))
    jax.effects_barrier()
    assert computed == [2, 2], "three slots of a row are two chunks of two; the other two chunks hold nothing"


def test_bfloat16_hidden_gives_float32_losses(setup):
    hidden, head, targets = setup
    nll = cross_entropy.chunked_nll(hidden.astype(jnp.bfloat16), head, targets, 1000)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, _optax(hidden, head, targets), atol=0.1)
