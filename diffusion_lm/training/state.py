"""What training carries from step to step. There is no random state in it: keys are counted (`core/rng.py`)."""

from typing import Any

import flax.struct
import jax

from diffusion_lm.core.types import Params


@flax.struct.dataclass
class TrainState:
    """The donated state of the compiled step.

    Attributes:
      step: i32[], updates made so far; also the number of batches consumed, hence the data position.
      params: the parameters.
      opt_state: the optimizer's state.
      ema: exponential moving average of the parameters, or None where the run keeps none.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def final_params(self) -> Params:
        """The parameters to evaluate and to hand on: the moving average where one is kept."""
        return self.params if self.ema is None else self.ema
