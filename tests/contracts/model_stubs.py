"""Small models and batches for tests of objectives and samplers: tables with known answers, a counting network."""

import dataclasses
import gc
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.architectures.base import BoundModel, Hidden
from diffusion_lm.architectures.encoder_decoder import EncoderDecoder
from diffusion_lm.architectures.exponents import WithTokenSchedules
from diffusion_lm.architectures.length_head import WithLengthHead
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch, EncoderInputs
from diffusion_lm.nn.head import Head
from diffusion_lm.nn.transformer import TransformerSpec

VOCAB = 40
PAD, EOS, BOS = 0, 1, 2
SPECIAL = SpecialTokens(VOCAB, pad_id=PAD, eos_id=EOS, bos_id=BOS, mask_id=4)
SOURCE_LENGTH = 6


@dataclasses.dataclass(frozen=True, eq=False)
class TableArchitecture:
    """A network that does not look: slot i always has the logits `table[i]`, or those of its own token.

    Attributes:
      table: f32[T,V], or f32[V,V] with `by_token`, where row v holds the logits of a slot whose input token is v.
      by_token: see `table`.
    """

    table: np.ndarray
    by_token: bool = False
    needs_encoder: bool = False

    @property
    def spec(self) -> Any:
        return types.SimpleNamespace(
            vocab_size=self.table.shape[1], logits_chunk=4096, self_conditioning=False, time_conditioning=False
        )

    def hidden(self, params, inputs):
        rows = inputs.tokens if self.by_token else inputs.positions
        return Hidden(jnp.asarray(self.table, jnp.float32)[rows], inputs.cache)

    def head(self, params):
        return Head(jnp.eye(self.table.shape[1]), vocab_size=self.table.shape[1])


def table_model(table, by_token=False) -> BoundModel:
    return BoundModel(TableArchitecture(np.asarray(table, np.float32), by_token), {})


def nano_spec(**changes) -> TransformerSpec:
    fields = {"vocab_size": VOCAB, "num_layers": 2, "model_dim": 32, "num_heads": 2, "head_dim": 16, "mlp_dim": 64}
    return TransformerSpec(**(fields | changes))


QUICK = {"num_layers": 1, "scan_layers": False}
"""Fields of a network that compiles in half the time, for tests that compile one program after the other."""

_nano: dict[Any, Any] = {}


def nano(**changes) -> BoundModel:
    """A random network, sharpened so that its predictions differ and do not tie; none of its layers is idle."""
    spec = nano_spec(**changes)
    if spec not in _nano:
        architecture = EncoderDecoder(spec) if spec.encoder_layers else SingleStream(spec)
        params = dict(jax.tree.map(lambda x: x * 1.7, jax.jit(architecture.init)(jax.random.key(3))))
        if spec.self_conditioning:
            layer = params["self_conditioning"]
            down = 0.3 * jax.random.normal(jax.random.key(4), layer["mlp"]["down"].shape)
            params["self_conditioning"] = layer | {"mlp": layer["mlp"] | {"down": down}}
        if spec.time_conditioning:
            layer = params["time_conditioning"]
            down = 0.3 * jax.random.normal(jax.random.key(5), layer["down"].shape)
            params["time_conditioning"] = layer | {"down": down}
        _nano[spec] = BoundModel(architecture, params)
    return _nano[spec]


def nano_encoder_decoder(**changes) -> BoundModel:
    return nano(encoder_layers=changes.get("num_layers", 2), tied_embeddings=False, **changes)


def with_length_head(model: BoundModel, classes: int = 12) -> BoundModel:
    """The same network under a length head of random weights, sharpened so that lengths do not tie."""
    architecture = WithLengthHead(model.architecture, classes)
    if architecture not in _nano:
        fresh = jax.jit(architecture.init)(jax.random.key(4))
        head = jax.tree.map(lambda x: x * 1.7, fresh["length_head"])
        _nano[architecture] = BoundModel(architecture, {**model.params, "length_head": head})
    return _nano[architecture]


def with_token_schedules(model: BoundModel) -> BoundModel:
    """The same network with exponents from about 0.4 to 2.5."""
    architecture = WithTokenSchedules(model.architecture)
    if architecture not in _nano:
        raw = np.random.default_rng(5).uniform(-0.7, 2.4, model.spec.padded_vocab_size)
        _nano[architecture] = BoundModel(architecture, {**model.params, "exponents": {"raw": jnp.float32(raw)}})
    return _nano[architecture]


def nano_for(objective: Any, build: Any = nano, **changes) -> BoundModel:
    """`build`'s network with the layers and schedules that the objective needs."""
    needs = objective.needs()
    model = build(self_conditioning=needs.self_conditioning, **changes)
    return with_token_schedules(model) if needs.token_schedules else model


@dataclasses.dataclass(frozen=True)
class CountingModel(BoundModel):
    """Counts the forward passes that really run, those inside compiled loops included."""

    calls: list = dataclasses.field(default_factory=list)

    def __call__(self, tokens, **inputs):
        jax.debug.callback(lambda rows=tokens.shape[0]: self.calls.append(rows))
        return super().__call__(tokens, **inputs)

    def count(self) -> int:
        jax.effects_barrier()
        return len(self.calls)


def counting(model: BoundModel) -> CountingModel:
    return CountingModel(model.architecture, model.params)


def make_batch(prefixes, windows, length, *, ids=None, encoder=False, seed=0, filler=0) -> Batch:
    """One example a row: BOS and random conditioning, a random target, EOS, `filler` scored PAD, right padding."""
    rng = np.random.default_rng(seed)
    rows = len(prefixes)
    slots = np.broadcast_to(np.arange(length), (rows, length))
    starts, ends = np.asarray(prefixes)[:, None], (np.asarray(prefixes) + np.asarray(windows))[:, None]
    used = slots < ends
    target = used & (slots >= starts)
    tokens = rng.integers(5, VOCAB, (rows, length))
    tokens[:, 0] = BOS
    tokens = np.where(slots == ends - 1 - filler, EOS, tokens)
    tokens = np.where(slots > ends - 1 - filler, PAD, tokens)
    ids = np.arange(rows) + 100 if ids is None else np.asarray(ids)
    source = None
    if encoder:
        lengths = rng.integers(3, SOURCE_LENGTH + 1, (rows, 1))
        at = np.broadcast_to(np.arange(SOURCE_LENGTH), (rows, SOURCE_LENGTH))
        source = EncoderInputs(
            tokens=jnp.asarray(np.where(at < lengths, rng.integers(5, VOCAB, at.shape), PAD), jnp.int32),
            segment_ids=jnp.asarray(at < lengths, jnp.int32),
            positions=jnp.asarray(np.where(at < lengths, at, 0), jnp.int32),
        )
    return Batch(
        tokens=jnp.asarray(np.where(used, tokens, PAD), jnp.int32),
        target_mask=jnp.asarray(target),
        loss_weights=jnp.asarray(target, jnp.float32),
        segment_ids=jnp.asarray(used, jnp.int32),
        positions=jnp.asarray(np.where(used, slots, 0), jnp.int32),
        example_ids=jnp.asarray(np.broadcast_to(ids[:, None], (rows, length)), jnp.uint32),
        special=SPECIAL,
        encoder=source,
    )


def as_prompt(batch: Batch) -> Batch:
    """The batch with an empty target window."""
    return batch.replace(
        tokens=jnp.where(batch.target_mask, PAD, batch.tokens), loss_weights=jnp.zeros_like(batch.loss_weights)
    )


_compiled: dict[Any, Any] = {}


def forget() -> None:
    """Frees the compiled programs; a process that keeps a thousand of them runs out of memory maps and crashes."""
    for function in _compiled.values():
        function.clear_cache()
    _compiled.clear()
    gc.collect()


def _jit(kind, settings, architecture, function):
    key = (kind, settings, architecture)
    if key not in _compiled:
        _compiled[key] = jax.jit(function)
    return _compiled[key]


def loss_and_grad(objective, model, batch, keys):
    """(terms, gradient of the sum over the parts' totals), compiled once per objective, architecture and shape."""

    def run(params, batch, keys):
        def loss(params):
            terms = objective.loss(dataclasses.replace(model, params=params), batch, keys)
            return sum(part.total for part in terms.parts), terms

        grads, terms = jax.grad(loss, has_aux=True)(params)
        return terms, grads

    return _jit("loss", objective, model.architecture, run)(model.params, batch, keys)


def bound(objective, model, batch, keys):
    """`objective.bound`, compiled once."""

    def run(params, batch, keys):
        return objective.bound(dataclasses.replace(model, params=params), batch, keys)

    return _jit("bound", objective, model.architecture, run)(model.params, batch, keys)


def generate(sampler, model, prompt, keys):
    """`sampler.generate`, compiled once per sampler, network and shape; for a `CountingModel`, per list of calls."""

    def run(params, prompt, keys):
        return sampler.generate(dataclasses.replace(model, params=params), prompt, keys)

    # The compiled program keeps `model` alive, so the id stays its own.
    kind = f"generate {id(model.calls)}" if isinstance(model, CountingModel) else "generate"
    return _jit(kind, sampler, model.architecture, run)(model.params, prompt, keys)


def assert_close(left, right, **tolerance):
    """Every leaf, with tolerances relative to the leaf's largest entry where `scaled` is given."""
    scaled = tolerance.pop("scaled", None)

    def check(a, b):
        limit = {"rtol": 0, "atol": scaled * max(np.abs(b).max(), 1e-3)} if scaled else tolerance
        np.testing.assert_allclose(a, b, **limit)

    jax.tree.map(check, left, right)


def rows_of(batch: Batch, rows) -> Batch:
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], batch)


def pad_right(batch: Batch, amount: int) -> Batch:
    """The same rows with `amount` more slots of padding."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, amount)))

    names = ("tokens", "target_mask", "loss_weights", "segment_ids", "positions", "example_ids")
    return batch.replace(**{name: pad(getattr(batch, name)) for name in names})


def packed(batch: Batch) -> Batch:
    """All rows of a batch (none of which may have an encoder) packed behind each other into one row."""
    used = np.asarray(batch.segment_ids) > 0

    def pack(x):
        return jnp.asarray(np.asarray(x)[used][None])

    numbers = np.broadcast_to(np.arange(1, used.shape[0] + 1)[:, None], used.shape)
    return Batch(
        tokens=pack(batch.tokens),
        target_mask=pack(batch.target_mask),
        loss_weights=pack(batch.loss_weights),
        segment_ids=pack(np.asarray(numbers, np.int32)),
        positions=pack(batch.positions),
        example_ids=pack(batch.example_ids),
        special=batch.special,
    )
