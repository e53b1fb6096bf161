"""Where gin files are looked for: the current folder, the given folders, then the files that travel in the package."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusion_lm
from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.core.files import as_path, is_bucket


def packaged_folder() -> Path:
    """Returns the folder of the gin files of this installation: `gin_files` in a wheel, `../gin` in a checkout."""
    package = Path(diffusion_lm.__file__).parent
    installed = package / "gin_files"
    return installed if installed.is_dir() else package.parent / "gin"


def split_search_path(given: Iterable[str]) -> tuple[str, ...]:
    """Returns the folders of repeated, comma-separated `--gin_search_path` flags, in order."""
    return tuple(folder.strip() for flag in given for folder in flag.split(",") if folder.strip())


def find_gin_file(name: str, search_path: Sequence[str] = (), *, where: str = "--gin_file") -> Path:
    """Returns the file that `name` stands for.

    Relative names are tried in the current folder, in each folder of `search_path`, then in the packaged folder, where
    a leading `gin/` is dropped, so that `gin/recipes/quickstart.gin` names the same file in a checkout and outside it.

    Args:
      name: a path; an include such as `models/sizes/tiny.gin` is relative to any of the folders.
      search_path: folders to try after the current one.
      where: the flag or the `file:line` that asked, for the error.

    Raises:
      ConfigError: no folder has it; says which were tried and names that are near.
    """
    if os.path.isabs(name) or is_bucket(name):
        candidates = [as_path(name)]
    else:
        inside_package = name.removeprefix("./").removeprefix("gin/")
        candidates = [Path(name), *(Path(folder) / name for folder in search_path), packaged_folder() / inside_package]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"there is no gin file {name!r}{near_names(name, _known_files(search_path))}",
        where=where,
        fix=f"Looked in {', '.join(dict.fromkeys(str(path.parent) for path in candidates))};"
        " give a path, or a folder with --gin_search_path.",
    )


def _known_files(search_path: Sequence[str]) -> list[str]:
    packaged = packaged_folder()
    known = [f"gin/{path.relative_to(packaged).as_posix()}" for path in packaged.rglob("*.gin")]
    known += [path.relative_to(packaged).as_posix() for path in packaged.rglob("*.gin")]
    for folder in ("", *search_path):
        known += [path.as_posix() for path in Path(folder).glob("*.gin")]
    return known
