"""The tokenizer files of a checkpoint folder: which ones are copied, and which token they name as MASK."""

from pathlib import Path

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.data.tokenizer_files import CONFIGS, LAYOUTS
from diffusion_lm.data.vocabulary import Vocabulary

TOKENIZER = "tokenizer"
"""Subfolder of a run directory for the tokenizer files."""

# The files of `CONFIGS` that describe the tokenizer, and the chat template. Python files are never copied.
_CONFIGS = tuple(f"{name}.json" for name in CONFIGS if name not in ("config", "generation_config"))
_TEMPLATE = "chat_template.jinja"


def copied_files(folder: Path) -> tuple[Path, ...]:
    """Returns the tokenizer files of `folder`, with the files that name special tokens; () if there is no tokenizer.

    Raises:
      ConfigError: one of them is a link to a file outside of the folder.
    """
    names = dict.fromkeys([*(name for layout in LAYOUTS for name in layout), *_CONFIGS, _TEMPLATE])
    found = [folder / name for name in names if (folder / name).is_file()]
    for file in found:
        check_inside(file)
    # Without the tokenizer itself, its configuration files are of no use.
    own = [file for file in found if file.name not in (*_CONFIGS, _TEMPLATE)]
    return tuple(found) if own else ()


def check_inside(file: Path) -> None:
    """Raises `ConfigError` if a file to be copied is a link to a file outside of its folder.

    Such a link could name any private file of this machine, and the copy would be published with an export. Links
    inside the cache of the Hugging Face Hub are accepted: `models--ORG--NAME/snapshots/HASH/FILE` to
    `../../blobs/HASH`.
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
        fix="If the file belongs to the checkpoint, replace the link by a copy; otherwise remove it.",
    )


def read_vocabulary(folder: Path, mask: int | None = None) -> Vocabulary | None:
    """Returns the tokenizer of `folder` as a `Vocabulary`; None if there is none or it is not supported.

    Args:
      folder: folder of the checkpoint.
      mask: id of the checkpoint's MASK, which may be an ordinary token of the tokenizer; None = that of the files.
    """
    if not copied_files(folder):
        return None
    # First without `mask`: where the files name the same token, it needs no override.
    for named in (None, mask):
        try:
            vocabulary = Vocabulary.load(folder, mask=named)
        except ConfigError:
            return None
        if mask is None or vocabulary.specials.mask_id == mask:
            return vocabulary
    return None


def mask_of_tokenizer(folder: Path) -> int | None:
    """Returns the id of the MASK that the tokenizer files of `folder` name, or None."""
    vocabulary = read_vocabulary(folder)
    roles = () if vocabulary is None else vocabulary.report.roles
    return next((role.token for role in roles if role.name == "mask" and role.how == "found"), None)
