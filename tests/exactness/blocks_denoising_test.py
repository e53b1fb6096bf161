"""Block diffusion against enumeration, and the traps of two-stream training, each with a variant that falls into it."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import scipy.stats

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn import masks, named_masks
from diffusion_lm.objectives.block_diffusion import LEVEL_STREAM, BlockDiffusion, MaskRates, NextToken
from diffusion_lm.objectives.block_layout import blocks_of

MASK = 4
KEYS = StreamKeys.create(3, 2)
MODEL = stubs.nano(tied_embeddings=False)


def make(**fields):
    """The objective; fields of `MaskRates` may stand among its own."""
    rates = {name: fields.pop(name) for name in ("low", "high", "half_life", "stratified") if name in fields}
    return BlockDiffusion(rates=MaskRates(**rates), **fields)


def losses_of(objective, model, batch, blocks, masked, weights):
    forward = objective.passes(model, batch, blocks, KEYS, train=False)
    return objective.token_losses(model, batch, blocks, masked, weights, forward)


def nano_batch():
    return stubs.make_batch([2, 3], [8, 6], 10)


def exact_nll(objective, model, batch, per_token=True):
    """Bound by enumeration: all masks of the target (of one block), each with its probability and weight."""
    blocks = blocks_of(batch, objective.block_size, objective.first_block)
    slots = np.nonzero(np.asarray(objective.maskable(batch, blocks))[0])[0]
    run = jax.jit(lambda masked, weights: losses_of(objective, model, batch, blocks, masked, weights).diffusion)
    total = 0.0
    for count in range(1, len(slots) + 1):
        share = 1 / (len(slots) * math.comb(len(slots), count))
        for chosen in itertools.combinations(slots, count):
            masked = np.zeros(batch.tokens.shape, bool)
            masked[:, list(chosen)] = True
            weights = np.full(batch.tokens.shape, len(slots) / count, np.float32)
            total = total + share * np.asarray(run(jnp.asarray(masked), jnp.asarray(weights)), np.float64)
    return total.sum(axis=1)


def test_the_mask_is_the_papers():
    """M_BD | M_OBC | M_BC of two blocks of two tokens, written out; rows are queries, [noisy ; clean] both ways."""
    dense = masks.two_streams(jnp.array([[0, 0, 1, 1]])).dense(None, 8)[0].astype(int)
    rows = ["11000000", "11000000", "00111100", "00111100", "00001100", "00001100", "00001111", "00001111"]
    np.testing.assert_array_equal(dense, [[int(c) for c in row] for row in rows])
    causal = masks.two_streams(jnp.array([[0, 0, 1, 1]]), causal_noisy=True, causal_clean=True).dense(None, 8)[0]
    rows = ["10000000", "11000000", "00101100", "00111100", "00001000", "00001100", "00001110", "00001111"]
    np.testing.assert_array_equal(causal.astype(int), [[int(c) for c in row] for row in rows])
    slots = jnp.array([[3, 5]])
    np.testing.assert_array_equal(
        masks.two_streams(jnp.array([[0, 0, 1, 1]])).dense(slots, 8)[0].astype(int), dense[jnp.array([3, 5])]
    )


def test_blocks_are_counted_inside_each_packed_example():
    batch = stubs.packed(stubs.make_batch([2, 1], [5, 4], 7))
    target = blocks_of(batch, 2, "target")
    np.testing.assert_array_equal(target.ids[0], [-1, -1, 0, 0, 1, 1, 2, -1, 0, 0, 1, 1])
    np.testing.assert_array_equal(target.is_start[0].astype(int), [1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0])
    example = blocks_of(batch, 4, "example")
    np.testing.assert_array_equal(example.ids[0], [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(example.runs[0], [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3])


def draws_of(objective, rows, steps=400):
    """f32[steps,rows,blocks], the rates of training, one per block."""
    batch = stubs.make_batch([1] * rows, [4 * objective.block_size] * rows, 4 * objective.block_size + 1)
    blocks = blocks_of(batch, objective.block_size, "target")

    @jax.jit
    def rates(step):
        return objective.block_rates(StreamKeys.create(0, step), batch, blocks)[:, 1 :: objective.block_size]

    return np.stack([rates(step) for step in range(steps)])


def tied(rates):
    """What bd3lms' `_sample_t` does: block b of row r always draws from stratum r * blocks + b."""
    strata = np.arange(rates[0].size).reshape(rates[0].shape)
    return (strata + rates) / strata.size


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("stratified", [True, False])
def test_T13_strata_tied_to_position(rows, stratified):
    rates = draws_of(make(block_size=2, stratified=stratified), rows)

    def worst(rates):
        columns = rates.reshape(len(rates), -1).T
        return min(scipy.stats.kstest(column, "uniform").pvalue for column in columns)

    assert worst(rates) > 1e-4
    assert worst(tied(rates)) < 1e-8, "the test sees the mistake"
    if stratified:
        ordered = np.sort(rates[:, 0], axis=1)
        assert (np.diff(ordered, axis=1) > 0.1).all(), "the blocks of one example cover the range"


def test_T14_one_t_per_sequence_in_block_diffusion():
    for stratified in (True, False):
        rates = draws_of(make(block_size=2, stratified=stratified), rows=3, steps=50)
        assert (np.ptp(rates, axis=2) > 0.1).mean() > 0.9, "levels differ between the blocks of an example"
    clipped = draws_of(make(block_size=2, low=0.3, high=0.8), rows=3, steps=50)
    assert 0.3 < clipped.min() < 0.35
    assert 0.75 < clipped.max() <= 0.8
    # The gradient's variance, which one level for all blocks makes larger, at the same mean.
    assert variance_of_weights(one_level=False) < variance_of_weights(one_level=True)


def variance_of_weights(one_level):
    """Variance over steps of the number of masked tokens a row, whose mean is half of them."""
    objective = make(block_size=2)
    rates = draws_of(objective, rows=4, steps=300)
    rates = np.broadcast_to(rates[..., :1], rates.shape) if one_level else rates
    return (2 * rates.sum(axis=2)).var()


def both_streams(model, noisy, clean, batch, visibility):
    """Logits [B,T,V] of the noisy copy."""

    @jax.jit
    def run(params, tokens):
        bound = stubs.BoundModel(model.architecture, params)
        hidden = bound(
            tokens,
            visibility=visibility,
            positions=jnp.tile(batch.positions, (1, 2)),
            segment_ids=jnp.tile(batch.segment_ids, (1, 2)),
        )
        return bound.logits(hidden)[:, : batch.tokens.shape[1]]

    return run(model.params, jnp.concatenate([noisy, clean], axis=1))


def noisy_context(blocks):
    """What MaxText trains: later blocks see the noisy copies of earlier ones."""
    twice = jnp.tile(blocks.ids, (1, 2))
    return masks.CopyPair(0, 0) & masks.Groups(twice, "not_later") | masks.CopyPair(1, 1) & masks.Causal()


@pytest.mark.parametrize("causal_clean", [False, True])
def test_T18_noisy_context_blocks(causal_clean):
    """Other noise in block 0 leaves the predictions of block 1 as they are, bit for bit."""
    batch = stubs.make_batch([2], [8], 10)
    blocks = blocks_of(batch, 4, "target")
    noisy = batch.tokens.at[:, 7].set(MASK)
    changed = noisy.at[:, 2:4].set(MASK)

    def logits_of_block_1(tokens, visibility):
        return both_streams(MODEL, tokens, batch.tokens, batch, visibility)[:, 6:]

    right = masks.two_streams(blocks.ids, causal_clean=causal_clean)
    np.testing.assert_array_equal(logits_of_block_1(noisy, right), logits_of_block_1(changed, right))
    wrong = noisy_context(blocks)
    assert not np.allclose(logits_of_block_1(noisy, wrong), logits_of_block_1(changed, wrong))


@pytest.mark.parametrize("first_block", ["target", "example"])
@pytest.mark.parametrize("causal_clean", [False, True])
def test_T19_two_stream_leak(first_block, causal_clean):
    """The Jacobian of block b's noisy logits with respect to the clean embeddings of blocks >= b is exactly zero."""
    batch = stubs.make_batch([2], [7], 9)
    length, size = 9, 3
    # Every slot of both copies has a token of its own, so that rows of the embedding are slots.
    noisy, clean = jnp.arange(20, 20 + length)[None], jnp.arange(5, 5 + length)[None]
    blocks = blocks_of(batch, size, first_block)

    def influence(visibility):
        def logits(embedding):
            params = {**MODEL.params, "embed": {"tokens": embedding}}
            return both_streams(stubs.BoundModel(MODEL.architecture, params), noisy, clean, batch, visibility)[0]

        directions = jax.random.normal(jax.random.key(0), (stubs.VOCAB,))

        @jax.jit
        def jacobian(embedding):
            return jax.jacrev(lambda e: logits(e) @ directions)(embedding)[:, 5 : 5 + length]

        return np.abs(jacobian(MODEL.params["embed"]["tokens"])).max(axis=-1)

    ids = np.asarray(blocks.ids)[0]
    hidden = ids[None, :] >= ids[:, None]
    right = influence(masks.two_streams(blocks.ids, causal_clean=causal_clean))
    assert (right[hidden] == 0).all()
    assert (right[~hidden] > 0).all(), "and every clean token of earlier blocks is seen"
    twice = jnp.tile(blocks.ids, (1, 2))
    leaky = masks.two_streams(blocks.ids) | (masks.CopyPair(0, 1) & masks.Groups(twice, "same"))
    assert (influence(leaky)[hidden] > 0).any(), "the test sees the mistake"


def autoregressive_nll(model, batch):
    """Next-token prediction without MASK, f32[B,T]."""
    hidden = model(batch.tokens, visibility=masks.Causal(), positions=batch.positions, segment_ids=batch.segment_ids)
    targets = Shifted().to_slots(batch.tokens)
    nll = Shifted().to_tokens(model.nll(hidden, targets, forbidden=(MASK,)))
    return jnp.where(batch.target_mask, nll, 0.0)


@pytest.mark.parametrize("block_start", ["clean_context", "seed"])
@pytest.mark.parametrize("first_block", ["target", "example"])
def test_block_size_1_is_the_autoregressive_model(block_start, first_block):
    """Shifted logits: loss (everything masked) and bound are its exact likelihood, with no variance."""
    batch, model = nano_batch(), stubs.nano()
    # With "target" the conditioning is one block that sees itself in both directions, as in a prefix-LM; one
    # conditioning token makes the two alike.
    batch = stubs.make_batch([1, 1], [8, 6], 10) if first_block == "target" else batch
    exact = autoregressive_nll(model, batch)
    objective = make(block_size=1, alignment=Shifted(), block_start=block_start, first_block=first_block)
    np.testing.assert_allclose(stubs.bound(objective, model, batch, KEYS).loss_sum, exact.sum(), rtol=1e-5)
    other = stubs.bound(objective, model, batch, StreamKeys.create(99))
    np.testing.assert_allclose(other.loss_sum, exact.sum(), rtol=1e-5)
    always = objective.with_range(1.0, 1.0)
    terms, _ = stubs.loss_and_grad(always, model, batch, KEYS)
    np.testing.assert_allclose(terms.loss_sum, exact.sum(), rtol=1e-5)
    assert always.bound_kind == "nelbo"


TINY = 7  # PAD, EOS, BOS, one unused, MASK and two tokens of data


def world(length, batch_of=lambda batch: batch):
    """All rows [BOS, x] with x over the vocabulary without MASK."""
    tokens = np.array(list(itertools.product([0, 1, 2, 3, 5, 6], repeat=length)))
    batch = stubs.make_batch([1] * len(tokens), [length] * len(tokens), length + 1)
    return batch.replace(tokens=batch.tokens.at[:, 1:].set(jnp.asarray(tokens, jnp.int32)))


def per_row(objective, model, batch):
    """The bound of each row, by the objective's own draws."""
    blocks = blocks_of(batch, objective.block_size, objective.first_block)

    def run(batch):
        keys = StreamKeys.create(0)
        masked, weights = objective.exact_count(jnp.zeros(batch.tokens.shape), keys, batch, blocks)
        return losses_of(objective, model, batch, blocks, masked, weights).diffusion.sum(axis=1)

    return np.asarray(jax.jit(run)(batch), np.float64)


@pytest.mark.parametrize("fields", [{}, {"alignment": Shifted()}], ids=["same_position", "shifted"])
def test_block_size_1_is_a_distribution(fields):
    """exp(-bound) over all sequences sums to one: nothing is counted twice and nothing leaks."""
    model = stubs.nano(vocab_size=TINY)
    likelihood = np.exp(-per_row(make(block_size=1, **fields), model, world(3)))
    np.testing.assert_allclose(likelihood.sum(), 1.0, rtol=1e-4)


@pytest.mark.parametrize(("fields", "visibility"), [({}, "prefix_blind"), ({"first_block": "example"}, "full")])
def test_one_block_is_masked_diffusion(fields, visibility):
    """Block size = length: the enumerated bound is that of one stream under plain attention, mask by mask."""
    model = stubs.nano(vocab_size=TINY)
    batch = stubs.rows_of(world(4), [3, 700, 900])
    objective = make(block_size=8, **fields)
    got = exact_nll(objective, model, batch)

    @jax.jit
    def plain(masked):
        hidden = model(
            jnp.where(masked, MASK, batch.tokens),
            visibility=named_masks.named_visibility(visibility, batch.target_mask),
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        nll = model.nll(hidden, batch.tokens, forbidden=(MASK,))
        return jnp.where(masked, nll, 0.0).sum(axis=1)

    expected = 0.0
    for count in range(1, 5):
        for chosen in itertools.combinations(range(1, 5), count):
            masked = jnp.zeros(batch.tokens.shape, bool).at[:, jnp.asarray(chosen)].set(True)
            expected += np.asarray(plain(masked), np.float64) / (count * math.comb(4, count))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    terms = stubs.bound(dataclasses.replace(objective, evaluation_draws=400), model, batch, KEYS)
    np.testing.assert_allclose(terms.loss_sum, expected.sum(), rtol=0.03)
    np.testing.assert_allclose(average(objective, model, batch), expected.sum(), rtol=0.05)


def average(objective, model, batch, steps=800):
    """The mean loss over many steps of training."""

    @jax.jit
    def loss(step):
        return jax.lax.map(lambda s: objective.loss(model, batch, StreamKeys.create(1, s)).loss_sum, step)

    return float(np.mean(loss(jnp.arange(steps))))


@pytest.mark.parametrize(
    "fields",
    [
        {"complementary": True},
        {"alignment": Shifted()},
        {"alignment": Shifted(), "block_start": "seed"},
        {"stratified": False, "first_block": "example"},
    ],
    ids=str,
)
@pytest.mark.thorough
def test_training_and_bound_have_the_same_expectation(fields):
    """Bernoulli masks at every rate with 1/rate, exact counts with n/k, complementary pairs, seeds: one number."""
    model, batch = stubs.nano(vocab_size=TINY), stubs.rows_of(world(4), range(0, 1296, 160))
    objective = make(block_size=2, evaluation_draws=200, **fields)
    bound = stubs.bound(objective, model, batch, KEYS).loss_sum
    np.testing.assert_allclose(average(objective, model, batch), bound, rtol=0.05)


@pytest.mark.thorough
def test_the_bound_is_an_upper_bound():
    """Two tokens, one block: the any-order bound by enumeration against the mixture over both orders (Jensen)."""
    model, batch = stubs.nano(vocab_size=TINY), world(2)
    objective = make(block_size=2)
    nelbo = exact_nll(objective, model, batch)
    assert np.exp(-nelbo).sum() < 1 + 1e-5

    blocks = blocks_of(batch, 2, "target")

    def nll(masked):
        masked = jnp.broadcast_to(jnp.asarray(masked), batch.tokens.shape)
        losses = losses_of(objective, model, batch, blocks, masked, jnp.ones(batch.tokens.shape))
        return np.asarray(losses.diffusion, np.float64)

    both, first, second = nll([0, 1, 1]), nll([0, 1, 0]), nll([0, 0, 1])
    by_order = np.stack([both[:, 1] + second[:, 2], both[:, 2] + first[:, 1]])
    exact = -np.log(np.exp(-by_order).mean(axis=0))
    np.testing.assert_allclose(np.exp(-exact).sum(), 1.0, rtol=1e-4)
    assert (nelbo >= exact - 1e-5).all()
    np.testing.assert_allclose(nelbo, by_order.mean(axis=0), rtol=1e-5)


def test_complementary_masks_score_every_token_once():
    table = np.random.default_rng(0).normal(size=(10, stubs.VOCAB)).astype(np.float32)
    table[:, MASK] = -1e9
    batch = nano_batch()
    objective = make(block_size=4, complementary=True, weighting="flat")
    terms = objective.loss(stubs.table_model(table), batch, KEYS)
    log_p = np.asarray(jax.nn.log_softmax(table, axis=-1))
    at = np.broadcast_to(np.arange(10), batch.tokens.shape)
    expected = -log_p[at, np.asarray(batch.tokens)][np.asarray(batch.target_mask)].sum()
    np.testing.assert_allclose(terms.loss_sum, expected, rtol=1e-5)
    assert objective.needs().passes == 4
    seeded = dataclasses.replace(objective, alignment=Shifted(), block_start="seed")
    expected = -log_p[at - 1, np.asarray(batch.tokens)][np.asarray(batch.target_mask)].sum()
    np.testing.assert_allclose(seeded.loss(stubs.table_model(table), batch, KEYS).loss_sum, expected, rtol=1e-5)


def test_joint_training_is_the_two_losses_by_their_weights():
    """Nemotron: next-token prediction on the causal clean copy is the autoregressive loss of the plain row."""
    model, batch = stubs.nano(), nano_batch()
    joint = make(block_size=4, causal_clean=True, next_token=NextToken(1.0, diffusion_weight=0.3))
    alone = dataclasses.replace(joint, next_token=None)
    exact = autoregressive_nll(model, batch).sum()
    terms, _ = stubs.loss_and_grad(joint, model, batch, KEYS)
    diffusion, _ = stubs.loss_and_grad(alone, model, batch, KEYS)
    np.testing.assert_allclose(terms.loss_sum, exact + 0.3 * diffusion.loss_sum, rtol=1e-5)
    balanced = dataclasses.replace(joint, next_token=NextToken(1.0, balanced=True))
    terms, _ = stubs.loss_and_grad(balanced, model, batch, KEYS)
    np.testing.assert_allclose(terms.loss_sum, 2 * diffusion.loss_sum, rtol=1e-5)
    np.testing.assert_allclose(
        stubs.bound(joint, model, batch, KEYS).loss_sum, stubs.bound(alone, model, batch, KEYS).loss_sum, rtol=1e-5
    )


def test_rates_are_keyed_by_example_and_block():
    batch = nano_batch()
    blocks = blocks_of(batch, 2, "target")
    rates = make(block_size=2).block_rates(KEYS, batch, blocks)
    again = make(block_size=2).block_rates(
        KEYS, stubs.rows_of(batch, [1, 0]), blocks_of(stubs.rows_of(batch, [1, 0]), 2, "target")
    )
    np.testing.assert_array_equal(again[::-1], rates)
    assert LEVEL_STREAM.startswith("block")


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 0},
        {"low": 0.5, "high": 0.4},
        {"high": 0.0},
        {"first_block": "row"},
        {"block_start": "noisy"},
        {"weighting": "elbo"},
        {"next_token": NextToken()},
        {"evaluation_draws": 0},
        {"half_life": 0.0},
    ],
)
def test_impossible_settings_are_errors(fields):
    for weights in ({"weight": 0.0}, {"diffusion_weight": -1.0}):
        with pytest.raises(ConfigError):
            NextToken(**weights)
    with pytest.raises(ConfigError):
        make(**fields)
