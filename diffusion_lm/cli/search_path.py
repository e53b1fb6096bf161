"""Finds gin files in the current directory, the given directories, then among the files of the package."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import diffusion_lm
from diffusion_lm.core.errors import ConfigError, near_names
from diffusion_lm.core.files import as_path, is_bucket


def packaged_folder() -> Path:
    """Returns the directory of the packaged gin files: `gin_files` in a wheel, `../gin` in a checkout."""
    package = Path(diffusion_lm.__file__).parent
    installed = package / "gin_files"
    return installed if installed.is_dir() else package.parent / "gin"


def split_search_path(given: Iterable[str]) -> tuple[str, ...]:
    """Returns the directories of repeated, comma-separated `--gin_search_path` flags, in order."""
    return tuple(folder.strip() for flag in given for folder in flag.split(",") if folder.strip())


def find_gin_file(name: str, search_path: Sequence[str] = (), *, where: str = "--gin_file") -> Path:
    """Returns the path of a gin file.

    Relative names are searched in the current directory, in each directory of `search_path`, then in the packaged
    directory. There a leading `gin/` is dropped, so `gin/recipes/quickstart.gin` works with and without a checkout.

    Args:
      name: a path, absolute or relative to any of the directories, e.g. `models/sizes/tiny.gin`.
      search_path: directories to search after the current one.
      where: the flag or `file:line` that names the file, for the error message.

    Raises:
      ConfigError: the file does not exist; the message lists the searched directories and similar names.
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
        f"gin file {name!r} not found{near_names(name, _known_files(search_path))}",
        where=where,
        fix=f"Searched {', '.join(dict.fromkeys(str(path.parent) for path in candidates))}."
        " Pass a path, or add a directory with --gin_search_path.",
    )


def _known_files(search_path: Sequence[str]) -> list[str]:
    packaged = packaged_folder()
    known = [f"gin/{path.relative_to(packaged).as_posix()}" for path in packaged.rglob("*.gin")]
    known += [path.relative_to(packaged).as_posix() for path in packaged.rglob("*.gin")]
    for folder in ("", *search_path):
        known += [path.as_posix() for path in Path(folder).glob("*.gin")]
    return known
