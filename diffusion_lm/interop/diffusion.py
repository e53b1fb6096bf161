"""How a diffusion model was trained: read with a checkpoint, written with an export.

The weights do not show the alignment (which state predicts which token), the attention mask, or which token is MASK.
For a released checkpoint the family gives the first two; for our own runs the objective gives all three.
"""

import dataclasses

from diffusion_lm.core.errors import require
from diffusion_lm.core.gin_text import GinText
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.interop.name_maps import FAMILIES
from diffusion_lm.interop.name_maps.family import CheckpointConfig, Diffusion, Family
from diffusion_lm.interop.save import differences
from diffusion_lm.nn.named_masks import named_blocks
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.noise.contract import HYBRID_NOISE, MASK_NOISE, PROBABILITIES
from diffusion_lm.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class TrainedAs:
    """How a diffusion model was trained.

    Attributes:
      shifted: whether the state at slot i - 1 predicts token i, not the state at slot i.
      block_size: tokens per block of block diffusion; None if every token attends to every other.
      mask_id: id of MASK; None if nothing names it.
      mask_from: where the id comes from: "config.json", "generation_config.json", "tokenizer", "published checkpoint",
        "objective" or "".
      objective: file of gin/objectives that trains such a model, or "".
      sampler: file of gin/samplers that decodes it, or "".
      sub_block: tokens that the sampler decodes at a time; None = a whole block.
    """

    shifted: bool
    block_size: int | None
    mask_id: int | None
    mask_from: str
    objective: str = ""
    sampler: str = ""
    sub_block: int | None = None

    @property
    def prediction(self) -> str:
        """The alignment in words."""
        return "shifted" if self.shifted else "same position"

    @property
    def visibility(self) -> str:
        """What a token attends to, in words."""
        return "full" if self.block_size is None else f"blocks of {self.block_size}"

    def facts(self) -> dict[str, object]:
        """Returns what `export` writes to config.json."""
        return {
            "prediction": self.prediction,
            "visibility": self.visibility,
            "block_size": self.block_size,
            "mask_token_id": self.mask_id,
        }


def trained_as(family: Diffusion, config: CheckpointConfig, rows: int, other_mask: tuple[int | None, str]) -> TrainedAs:
    """Returns how a checkpoint of a diffusion family was trained.

    MASK comes from config.json, else from another file, else from the published checkpoint with as many rows.

    Args:
      family: what the checkpoints of the family have in common.
      config: the contents of config.json, which may give MASK and the block size.
      rows: number of rows of the vocabulary.
      other_mask: MASK of the checkpoint's other files (None if they name none), and which file that is.

    Raises:
      ConfigError: MASK is not a token of the vocabulary, or the block size is not a number of tokens.
    """
    block = None
    if family.block_key is not None:
        block = config.get(family.block_key, family.block_size)
        require(
            type(block) is int and block > 0,
            f"{config.file}: {family.block_key} = {block!r} must be a whole number above 0",
            where=family.block_key,
            fix="Correct the file.",
        )
    mask, source = config.get("mask_token_id"), "config.json"
    if mask is None:
        mask, source = other_mask
    if mask is None:
        mask, source = dict(family.mask_ids).get(rows), "published checkpoint"
    require(
        mask is None or (type(mask) is int and 0 <= mask < rows),
        f"{config.file}: mask_token_id = {mask!r} must be an id below the vocabulary size {rows}",
        where="mask_token_id",
        fix="Use the config.json that belongs to these weights.",
    )
    return TrainedAs(
        family.shifted, block, mask, "" if mask is None else source, family.objective, family.sampler,
        family.sub_block,
    )  # fmt: skip


def of_objective(objective: Objective, special: SpecialTokens | None) -> TrainedAs | None:
    """Returns what a network trained with this objective is; None if no sampler of masked models could decode it.

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
    """Returns the first of `FAMILIES` with this shape, alignment and visibility, or None."""
    for family in FAMILIES:
        published = family.diffusion
        if trained is None or published is None or published.shifted != trained.shifted:
            continue
        if (published.block_key is None) == (trained.block_size is None) and not differences(spec, family):
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


def sampler_gin(trained: TrainedAs) -> str:
    """Returns a gin file for `decode --sampler`: the family's sampler with the checkpoint's block size."""
    block = trained.block_size
    text = GinText().comment("The sampler of the checkpoint's family, with the settings of the included file.")
    if block is not None:
        text.imports("diffusion_lm.samplers.blocks", "diffusion_lm.samplers.masked").blank()
    text.include(f"samplers/{trained.sampler}.gin").blank()
    if block is not None:
        text.bind("masked.MaskedSampler.visibility", f"example_blocks:{block}")
        text.bind("blocks.Blocks.size", min(trained.sub_block or block, block))
    return text.text()
