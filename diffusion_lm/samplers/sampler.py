"""The interface of samplers."""

from typing import Any, ClassVar, Protocol, Self

from diffusion_lm.architectures.base import BoundModel
from diffusion_lm.core.rng import StreamKeys
from diffusion_lm.core.types import Batch, Decoded
from diffusion_lm.noise.contract import Contract


class Sampler(Protocol):
    """A frozen dataclass, configured by one gin file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __hash__(self) -> int: ...

    @property
    def contract(self) -> Contract:
        """What the sampler assumes about the network; `noise.contract.mismatches` compares it with the training."""
        ...

    def generate(self, model: BoundModel, prompt: Batch, keys: StreamKeys) -> Decoded:
        """Fills the target window of each row.

        Args:
          model: the network with its parameters.
          prompt: conditioning, then a window of target slots (`target_mask`) that holds PAD. Rows may differ in the
            length of both and are padded on the right. Never packed.
          keys: the draws of a row depend only on these and on its `row_ids`, never on the other rows of the batch.

        Returns:
          The decoded rows. The call can be compiled as one program.
        """
        ...

    def without_early_end(self) -> Self:
        """Returns the sampler that runs all its steps whatever the tokens are, for measurements of speed."""
        ...
