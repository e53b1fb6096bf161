"""In training no array holds the cross-attention keys or values of all layers."""

import re

import jax
import model_stubs as stubs

from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.objectives.sundae import Sundae

LAYERS, ROWS = 3, 4


def test_sundae_keeps_no_keys_of_all_layers_of_an_encoder_decoder():
    model = stubs.nano_encoder_decoder(num_layers=LAYERS, remat="full")
    batch = stubs.make_batch([1] * ROWS, [9] * ROWS, 10, encoder=True)

    def loss(params):
        bound = stubs.BoundModel(model.architecture, params)
        return Sundae().loss(bound, batch, StreamKeys.create(0), train=True).loss_sum

    program = str(jax.make_jaxpr(jax.grad(loss))(model.params))
    heads, head_dim = model.spec.num_heads, model.spec.head_dim
    all_layers = rf"f32\[{LAYERS},{ROWS},{stubs.SOURCE_LENGTH},{heads},{head_dim}\]"
    assert re.search(rf"f32\[{ROWS},{stubs.SOURCE_LENGTH},{heads},{head_dim}\]", program), "each layer projects its own"
    assert not re.search(all_layers, program)
