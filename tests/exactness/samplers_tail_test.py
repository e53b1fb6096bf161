"""Large vocabularies: the tail that float32 Gumbel noise loses, and draws that are made only where they are needed."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import masked, without_ends

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.nn import cross_entropy
from diffusion_lm.noise.process import Absorbing
from diffusion_lm.samplers.counts import Fixed
from diffusion_lm.samplers.unmasking import Ancestral, Ranked, Threshold
from diffusion_lm.samplers.view import View

pytestmark = pytest.mark.thorough

V, HEAD, MASK = 8192, 8, 8192
KEYS = StreamKeys.create(3)


def half_in_the_tail(V=V):
    """log p: eight tokens share one half, all others the other half; MASK is last."""
    logits = np.full(V + 1, -np.log(2 * (V - HEAD)), np.float32)
    logits[:HEAD] = -np.log(2 * HEAD)
    return logits


def naive_joint_step(key, draws, delta):
    """The faulty variant: one float32 Gumbel-argmax over V tokens of mass `delta` and MASK of mass 1 - delta."""
    logits = np.append(half_in_the_tail()[:V] + np.log(delta), np.log1p(-delta)).astype(np.float32)

    def one(key):
        uniform = jax.random.uniform(key, (V + 1,), minval=np.finfo(np.float32).tiny)
        return jnp.argmax(logits - jnp.log(-jnp.log(uniform)))

    return jax.lax.map(one, jax.random.split(key, draws), batch_size=512)


def test_T01_gumbel_float32_truncation_and_T02_joint_draw_over_mask_state():
    """Steps that reveal one token in two thousand: the joint draw loses the tail, the coin loses nothing."""
    delta, tokens = 5e-4, 30_000
    drawn = np.asarray(jax.jit(naive_joint_step, static_argnums=(1, 2))(jax.random.key(0), tokens, delta))
    from_tail = ((drawn != MASK) & (drawn >= HEAD)).sum()
    assert from_tail < 0.3 * delta * tokens / 2, "half of the reveals should come from the tail"

    # The sampler's first step of two thousand: the coin is a float32 uniform, the token a draw of its own.
    rows, length = 1600, 101
    prompt = stubs.as_prompt(stubs.make_batch([1] * rows, [length - 1] * rows, length))
    rule = Ancestral()
    from_coin = jax.jit(lambda view: rule.decide(view).sample)
    active = prompt.target_mask
    keys = KEYS.per_token("sampler/rule", prompt.example_ids, prompt.positions)
    ones = jnp.ones(rows, jnp.int32)
    view = View(
        prompt.tokens, active, active, 0 * ones, 2000 * ones, jnp.zeros(active.shape), keys, Absorbing(), V + 1, MASK
    )
    write = np.asarray(from_coin(view))
    expected = delta * rows * (length - 1)
    assert abs(write.sum() - expected) < 4 * np.sqrt(expected)


def test_T01_tail_mass_of_written_tokens():
    """All that a decode writes, against the exact law: eight likely tokens, and the tail in eight bins."""
    rows, length, size = 250, 9, 2048
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * rows, [length - 1] * rows, length)), size)
    model = stubs.table_model(np.tile(half_in_the_tail(size), (length, 1)))
    sampler = masked(Ancestral(), steps=6)
    tokens = np.asarray(stubs.generate(sampler, model, prompt, KEYS).tokens)[:, 1:].ravel()
    counts = np.append(np.bincount(tokens[tokens < HEAD], minlength=HEAD), np.histogram(tokens, 8, (HEAD, size))[0])
    expected = np.full(16, len(tokens) / 16)
    assert ((counts - expected) ** 2 / expected).sum() < 37.7, "99.9 % quantile of chi-square, 15 degrees of freedom"


class SeenSlots:
    """Wraps `chunked_token_stats` and notes how many slots it was asked to draw for."""

    def __init__(self, monkeypatch):
        self.counts = []
        original = cross_entropy.chunked_token_stats

        def noted(*args, where_BT=None, **fields):
            jax.debug.callback(lambda n: self.counts.append(int(n)), jnp.sum(where_BT))
            return original(*args, where_BT=where_BT, **fields)

        monkeypatch.setattr(cross_entropy, "chunked_token_stats", noted)

    def total(self):
        jax.effects_barrier()
        return sum(self.counts)


@pytest.mark.parametrize(
    "rule", [Ancestral(), Ranked("random", Fixed(1)), Threshold(0.9)], ids=lambda r: type(r).__name__
)
def test_T03_noise_where_not_needed(rule, monkeypatch):
    """Rules that ignore logits draw for the slots that they unmask alone, other rules for masked slots alone."""
    seen = SeenSlots(monkeypatch)
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * 5, [6] * 5, 7)), 11)
    table = np.zeros((7, 12), np.float32)
    stubs.generate(masked(rule), stubs.counting(stubs.table_model(table)), prompt, KEYS)
    slots = 5 * 6
    assert seen.total() == (slots if rule.ignores_logits else 5 * (6 + 5 + 4 + 3 + 2 + 1))
    assert 0 not in seen.counts
    assert len(seen.counts) <= 6 if type(rule) is Ancestral else len(seen.counts) == 6


def test_T03_drawing_less_changes_no_draw():
    """Tokens of a rule that ignores logits stay the same if all masked slots draw ("defer", and no ends)."""
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1, 3, 2], [8, 3, 6], 9)))
    for rule in (Ancestral(), Ranked("random", Fixed(2))):
        few, all_of_them = (
            stubs.generate(masked(rule, end=end, steps=5, candidates=2), stubs.nano(), prompt, KEYS)
            for end in ("free", "defer")
        )
        np.testing.assert_array_equal(few.tokens, all_of_them.tokens)
