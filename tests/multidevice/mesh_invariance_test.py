"""Every layout and every sampler on eight devices: neither gradients nor decoded tokens depend on the mesh.

The training step itself, with its microbatches, is in `training_test.py`.
"""

import functools

import jax
import numpy as np
import pytest

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.exponents import WithTokenSchedules
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.evaluation.generation import compiled_generate
from diffusion_lm.evaluation.likelihood import compiled_bound
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.noise.time_sampling import UniformTime
from diffusion_lm.objectives.annealing import MaskAnnealing
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.objectives.token_schedules import TokenSchedules
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.parallel.rules import LogicalRules
from diffusion_lm.parallel.shardings import Placement, place_batch, replicated, tree_shardings
from diffusion_lm.samplers.autoregressive import AutoregressiveSampler
from diffusion_lm.samplers.canvas import CanvasSampler
from diffusion_lm.samplers.decoding import Decoding

RULES = LogicalRules()
ALONE = MeshSpec(data=1, fsdp=1)
MESHES = [MeshSpec(fsdp=4, tensor=2), MeshSpec(data=2, fsdp=2, sequence=2)]
ROWS, LENGTH = 16, 12
FIELDS = dict(vocab_size=50, num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64)
DROPOUT = {"dropout_rate": 0.1, "attention_dropout_rate": 0.2}
MODELS = {
    "single_stream": SingleStream(
        TransformerSpec(**FIELDS, position="rope", mlp="swiglu", attention_scale="inverse_sqrt", **DROPOUT)
    ),
    "encoder_decoder": EncoderDecoder(TransformerSpec(**FIELDS, encoder_layers=1, tied_embeddings=False)),
}
MODELS["reads_predictions"] = SingleStream(TransformerSpec(**FIELDS, self_conditioning=True))
MODELS["scheduled"] = WithTokenSchedules(SingleStream(TransformerSpec(**FIELDS)))
OBJECTIVES = {
    "autoregressive": Autoregressive(),
    "diffusion": Sundae(),
    "annealed": Sundae(unrolls=0, annealing=MaskAnnealing(steps=8)),
    "fed_back": Sundae(unrolls=0, self_conditioning=0.5),
    "scheduled": TokenSchedules(time=UniformTime(low=0.2)),
}


def _batch(encoder: bool = False) -> Batch:
    """Ragged rows: another number of scored tokens in each, so that a mean of means would differ."""
    random = np.random.default_rng(0)
    slots = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    used = random.integers(3, LENGTH + 1, (ROWS, 1))
    target = (slots >= random.integers(1, 3, (ROWS, 1))) & (slots < used)
    filled = (slots < used).astype(np.int32)
    tokens = (random.integers(5, 50, slots.shape) * filled).astype(np.int32)
    return Batch(
        tokens=tokens,
        target_mask=target,
        loss_weights=target.astype(np.float32),
        segment_ids=filled,
        positions=slots,
        example_ids=np.repeat(np.arange(ROWS, dtype=np.uint32)[:, None], LENGTH, axis=1),
        special=SpecialTokens(50, mask_id=4),
        encoder=EncoderInputs(tokens=tokens[::-1], segment_ids=filled[::-1], positions=slots) if encoder else None,
    )


@functools.cache
def _loss_and_gradient(model_name: str, objective_name: str, spec: MeshSpec):
    model, objective = MODELS[model_name], OBJECTIVES[objective_name]
    mesh = spec.build(jax.devices()[: 1 if spec == ALONE else 8])
    shardings = tree_shardings(model.logical_axes(), model.abstract_params(), RULES, mesh)
    constrain = Placement(mesh, RULES)

    def loss(params, batch, keys):
        return objective.loss(BoundModel(model, params, constrain), batch, keys).loss

    params = jax.device_put(model.init(jax.random.key(1)), shardings)
    batch = place_batch(_batch(model.needs_encoder), RULES, mesh)
    return jax.jit(jax.value_and_grad(loss), out_shardings=(replicated(mesh), shardings))(
        params, batch, StreamKeys.create(0, 3)
    )


@pytest.mark.parametrize("spec", MESHES, ids=str)
@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ("single_stream", "autoregressive"),
        pytest.param("encoder_decoder", "diffusion", marks=pytest.mark.thorough),
        ("single_stream", "annealed"),
    ],
)
def test_T27_loss_and_gradient_do_not_depend_on_the_mesh(model, objective, spec):
    value, gradient = _loss_and_gradient(model, objective, spec)
    expected, expected_gradient = _loss_and_gradient(model, objective, ALONE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, expected_gradient)


@pytest.mark.thorough
def test_predictions_that_are_fed_back_do_not_depend_on_the_mesh():
    """The fresh layer adds nothing yet; its last matrix has a gradient, and that is made of what it read."""
    spec = MeshSpec(data=2, fsdp=2, tensor=2)
    _, gradient = _loss_and_gradient("reads_predictions", "fed_back", spec)
    _, expected = _loss_and_gradient("reads_predictions", "fed_back", ALONE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, expected)
    assert np.abs(np.asarray(expected["self_conditioning"]["mlp"]["down"])).max() > 1e-4


@pytest.mark.thorough
def test_learned_schedules_do_not_depend_on_the_mesh():
    """Exponents are split over the vocabulary, the draws and the two draws' difference are the example's own."""
    value, gradient = _loss_and_gradient("scheduled", "scheduled", MeshSpec(data=2, fsdp=2, tensor=2))
    expected_value, expected = _loss_and_gradient("scheduled", "scheduled", ALONE)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    assert np.abs(np.asarray(expected["exponents"]["raw"])).max() > 1e-2


def test_parameters_are_split_over_the_mesh():
    _, gradient = _loss_and_gradient("single_stream", "autoregressive", MeshSpec(fsdp=4, tensor=2))
    shares = {leaf.size // leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(gradient)}
    assert 8 in shares, "no parameter is split over all eight devices"


@pytest.mark.parametrize(
    "sampler",
    [AutoregressiveSampler(decoding=Decoding(temperature=0.7)), CanvasSampler(steps=3, candidates=2)],
    ids=["autoregressive", "diffusion"],
)
def test_decoded_tokens_do_not_depend_on_the_mesh(sampler):
    model = MODELS["single_stream"]
    batch = _batch()
    prompt = batch.replace(tokens=np.where(batch.target_mask, 0, batch.tokens).astype(np.int32))

    def decode(spec):
        mesh = spec.build(jax.devices()[: 1 if spec == ALONE else 8])
        shardings = tree_shardings(model.logical_axes(), model.abstract_params(), RULES, mesh)
        constrain = Placement(mesh, RULES)
        params = jax.device_put(model.init(jax.random.key(1)), shardings)
        rows = constrain.rows(prompt)
        tokens = compiled_generate(model, sampler, constrain)(params, rows, StreamKeys.create(0)).tokens
        assert tokens.is_fully_replicated, "every process can read it"
        assert rows.tokens.is_fully_replicated == (mesh.size == 1), "devices share the rows"
        return np.asarray(tokens)

    np.testing.assert_array_equal(decode(MeshSpec(data=2, fsdp=2, tensor=2)), decode(ALONE))


def test_a_bound_does_not_depend_on_the_mesh():
    model, objective, batch = MODELS["single_stream"], OBJECTIVES["diffusion"], _batch()
    losses = []
    for spec in (ALONE, MeshSpec(data=2, fsdp=2, tensor=2)):
        constrain = Placement(spec.build(jax.devices()[: 1 if spec == ALONE else 8]), RULES)
        params = jax.device_put(
            model.init(jax.random.key(1)),
            tree_shardings(model.logical_axes(), model.abstract_params(), RULES, constrain.mesh),
        )
        terms = compiled_bound(model, objective, constrain)(params, constrain.rows(batch), StreamKeys.create(0))
        assert terms.loss_sum.is_fully_replicated
        losses.append(float(terms.loss_sum))
    np.testing.assert_allclose(*losses, rtol=1e-5)
