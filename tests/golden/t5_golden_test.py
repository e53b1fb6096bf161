"""Logits of imported encoder-decoders equal those that `transformers` computed, without torch."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from huggingface_cases import FOLDER, TOLERANCE, difference
from t5_cases import GOLDEN, our_logits

from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.interop.huggingface import Specials, load, save

ARRAYS = {name: safetensors.numpy.load_file(FOLDER / name / "golden.safetensors") for name in GOLDEN}


@pytest.fixture(scope="module")
def imported():
    return {name: load(FOLDER / name) for name in GOLDEN}


def _difference(name, ours, rows=slice(None)) -> float:
    return difference(ours, ARRAYS[name]["logits"][rows], ARRAYS[name]["target_mask"][rows])


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name, imported):
    arrays = ARRAYS[name]
    assert _difference(name, our_logits(imported[name], arrays)) < TOLERANCE
    # The comparison means something: the logits are far from 0 and depend on the order of both streams.
    assert np.abs(arrays["logits"]).max() > 1
    first = slice(0, 1)
    for stream in ("source", "target"):
        reversed_text = our_logits(imported[name], arrays | {stream: arrays[stream][:, ::-1]}, first)
        assert _difference(name, reversed_text, first) > 0.1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("t5", {"tied_logit_scale": False}),
        ("t5", {"relative_bidirectional": True}),
        ("t5", {"relative_max_distance": 40}),
        ("t5", {"attention_scale": "inverse_sqrt"}),
        ("t5", {"mlp": "gelu"}),
        ("t5_1_1", {"gelu": "exact"}),
        ("t5_1_1", {"norm_eps": 1e-6}),
        ("t5_1_1", {"mlp": "swiglu"}),
        ("mt5", {"relative_bidirectional": True}),
        ("umt5", {"relative_bidirectional": True}),
        ("umt5", {"relative_max_distance": 40}),
        ("umt5", {"tied_logit_scale": False}),
    ],
)
def test_the_comparison_sees_each_field(name, changes, imported):
    """A network that differs in one field fails the comparison, so the field does what the family means by it."""
    source = imported[name]
    other = EncoderDecoder(dataclasses.replace(source.architecture.spec, **changes))
    ours = our_logits(dataclasses.replace(source, architecture=other), ARRAYS[name])
    assert _difference(name, ours) > TOLERANCE


def test_what_is_read_from_the_configs(imported):
    specs = {name: one.architecture.spec for name, one in imported.items()}
    assert (specs["t5"].encoder_layers, specs["t5"].num_layers) == (2, 3)
    assert {name for name, spec in specs.items() if spec.tied_embeddings} == {"t5", "umt5"}
    assert {name for name, spec in specs.items() if spec.relative_per_layer} == {"umt5"}
    assert {name: spec.mlp for name, spec in specs.items()} == dict.fromkeys(specs, "geglu") | {"t5": "relu"}
    assert all(one.causal and one.specials == Specials(0, 0, (1,)) for one in imported.values())
    assert {one.family for one in imported.values()} == {"t5", "mt5", "umt5"}


@pytest.mark.parametrize("name", GOLDEN)
def test_export_writes_what_was_read(name, imported, tmp_path):
    kind = json.loads((FOLDER / name / "config.json").read_text())["model_type"]
    source = imported[name]
    assert save(tmp_path / "out", source.architecture, source.params, family=kind) == kind
    before = safetensors.numpy.load_file(FOLDER / name / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == set(before)
    for tensor in before:
        np.testing.assert_array_equal(after[tensor], before[tensor], err_msg=tensor)
    again = load(tmp_path / "out")
    assert again.architecture == source.architecture
    np.testing.assert_array_equal(our_logits(source, ARRAYS[name]), our_logits(again, ARRAYS[name]))


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.thorough
def test_decoding_from_a_cache_is_the_same_network(name, imported):
    """The causal buckets of one slot at a time are those of the whole row."""
    import jax.numpy as jnp

    from diffusion_lm.architectures.base import BoundModel
    from diffusion_lm.core.types import EncoderInputs
    from diffusion_lm.nn.masks import Causal

    arrays, source = ARRAYS[name], imported[name]
    ids, mask = jnp.asarray(arrays["source"][:1]), jnp.asarray(arrays["source_mask"][:1])
    model = BoundModel(source.architecture, source.params)
    encoder = model.encode(EncoderInputs(ids, mask, jnp.arange(ids.shape[1])[None]))
    target = jnp.asarray(arrays["target"][:1])
    length = target.shape[1]
    cache = model.init_cache(1, length)
    found = []
    for slot in range(length):
        hidden = model(
            target[:, slot : slot + 1],
            visibility=Causal(),
            positions=jnp.full((1, 1), slot, jnp.int32),
            segment_ids=jnp.ones((1, length), jnp.int32),
            encoder=encoder,
            cache=cache,
        )
        cache = hidden.cache
        found.append(np.asarray(model.logits(hidden))[0, 0])
    assert np.abs(np.stack(found) - arrays["logits"][0]).max() < TOLERANCE
