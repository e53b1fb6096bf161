"""The alignments under the name by which gin reaches them; samplers share them, so they live on floor 0."""

from diffusion_lm.core.alignment import SamePosition, Shifted

__all__ = ["SamePosition", "Shifted"]
