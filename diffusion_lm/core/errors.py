"""Errors for users: what is wrong, where it was configured, and what to do about it."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Invalid input. The command line prints it as one line and exits with code 2 (`--debug` shows the traceback).

    Attributes:
      exit_code: exit code of the command line; subclasses use another one if the same input may work later.
      what: what is wrong, with the invalid value.
      where: the gin parameter, flag or file; may be empty if `what` names it.
      fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        self.what, self.where, self.fix = what, where, fix
        sentence = what + (f" ({where})" if where else "")
        sentence += "" if sentence.endswith("?") else "."
        super().__init__(f"{sentence} {fix}" if fix else sentence)


def near_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Returns `"; did you mean a, b?"` for the `limit` known names most similar to `name`, or ""."""
    close = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def require(condition: bool, what: str, *, where: str = "", fix: str = "") -> None:
    """Raises `ConfigError` unless `condition` is true; for `__post_init__` of configured dataclasses."""
    if not condition:
        raise ConfigError(what, where=where, fix=fix)
