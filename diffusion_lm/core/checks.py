"""Small checks of configured values. Each raises a `ConfigError` with the value, the gin parameter and the fix."""

from collections.abc import Iterable

from diffusion_lm.core.errors import near_names, require


def _name(where: str) -> str:
    return where.rsplit(".", 1)[-1]


def check_choice(value: object, choices: Iterable[str], where: str) -> None:
    """Raises `ConfigError` unless `value` is one of `choices`; `where` is the gin parameter ("Sundae.visibility")."""
    known = tuple(choices)
    require(
        value in known,
        f"{_name(where)}={value!r}: not one of the choices{near_names(str(value), known)}",
        where=where,
        fix=f"Use one of {', '.join(known)}.",
    )


def check_probability(value: float, where: str, fix: str | None = None, *, below_one: bool = False) -> None:
    """Raises `ConfigError` unless `value` is in [0, 1], or in [0, 1) with `below_one`."""
    good = 0 <= value < 1 if below_one else 0 <= value <= 1
    interval = "[0, 1)" if below_one else "[0, 1]"
    require(good, f"{_name(where)}={value}: must be in {interval}", where=where, fix=fix or "Use a probability.")


def check_positive(value: float, where: str, fix: str | None = None) -> None:
    """Raises `ConfigError` unless `value` is above 0."""
    require(value > 0, f"{_name(where)}={value}: must be > 0", where=where, fix=fix or "Use a positive number.")


def check_non_negative(value: float, where: str, fix: str | None = None) -> None:
    """Raises `ConfigError` if `value` is below 0."""
    require(value >= 0, f"{_name(where)}={value}: must be >= 0", where=where, fix=fix or "Use 0 or more.")


def check_count(value: object, where: str, fix: str | None = None, *, minimum: int = 1) -> None:
    """Raises `ConfigError` unless `value` is an integer of at least `minimum`."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
        f"{_name(where)}={value!r}: must be an integer >= {minimum}",
        where=where,
        fix=fix or f"Use {minimum} or more.",
    )
