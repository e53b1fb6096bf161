"""A network whose layers were taken out of their stack for a sampler's loop is the same network."""

import jax
import jax.numpy as jnp
import model_stubs as stubs
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.lora import WithLoRA
from diffusion_lm.nn.masks import Full

UNROLLED = {"scan_layers": False}


def models():
    plain, pair = stubs.nano(**UNROLLED), stubs.nano_encoder_decoder(**UNROLLED)
    adapted = WithLoRA(plain.architecture, rank=2)
    fresh = adapted.init(jax.random.key(1))["lora"]
    trained = jax.tree.map(lambda leaf: leaf + 0.1, fresh)
    return {
        "single_stream": plain,
        "encoder_decoder": pair,
        "adapters": BoundModel(adapted, {**plain.params, "lora": trained}),
    }


@pytest.mark.parametrize("name", ["single_stream", "encoder_decoder", "adapters"])
def test_logits_are_equal(name):
    model = models()[name]
    batch = stubs.make_batch([2, 5, 3], [6, 2, 4], 11, encoder=model.architecture.needs_encoder)

    def logits(model):
        encoder = batch.encoder if batch.encoder is None else model.encode(batch.encoder)
        inputs = dict(positions=batch.positions, segment_ids=batch.segment_ids, encoder=encoder)
        return model.logits(model(jnp.asarray(batch.tokens), visibility=Full(), **inputs))

    apart = model.for_loops()
    assert all(isinstance(leaf, tuple) for leaf in apart.params["blocks"]["mlp"].values())
    np.testing.assert_allclose(logits(apart), logits(model), rtol=1e-6, atol=1e-6)


def test_scanned_layers_stay_stacked():
    model = stubs.nano(scan_layers=True)
    assert model.for_loops() is model
