"""A small run for the tests of training: ragged random rows, a network of two layers."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.core.types import Batch
from diffusion_lm.data.iterator import BatchIterator
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.objectives.sundae import Sundae
from diffusion_lm.parallel.mesh import MeshSpec
from diffusion_lm.training.optimizers import AdamW
from diffusion_lm.training.run import TrainRun
from diffusion_lm.training.schedules import Cosine

VOCAB = 40
ONE_DEVICE = MeshSpec(data=1, fsdp=1)
AUTOREGRESSIVE = Autoregressive()
DIFFUSION = Sundae()


@dataclasses.dataclass(frozen=True)
class RaggedRows:
    """Stands in for `DataPipeline`: batch i is random but a function of (seed, i); targets have very different lengths.

    Attributes:
      length: slots of a row.
      seed: root of the rows.
      scored: False = nothing has a loss weight.
      fail_at: batch whose reading fails, or None.
      mask_id: the vocabulary's MASK, or None.
    """

    length: int = 16
    seed: int = 0
    scored: bool = True
    fail_at: int | None = None
    vocab_size: int = VOCAB
    mask_id: int | None = None

    @property
    def row_length(self) -> int:
        return self.length

    @property
    def encoder_length(self) -> None:
        return None

    @property
    def specials(self) -> SpecialTokens:
        return SpecialTokens(vocab_size=self.vocab_size, bos_id=2, mask_id=self.mask_id)

    def batch(self, index: int, batch_size: int, *, process_index: int = 0, process_count: int = 1) -> Batch:
        if index == self.fail_at:
            raise OSError("the disk is gone")
        rows = batch_size // process_count
        first = index * batch_size + process_index * rows
        return stack([self.row(first + i) for i in range(rows)])

    def row(self, number: int) -> Batch:
        random = np.random.default_rng((self.seed, number))
        conditioning = int(random.integers(1, 5))
        used = int(random.integers(conditioning + 1, self.length + 1))
        slots = np.arange(self.length, dtype=np.int32)
        tokens = np.where(slots < used, random.integers(3, VOCAB, self.length), 0).astype(np.int32)
        tokens[0] = 2
        target = (slots >= conditioning) & (slots < used)
        return Batch(
            tokens=tokens,
            target_mask=target,
            loss_weights=(target & self.scored).astype(np.float32),
            segment_ids=(slots < used).astype(np.int32),
            positions=slots,
            example_ids=np.full(self.length, number, np.uint32),
            special=self.specials,
        )

    def iterator(self, batch_size: int, *, position: int = 0, process_index: int = 0, process_count: int = 1):
        return BatchIterator(
            lambda i: self.batch(i, batch_size, process_index=process_index, process_count=process_count), position
        )


def stack(rows: list[Batch]) -> Batch:
    return jax.tree.map(lambda *values: np.stack(values), *rows)


@dataclasses.dataclass(frozen=True)
class SlowRows(RaggedRows):
    """Rows that take their time, so that a test can hit the process between two of them."""

    seconds: float = dataclasses.field(default=0.0, compare=False)

    def batch(self, index, batch_size, **slice_of):
        time.sleep(self.seconds)
        return super().batch(index, batch_size, **slice_of)


@dataclasses.dataclass(frozen=True)
class SumOfParameters:
    """An evaluation whose value shows which parameters it was given."""

    name: str = "probe"
    every: int = 0
    key: str = "loss"

    def run(self, model: Any, step: int) -> dict[str, float]:
        return {self.key: float(sum(np.abs(np.asarray(leaf)).sum() for leaf in leaves(model.params)))}


def leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def nano(**changes: Any) -> SingleStream:
    fields = dict(vocab_size=VOCAB, num_layers=2, model_dim=32, num_heads=2, head_dim=16, mlp_dim=64, logits_chunk=4096)
    return SingleStream(TransformerSpec(**(fields | changes)))


def small_run(**changes: Any) -> TrainRun:
    fields: dict[str, Any] = dict(
        model=nano(),
        objective=DIFFUSION,
        data=RaggedRows(),
        steps=6,
        batch_size=4,
        optimizer=AdamW(schedule=Cosine(peak=1e-2, warmup_steps=2)),
        mesh=ONE_DEVICE,
        log_every=2,
    )
    return TrainRun(**(fields | changes))
