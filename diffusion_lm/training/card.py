"""The identity of a configuration: its plain data, its fingerprint, and the card that identifies a run directory."""

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import jax

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import read_json, write_json

CARD = "run_card.json"
_REPORTED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "diffusion-lm")


def plain(value: object) -> Any:
    """Returns a configured object as JSON data: dataclasses as `{"class": ..., fields...}`, all else unchanged.

    Numbers that are not finite become strings: "inf", "-inf", "nan".

    Raises:
      TypeError: the value (or a part of it) is neither a dataclass nor plain data.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        # Fields with compare=False do not determine results.
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers; as null, different configurations would look equal
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(f"the configured value {value!r} is neither a dataclass nor plain data")


def fingerprint(value: object) -> str:
    """Returns the SHA-256 of a configured object's plain form; equal configurations have equal fingerprints."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, allow_nan=False).encode()).hexdigest()


def claim_folder(workdir: Path, identity: Mapping[str, object], **conditions: object) -> None:
    """Writes the run card of a run with this identity to `workdir`, or checks the one that is there.

    Args:
      workdir: the run directory; created if missing.
      identity: plain data that determines the run's numbers.
      conditions: plain data to record in addition.

    Raises:
      ConfigError: the directory belongs to a run with another configuration; the message has the first difference.
    """
    path = workdir / CARD
    if path.exists():
        found = read_json(path)["identity"]
        # Through JSON, so that tuples and lists compare equal to what was read.
        difference = first_difference(found, json.loads(json.dumps(identity, allow_nan=False)))
        if difference is not None:
            raise ConfigError(
                f"{workdir} is the run directory of another configuration: {difference}",
                where=str(path),
                fix="Use another --workdir, or restore the old value.",
            )
        return
    # One writer: all processes share the directory.
    if jax.process_index() == 0:
        devices = jax.devices()
        write_json(
            path,
            {
                "identity": identity,
                "fingerprint": hashlib.sha256(
                    json.dumps(identity, sort_keys=True, allow_nan=False).encode()
                ).hexdigest(),
                "versions": installed_versions(),
                "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
                **conditions,
            },
        )


def first_difference(there: object, here: object, name: str = "TrainRun") -> str | None:
    """Returns the first difference of two plain values, as "NAME is A there and B here", or None."""
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get("class") == here.get("class"):
        for key in [*there, *(key for key in here if key not in there)]:
            difference = first_difference(there.get(key), here.get(key), f"{name}.{key}")
            if difference:
                return difference
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (a, b) in enumerate(zip(there, here, strict=True)):
            difference = first_difference(a, b, f"{name}[{index}]")
            if difference:
                return difference
        return None
    if there == here:
        return None
    was, now = _short(there), _short(here)
    if was == now:  # classes of the same name in two modules, or values that differ after the abbreviation
        was, now = str(there), str(here)
    return f"{name} is {was} there and {now} here"


def _short(value: object) -> str:
    if isinstance(value, Mapping) and "class" in value:
        return value["class"].rsplit(".", 1)[-1]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def installed_versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that affect numbers."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _REPORTED}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
