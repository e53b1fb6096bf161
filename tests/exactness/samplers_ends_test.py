"""Where targets end, what is never written, canvases of ordinary noise, infilling, and settings that are refused."""

import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
import sampler_worlds as worlds
from sampler_rules import KEYS, MASK, PROMPT, RULES, TARGET, decode
from sampler_stubs import canvas, masked

from diffusion_lm.core.alignment import Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.samplers.counts import Fixed, Fraction
from diffusion_lm.samplers.remasking_rates import Capped
from diffusion_lm.samplers.routing import Routed
from diffusion_lm.samplers.stopping import StableAndSure, has_finished_text
from diffusion_lm.samplers.uniform import Renoised, UniformAncestral
from diffusion_lm.samplers.unmasking import Ancestral, EntropyBound, Factor, Ranked, Threshold


def position_model(rows):
    """A network that always says what each slot is: pairs (token, strength) for slots 0, 1, ..."""
    table = np.zeros((12, stubs.VOCAB), np.float32)
    for slot, (token, strength) in enumerate(rows):
        table[slot, token] = strength
    return stubs.table_model(table)


WINDOW = stubs.as_prompt(stubs.make_batch([1], [4], 12))


def test_T47_suppression_after_the_choice():
    """Banned ends are never written and never rank a slot: the ranks are those of what may be written."""
    # Slot 2 is sure of EOS and of little else; without EOS slot 1 is the surest by far.
    table = np.zeros((12, stubs.VOCAB), np.float32)
    table[1, 10], table[2, stubs.EOS], table[2, 11], table[3, 12], table[4, 13] = 6.0, 9.0, 1.0, 4.0, 3.0
    model = stubs.table_model(table)
    fields = {"model": model, "temperature": 0.0, "keep_trace": True}
    banned = decode(Ranked(), WINDOW, forbidden=("eos", "pad"), **fields)
    np.testing.assert_array_equal(banned.tokens[0, 1:5], [10, 11, 12, 13])
    order = (np.asarray(banned.trace.tokens)[:4, 0, 1:5] != MASK).sum(axis=0)
    np.testing.assert_array_equal(order, [4, 1, 3, 2])
    assert banned.lengths[0] == 4
    free = decode(Ranked(), WINDOW, end="free", **fields)
    assert np.asarray(free.trace.tokens)[0, 0, 2] == stubs.EOS
    deferred = decode(Ranked(), WINDOW, end="defer", **fields)
    order = (np.asarray(deferred.trace.tokens)[:4, 0, 1:5] != MASK).sum(axis=0)
    np.testing.assert_array_equal(order, [4, 1, 3, 2], "EOS comes last and ranks nothing")
    np.testing.assert_array_equal(deferred.tokens[0, 1:5], [10, stubs.EOS, 0, 0])


@pytest.mark.parametrize("rule", [Threshold(0.5), EntropyBound(9.0), Factor(9.0), Ranked("random", Fixed(2))], ids=repr)
def test_T47_deferred_ends_wait_for_every_rule(rule):
    model = position_model([(5, 0), (stubs.EOS, 9.0), (11, 1.0), (stubs.PAD, 8.0), (13, 0.5)])
    decoded = decode(rule, WINDOW, model=model, temperature=0.0, keep_trace=True, end="defer")
    written = np.asarray(decoded.trace.tokens)[:, 0, 1:5] != MASK
    text_done = written[:, [1, 3]].all(axis=1)
    assert not written[~text_done][:, [0, 2]].any()
    assert written[-1].all()


def test_T48_early_stop_over_holes():
    """An EOS does not stop a row while slots to its left are open; then it does, and saves the rest."""
    model = position_model([(5, 0), (10, 3.0), (11, 2.0), (stubs.EOS, 9.0), (13, 1.0)])
    prompt = stubs.as_prompt(stubs.make_batch([1], [9], 12))
    decoded = decode(Ranked("confidence", Fixed(1)), prompt, model=model, temperature=0.0, end="stop")
    np.testing.assert_array_equal(decoded.tokens[0, 1:10], [10, 11, stubs.EOS, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(decoded.forward_passes, 3)
    assert decoded.lengths[0] == 2
    free = decode(Ranked("confidence", Fixed(1)), prompt, model=model, temperature=0.0, end="free")
    np.testing.assert_array_equal(free.tokens, decoded.tokens)
    np.testing.assert_array_equal(free.forward_passes, 9)
    tokens = jnp.array([[2, 10, MASK, 1, MASK], [2, 10, 11, 1, MASK], [2, MASK, 11, 12, 13], [1, 10, 11, MASK, MASK]])
    target = jnp.array([[False, True, True, True, True]] * 4)
    np.testing.assert_array_equal(has_finished_text(tokens, target, MASK, stubs.SPECIAL), [False, True, False, False])


def test_T49_last_canvas_renoised():
    """At the step cap the uniform-noise canvas is the argmax everywhere, and not what was just renoised."""
    table = np.zeros((12, stubs.VOCAB), np.float32)
    table[:, 20] = 1.0
    model, rule = stubs.table_model(table), Renoised(EntropyBound(0.1), final_temperature=0.4)
    capped = canvas(rule, steps=3, temperature=0.8, keep_trace=True)
    decoded = stubs.generate(capped, model, PROMPT, KEYS)
    assert (np.asarray(decoded.tokens)[TARGET] == 20).all()
    noisy = np.asarray(decoded.trace.tokens)[:2][:, TARGET]
    assert (noisy != 20).mean() > 0.8, "before that most of it is noise"
    assert (noisy[0] != noisy[1]).mean() > 0.8, "drawn anew in every step"


def test_a_canvas_that_is_stable_and_sure_stops():
    table = np.zeros((12, stubs.VOCAB), np.float32)
    table[:, 20] = 30.0
    rule = Renoised(EntropyBound(0.1, tempered=True))
    stopped = canvas(rule, steps=9, temperature=0.8, stop=StableAndSure())
    decoded = stubs.generate(stopped, stubs.table_model(table), PROMPT, KEYS)
    assert (np.asarray(decoded.tokens)[TARGET] == 20).all()
    np.testing.assert_array_equal(decoded.forward_passes, 2)
    unsure = stubs.generate(stopped, stubs.table_model(table / 6), PROMPT, KEYS)
    np.testing.assert_array_equal(unsure.forward_passes, 9)


@pytest.mark.parametrize("name", ["low_confidence", "ancestral", "rdm", "shifted"])
def test_infilling_any_pattern_of_fixed_and_free_positions(name):
    """Fixed text between free slots stands, is seen, and what is free is filled; blocks count free slots only."""
    rule = RULES.get(name, Ranked())
    prompt = stubs.make_batch([2, 2], [9, 7], 12)
    holes = np.asarray(prompt.target_mask) & (np.arange(12) % 3 != 1)
    prompt = prompt.replace(target_mask=jnp.asarray(holes))
    fields = {"forbidden": ("eos", "pad"), "block": 2} | ({"alignment": Shifted()} if name == "shifted" else {})
    decoded = decode(rule, prompt, stubs.nano(), **fields)
    tokens, fixed = np.asarray(decoded.tokens), np.asarray(prompt.tokens)
    np.testing.assert_array_equal(tokens[~holes], fixed[~holes])
    assert not np.isin(tokens[holes], [MASK, stubs.EOS, stubs.PAD]).any()
    np.testing.assert_array_equal(decoded.lengths, holes.sum(axis=1))
    other = prompt.replace(tokens=jnp.where(~prompt.target_mask & (jnp.arange(12) == 7), 33, prompt.tokens))
    assert (np.asarray(decode(rule, other, stubs.nano(), **fields).tokens)[holes] != tokens[holes]).any(), (
        "text on the right is seen"
    )


def test_infilling_follows_the_exact_conditional():
    """Given the ends of three slots, the middle is drawn from its conditional."""
    world = worlds.World.random(3, 3, seed=4)
    prompt = worlds.prompts(world, 6000)
    tokens = prompt.tokens.at[:, 1:].set(jnp.array([2, 0, 1]))
    prompt = prompt.replace(tokens=tokens, target_mask=prompt.target_mask.at[:, [1, 3]].set(False))
    decoded = stubs.generate(masked(Ancestral(), steps=2), world.model, prompt, KEYS)
    written = np.asarray(decoded.tokens)[:, 1:]
    assert (written[:, [0, 2]] == [2, 1]).all()
    law = world.probs[0, world.code(np.array([2, 3, 1])), 1]
    assert worlds.follows(np.bincount(written[:, 1], minlength=3), law)


def test_T35_mask_id():
    """MASK is never written, however likely the network finds it, and whatever else is forbidden."""
    model = position_model([(MASK, 20.0)] * 12)
    for rule in (Ancestral(), Threshold(0.5), Routed()):
        tokens = np.asarray(decode(rule, model=model, steps=4, forbidden=(7,)).tokens)[TARGET]
        assert not np.isin(tokens, [MASK, 7]).any()


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (masked, {"steps": 0}),
        (masked, {"block": -1}),
        (masked, {"end": "cut"}),
        (masked, {"unmask": UniformAncestral()}),
        (masked, {"unmask": Routed(), "end": "stop"}),
        (canvas, {"update": Routed()}),
        (canvas, {"update": Renoised(final_temperature=0.5), "temperature": 0.0}),
        (canvas, {"update": UniformAncestral(), "guidance": 1.0, "top_p": 0.9}),
    ],
)
def test_impossible_settings_of_samplers_are_errors(build, fields):
    rule = {"unmask": Ancestral()} if build is masked else {"update": UniformAncestral()}
    with pytest.raises(ConfigError):
        build(**(rule | fields))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Ancestral(last_time=1.0),
        lambda: Ranked("probability"),
        lambda: Ranked(order_temperature=-1.0),
        lambda: Threshold(1.5),
        lambda: Factor(0.0),
        lambda: EntropyBound(-0.1),
        lambda: Fixed(0),
        lambda: Fraction(0.0),
        lambda: Capped(2.0),
        lambda: Renoised(final_temperature=0.0),
        lambda: Routed(noise=-1.0),
        lambda: StableAndSure(-1.0),
    ],
)
def test_impossible_settings_of_rules_are_errors(build):
    with pytest.raises(ConfigError):
        build()
