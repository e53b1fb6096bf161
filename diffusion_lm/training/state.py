"""The state of training. It has no random state: keys are functions of seed and step (`core/rng.py`)."""

import flax.struct
import jax
import optax

from diffusion_lm.core.types import Params


@flax.struct.dataclass
class TrainState:
    """The donated state of the compiled step.

    Attributes:
      step: i32[], number of updates so far; also the number of batches consumed, hence the position in the data.
      params: the parameters.
      opt_state: the optimizer's state.
      ema: exponential moving average of the parameters, or None if the run has none.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None

    @property
    def final_params(self) -> Params:
        """The parameters to evaluate and to return: the moving average if there is one."""
        return self.params if self.ema is None else self.ema
