"""Self-speculation writes the tokens of the autoregressive sampler, at every temperature, in fewer passes."""

import dataclasses

import gin_objects
import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest
from sampler_stubs import left_to_right, speculative, without_ends

from diffusion_lm.core.alignment import SamePosition, Shifted
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.nn.masks import two_streams
from diffusion_lm.samplers.incremental import CachedNetwork
from diffusion_lm.samplers.speculation import _Cycle, _State
from diffusion_lm.samplers.window import Window

MASK = 4
KEYS = StreamKeys.create(9)
PROMPT = without_ends(stubs.as_prompt(stubs.make_batch([2, 5, 3, 4, 1], [12, 6, 10, 1, 14], 15)))
MODEL = stubs.nano(**stubs.QUICK)
FORMS = {
    "nemotron": {"drafts": "bidirectional", "alignment": SamePosition()},
    "shifted": {"drafts": "bidirectional", "alignment": Shifted()},
    "introspective": {"drafts": "causal", "alignment": Shifted(), "strided": True},
    "strided": {"drafts": "bidirectional", "alignment": SamePosition(), "strided": True},
}


def both(model, prompt, form, draft, **fields):
    expected = stubs.generate(left_to_right(**fields), model, prompt, KEYS)
    return expected, stubs.generate(speculative(draft=draft, **FORMS[form], **fields), model, prompt, KEYS)


@pytest.mark.parametrize(
    ("temperature", "draft"), [pytest.param(0.0, 5, marks=pytest.mark.thorough), (1.0, 3)], ids=["greedy", "draws"]
)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_autoregressive_decode(form, temperature, draft):
    """Token for token, with its scores; a random network accepts some drafts and rejects others."""
    expected, decoded = both(MODEL, PROMPT, form, draft, temperature=temperature)
    np.testing.assert_array_equal(decoded.tokens, expected.tokens)
    np.testing.assert_array_equal(decoded.lengths, expected.lengths)
    np.testing.assert_allclose(decoded.scores, expected.scores, rtol=1e-4)
    assert decoded.forward_passes[0] <= expected.forward_passes[0] + 1


@pytest.mark.parametrize("form", ["nemotron", "introspective"])
def test_rows_end_where_the_autoregressive_decode_ends(form):
    """Ends at many places, inside accepted drafts too; rows that are done do not change while others go on."""
    prompt = stubs.as_prompt(stubs.make_batch([1, 2, 3, 4] * 5, [11, 10, 9, 8] * 5, 12))
    prompt = prompt.replace(special=SpecialTokens(stubs.VOCAB, eos_id=9, pad_id=13, mask_id=MASK))
    expected, decoded = both(MODEL, prompt, form, 4, temperature=1.5)
    np.testing.assert_array_equal(decoded.tokens, expected.tokens)
    np.testing.assert_allclose(decoded.scores, expected.scores, rtol=1e-4)
    assert len(set(np.asarray(decoded.lengths).tolist())) > 4


def test_an_encoder_decoder_speculates():
    model = stubs.nano_encoder_decoder(**stubs.QUICK)
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1] * 3, [8, 3, 6], 11, encoder=True)))
    for form in ("nemotron", "introspective"):
        expected, decoded = both(model, prompt, form, 4)
        np.testing.assert_array_equal(decoded.tokens, expected.tokens)


class Sure(stubs.TableArchitecture):
    """One certain token a slot, wherever it stands; it has nothing to cache."""

    def init_cache(self, batch, length):
        return jnp.zeros(())


class Misled(Sure):
    """Says something else where it reads MASK: every draft is wrong."""

    def hidden(self, params, inputs):
        hidden = super().hidden(params, inputs)
        sign = jnp.where(inputs.tokens == MASK, -1.0, 1.0)
        return hidden.replace(values_BTD=sign[..., None] * hidden.values_BTD)


@pytest.mark.parametrize(
    ("form", "network", "passes"),
    [
        # Of 14 tokens the prefill writes 1, and a cycle of two passes 5, or 2 where no draft is right.
        ("shifted", Sure, 1 + 2 * 3),
        ("shifted", Misled, 1 + 2 * 7),
        # A pass writes 4, the first one, which has nothing to verify, 1; or always 1.
        ("introspective", Sure, 1 + 1 + 3),
        ("introspective", Misled, 1 + 13),
    ],
)
def test_passes_of_perfect_and_of_hopeless_drafts(form, network, passes):
    prompt = without_ends(stubs.as_prompt(stubs.make_batch([1], [14], 15)))
    slots = np.arange(16)
    table = np.full((16, stubs.VOCAB), -30.0, np.float32)
    table[slots, 5 + slots % 7] = 30.0
    model = stubs.BoundModel(network(table), {})
    decoded = stubs.generate(speculative(draft=4, **FORMS[form]), model, prompt, KEYS)
    np.testing.assert_array_equal(np.asarray(decoded.tokens)[0, 1:], 5 + slots[:14] % 7)
    assert decoded.forward_passes[0] == passes


@dataclasses.dataclass(frozen=True)
class Recording(stubs.BoundModel):
    """Keeps the states of each pass."""

    seen: list = dataclasses.field(default_factory=list)

    def __call__(self, tokens, **inputs):
        hidden = super().__call__(tokens, **inputs)
        self.seen.append(hidden.values_BTD)
        return hidden


@pytest.mark.parametrize(("form", "causal"), [("nemotron", False), ("introspective", True)])
def test_a_draft_sees_what_a_block_of_training_showed(form, causal):
    """The states of MASK behind a prompt are those of the noisy copy of that block, all of it MASK."""
    size, batch = 4, stubs.make_batch([4, 4], [8, 8], 12)
    prompt, sampler = without_ends(stubs.as_prompt(batch)), speculative(draft=4, **FORMS[form])

    @jax.jit
    def drafted(prompt):
        model, window = Recording(MODEL.architecture, MODEL.params), Window.of(prompt)
        _, cache = CachedNetwork(model, prompt, window, "causal").prefill(prompt.tokens, None)
        nothing = jnp.zeros(2, jnp.int32)
        state = _State(
            canvas=prompt.tokens,
            count=nothing,
            drafts=jnp.zeros((2, size - 1), jnp.int32),
            drafted=jnp.zeros(2, bool),
            done=jnp.zeros(2, bool),
            scores=jnp.zeros(2),
            calls=jnp.ones((), jnp.int32),
            cache=cache,
            trace=None,
        )
        cycle = _Cycle(sampler, model, prompt, window, KEYS, None)
        model.seen.clear()
        (cycle.strided if sampler.strided else cycle.draft_and_verify)(state)
        return model.seen[0][:, 1 : 1 + size]

    @jax.jit
    def trained(batch):
        return MODEL(
            jnp.concatenate([jnp.where(batch.target_mask, MASK, batch.tokens), batch.tokens], axis=1),
            visibility=two_streams(batch.positions // size, causal_noisy=causal, causal_clean=True),
            positions=jnp.tile(batch.positions, (1, 2)),
            segment_ids=jnp.tile(batch.segment_ids, (1, 2)),
        ).values_BTD[:, size : 2 * size]

    np.testing.assert_allclose(drafted(prompt), trained(batch), atol=2e-5)


@pytest.mark.parametrize("name", ["self_speculation", "introspective"])
def test_files_of_one_method_agree(name):
    sampler = gin_objects.build(gin_objects.GIN / "samplers" / f"{name}.gin", "SAMPLER")
    method = {"self_speculation": "nemotron"}.get(name, name)
    objective = gin_objects.build(gin_objects.GIN / "objectives" / f"{method}.gin", "OBJECTIVE")
    assert objective.causal_clean
    assert objective.next_token.weight > 0
    assert (objective.alignment, objective.block_size) == (sampler.alignment, sampler.draft)
    assert objective.causal_noisy == (sampler.drafts == "causal")


@pytest.mark.parametrize("fields", [{"draft": 1}, {"drafts": "noisy"}, {"temperature": -1.0}, {"top_p": 0.0}], ids=str)
def test_impossible_settings_are_errors(fields):
    with pytest.raises(ConfigError):
        speculative(**fields)
