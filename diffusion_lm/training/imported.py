"""What a run folder of an imported checkpoint states about its special tokens."""

from pathlib import Path

from diffusion_lm.core.errors import require
from diffusion_lm.core.files import read_json
from diffusion_lm.core.special import SpecialTokens

IMPORT_CARD = "import.json"


def check_mask(folder: Path, special: SpecialTokens | None) -> None:
    """Checks that MASK of the data is MASK of an imported diffusion model.

    Args:
      folder: a run folder; only those that `import` wrote have `import.json`.
      special: the special tokens of the run's data; None if they are not known.

    Raises:
      ConfigError: the model was trained with another MASK, so it would take the data's MASK for text.
    """
    card = folder / IMPORT_CARD
    if special is None or not card.exists():
        return
    trained = read_json(card).get("diffusion") or {}
    mask = trained.get("mask_id")
    require(
        mask in (None, special.mask_id),
        f"{folder} was trained with MASK = {mask}, and MASK of the data's vocabulary is {special.mask_id}",
        where="DataPipeline.sources",
        fix=f"Set DIFFUSION_LM_MASK_TOKEN={mask} and materialise the data again, or use the checkpoint's tokenizer.",
    )
