"""The tokenizer that lies beside a checkpoint: which files it has, which are copied, what it takes for MASK."""

from pathlib import Path

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.tokenizer_files import CONFIGS, LAYOUTS
from diffusion_lm.data.vocabulary import Vocabulary

TOKENIZER = "tokenizer"
"""Folder of the files in a run folder."""

# Those of `CONFIGS` that are a tokenizer's, and a chat's template. Python files are never copied.
_BESIDE = tuple(f"{name}.json" for name in CONFIGS if name not in ("config", "generation_config"))
_TEMPLATE = "chat_template.jinja"


def copied_files(folder: Path) -> tuple[Path, ...]:
    """Returns the tokenizer files of `folder`: every layout's, and what says which token is which.

    Raises:
      ConfigError: one of them is a link to a file outside of the folder.
    """
    names = dict.fromkeys([*(name for layout in LAYOUTS for name in layout), *_BESIDE, _TEMPLATE])
    found = [folder / name for name in names if (folder / name).is_file()]
    for file in found:
        check_inside(file)
    own = [file for file in found if file.name not in (*_BESIDE, _TEMPLATE)]
    return tuple(found) if own else ()


def check_inside(file: Path) -> None:
    """Raises `ConfigError` where a file that is to be copied is a link that leads out of its folder.

    A stranger's folder could name any file of this machine so, and the copy would be published with an export. The
    cache of the Hugging Face Hub is made of links, `models--ORG--NAME/snapshots/HASH/FILE` to `../../blobs/HASH`.
    """
    if not file.is_symlink():
        return
    folder, target = file.parent.resolve(), file.resolve()
    repository = folder.parent.parent
    in_cache = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    if target.is_relative_to(folder) or (in_cache and target.parent == repository / "blobs"):
        return
    raise ConfigError(
        f"{file.name} is a link to a file outside of its folder, {target}",
        where=str(file),
        fix="Replace the link by a copy of the file if it belongs to the checkpoint, else remove it.",
    )


def read_vocabulary(folder: Path, mask: int | None = None) -> Vocabulary | None:
    """Returns the tokenizer of `folder` as data would be written with it; None where there is none that is understood.

    Args:
      folder: of the checkpoint.
      mask: the checkpoint's MASK; it may be an ordinary token of the tokenizer.
    """
    if not copied_files(folder):
        return None
    for named in (None, mask):
        try:
            vocabulary = Vocabulary.load(folder, mask=named)
        except ConfigError:
            return None
        if mask is None or vocabulary.specials.mask_id == mask:
            return vocabulary
    return None


def mask_of_tokenizer(folder: Path) -> int | None:
    """Returns the MASK that the tokenizer files of `folder` name, or None."""
    vocabulary = read_vocabulary(folder)
    roles = () if vocabulary is None else vocabulary.report.roles
    return next((role.token for role in roles if role.name == "mask" and role.how == "found"), None)
