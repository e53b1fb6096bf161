"""RDM: reparameterised discrete diffusion (arXiv 2302.05737), the objective of Diffusion-LLM (arXiv 2308.12219).

    L = 1/2 sum over s in {t, t'} of  1/B sum over examples 1/n sum over masked i of w(s) x -log p(x_i | z_s)

Each example is trained on two nested canvases: the tokens masked at the lower of two times t, t' are among those masked
at the higher one. EOS stays clean, so the model does not learn the length; a length predictor gives it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.alignment import Alignment, SamePosition
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, LossTerms
from diffusion_lm.noise.contract import Contract
from diffusion_lm.noise.process import Absorbing, Corrupted
from diffusion_lm.noise.time_sampling import TIME_STREAM, DiscreteTime, TimeSampler
from diffusion_lm.noise.weighting import BoundKind, LinearDecay, Weighting
from diffusion_lm.objectives.draws import mean_over_draws, shifted
from diffusion_lm.objectives.masked_diffusion import MaskedDiffusion, MaskingProcess
from diffusion_lm.objectives.objective import Needs, evaluation_keys


@dataclasses.dataclass(frozen=True)
class Rdm:
    """The mean of two masked-diffusion losses on nested canvases, with EOS clean.

    Attributes:
      process: the noise with its schedule.
      time: at which t an example is trained.
      weighting: weight of a masked token at its noise level.
      alignment: which hidden state predicts which token.
      visibility: "full", or another name of `nn.named_masks.named_visibility`.
      label_smoothing: probability mass that the training target spreads over the vocabulary.
      evaluation_draws: noise levels of `bound` per example, spread evenly from a random start.
    """

    process: MaskingProcess = Absorbing()
    time: TimeSampler = DiscreteTime(50)
    weighting: Weighting = LinearDecay(50)
    alignment: Alignment = SamePosition()
    visibility: str = "full"
    label_smoothing: float = 0.0
    evaluation_draws: int = 8

    def __post_init__(self):
        _ = self._canvas  # checks the settings

    @property
    def _canvas(self) -> MaskedDiffusion:
        """The loss of one canvas: a mean over each example's target and then over examples."""
        return MaskedDiffusion(
            process=self.process,
            time=self.time,
            weighting=self.weighting,
            normaliser="example",
            alignment=self.alignment,
            visibility=self.visibility,
            label_smoothing=self.label_smoothing,
            evaluation_draws=self.evaluation_draws,
        )

    @property
    def bound_kind(self) -> BoundKind:
        """Not a bound: EOS costs nothing."""
        return "pseudo"

    def needs(self) -> Needs:
        """Two passes, and MASK."""
        contract = Contract(self.process.kind, self.visibility, self.alignment, closed=True)
        return dataclasses.replace(self._canvas.needs(), passes=2, contracts=(contract,))

    def loss(self, model: BoundModel, batch: Batch, keys: StreamKeys, *, train: bool = True) -> LossTerms:
        """Returns the summed loss, averaged over the two canvases; `weight` is the number of examples.

        Metrics: those of `MaskedDiffusion`.
        """
        # Drawn before EOS is removed: times do not depend on the target.
        t_BT = self.time.draw(keys, batch.example_ids, strata=batch.strata)
        batch = without_eos(batch)
        canvas = self._canvas
        forward = canvas.passes(model, batch, keys, train, views=2)
        views = self.nested_canvases(t_BT, model.spec.vocab_size, batch, keys)
        first, second = (
            canvas.terms(noisy, times_BT, forward, model, batch, keys, train=train, first_pass=number)
            for number, (times_BT, noisy) in enumerate(views)
        )
        # Both canvases have the same weight, so the mean of the sums is the mean of the losses.
        return jax.tree.map(lambda a, b: 0.5 * (a + b), first, second)

    def bound(self, model: BoundModel, batch: Batch, keys: StreamKeys) -> LossTerms:
        """Returns the expected loss of one canvas with fixed noise, at times spread evenly, without dropout."""
        keys, batch, canvas = evaluation_keys(keys), without_eos(batch), self._canvas
        uniform = keys.example_uniform(TIME_STREAM, batch.example_ids)

        def one(offset: jax.Array, draw_keys: StreamKeys) -> LossTerms:
            t_BT = self.time.at(shifted(uniform, offset))
            noisy = self.process.corrupt(draw_keys, batch, t_BT, vocab_size=model.spec.vocab_size)
            forward = canvas.passes(model, batch, draw_keys, train=False)
            return canvas.terms(noisy, t_BT, forward, model, batch, draw_keys, train=False)

        return mean_over_draws(keys, self.evaluation_draws, one)

    def nested_canvases(
        self, t_BT: jax.Array, vocab_size: int, batch: Batch, keys: StreamKeys
    ) -> tuple[tuple[jax.Array, Corrupted], tuple[jax.Array, Corrupted]]:
        """Returns two times f32[B,T], each with its canvas."""
        first = self.process.corrupt(keys, batch, t_BT, vocab_size=vocab_size)
        independent = keys.replace(root=jax.random.fold_in(keys.root, 1))
        other_BT = self.time.draw(independent, batch.example_ids, strata=batch.strata)
        # The same keys at another rate choose a subset or a superset. At equal times that would be the same canvas
        # twice, so there the second one is drawn independently.
        nested = self.process.corrupt(keys, batch, other_BT, vocab_size=vocab_size)
        again = self.process.corrupt(independent, batch, other_BT, vocab_size=vocab_size)
        second = jax.tree.map(lambda a, n: jnp.where(other_BT == t_BT, a, n), again, nested)
        return (t_BT, first), (other_BT, second)


def without_eos(batch: Batch) -> Batch:
    """Returns the batch with EOS as conditioning: clean and unscored."""
    target_mask = batch.target_mask & ~batch.special.is_eos(batch.tokens)
    return batch.replace(target_mask=target_mask, loss_weights=jnp.where(target_mask, batch.loss_weights, 0.0))
