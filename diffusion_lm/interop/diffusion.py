"""What a network was trained as, where it is a diffusion model: read with a checkpoint, written with an export.

Weights do not show which state predicts which token, what saw what, and which token is MASK. A released checkpoint's
family knows the first two; of a run of ours the objective is asked.
"""

import dataclasses
from typing import Any

from diffusion_lm.core.errors import require
from diffusion_lm.core.gin_text import GinText, Value
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.interop.name_maps import FAMILIES
from diffusion_lm.interop.name_maps.family import Config, Diffusion, Family
from diffusion_lm.interop.save import differences
from diffusion_lm.nn.named_masks import named_blocks
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.noise.contract import HYBRID_NOISE, MASK_NOISE, PROBABILITIES
from diffusion_lm.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class TrainedAs:
    """How a diffusion model is meant.

    Attributes:
      shifted: whether the state at slot i - 1 predicts token i, not that at slot i.
      block_size: tokens of a block of block diffusion; None where every token sees every other.
      mask_id: MASK; None where nothing names it.
      mask_from: who says so: "config.json", "generation_config.json", "tokenizer", "published checkpoint", "objective"
        or "".
      objective: file of gin/objectives that trains such a model, or "".
      sampler: file of gin/samplers that decodes it, or "".
      sub_block: tokens that the sampler fills at a time; None = a whole block.
      names_eos: whether the objective's file has a macro EOS_ID.
    """

    shifted: bool
    block_size: int | None
    mask_id: int | None
    mask_from: str
    objective: str = ""
    sampler: str = ""
    sub_block: int | None = None
    names_eos: bool = False

    @property
    def prediction(self) -> str:
        """The alignment in words."""
        return "shifted" if self.shifted else "same position"

    @property
    def visibility(self) -> str:
        """What a token sees, in words."""
        return "full" if self.block_size is None else f"blocks of {self.block_size}"

    def facts(self) -> dict[str, Any]:
        """Returns what `import.json` and an exported config.json say."""
        return {
            "prediction": self.prediction,
            "visibility": self.visibility,
            "block_size": self.block_size,
            "mask_token_id": self.mask_id,
        }


def trained_as(family: Diffusion, config: Config, rows: int, named: tuple[int | None, str]) -> TrainedAs:
    """Returns what a checkpoint of a diffusion family was trained as.

    Args:
      family: what all its members have in common.
      config: the contents of config.json, which say MASK and the size of a block or do not.
      rows: of its vocabulary, by which published checkpoints are known.
      named: MASK of the other files beside it, where they name one, and which they are.

    Raises:
      ConfigError: MASK is no token, or the block no number of tokens.
    """
    block = None
    if family.block_key is not None:
        block = config.get(family.block_key, family.block_size)
        require(
            type(block) is int and block > 0,
            f"{config.file} says {family.block_key} = {block!r}, which is not a number of tokens",
            where=family.block_key,
            fix="Correct the file.",
        )
    mask, said_by = config.get("mask_token_id"), "config.json"
    if mask is None:
        mask, said_by = named
    if mask is None:
        mask, said_by = dict(family.mask_ids).get(rows), "published checkpoint"
    require(
        mask is None or (type(mask) is int and 0 <= mask < rows),
        f"{config.file} says mask_token_id = {mask!r}, and the vocabulary has {rows} rows",
        where="mask_token_id",
        fix="Use the config.json that belongs to these weights.",
    )
    return TrainedAs(
        family.shifted, block, mask, "" if mask is None else said_by, family.objective, family.sampler,
        family.sub_block, family.names_eos,
    )  # fmt: skip


def of_objective(objective: Objective, special: SpecialTokens | None) -> TrainedAs | None:
    """Returns what a network trained with this objective is; None where no sampler of masked models could decode it.

    Args:
      objective: what the network was trained with. One whose outputs are not a distribution of tokens (score entropy)
        cannot be decoded by a masked sampler.
      special: the special tokens of the data that it was trained on, which say MASK; None if they are not known.
    """
    needs = objective.needs()
    masked = [one for one in needs.contracts if one.noise in (MASK_NOISE, HYBRID_NOISE) and one.output == PROBABILITIES]
    mask = None if special is None else special.mask_id
    if not masked or mask is None or masked[0].causal_context:
        return None
    blocks = named_blocks(masked[0].visibility)
    if blocks is None and masked[0].visibility != "full":
        return None
    return TrainedAs(masked[0].alignment.back > 0, None if blocks is None else blocks.size, mask, "objective")


def layout_for(spec: TransformerSpec, trained: TrainedAs | None) -> Family | None:
    """Returns the public layout of such a network trained as such, the first of `FAMILIES`, or None."""
    for family in FAMILIES:
        meant = family.diffusion
        if trained is None or meant is None or meant.shifted != trained.shifted:
            continue
        if (meant.block_key is None) == (trained.block_size is None) and not differences(spec, family):
            return family
    return None


def objective_gin(trained: TrainedAs) -> str:
    """Returns a gin file to include after model.gin: the objective to continue the training with."""
    text = GinText().comment("The objective that such a checkpoint was trained with; include it after model.gin.")
    if trained.block_size is not None:
        text.imports("diffusion_lm.objectives.block_diffusion").blank()
    text.include(f"objectives/{trained.objective}.gin").blank()
    if trained.block_size is not None:
        text.bind("block_diffusion.BlockDiffusion.block_size", trained.block_size)
    return text.text()


def sampler_gin(trained: TrainedAs, eos_id: int | None, pad_id: int | None) -> str:
    """Returns a gin file for `decode --sampler`: the family's sampler, under the checkpoint's ids."""
    block = trained.block_size
    text = GinText().comment("The sampler of such a checkpoint, with the settings of the included file.")
    text.imports("diffusion_lm.samplers.denoising").blank()
    text.include(f"samplers/{trained.sampler}.gin").blank().bind("MASK_ID", trained.mask_id)
    fields: dict[str, Value] = {"eos_id": eos_id, "pad_id": pad_id}
    if block is not None:
        fields |= {"block": min(trained.sub_block or block, block), "visibility": f"example_blocks:{block}"}
    for name, value in fields.items():
        if value is not None:
            text.bind(f"denoising.DenoisingSampler.{name}", value)
    return text.text()
