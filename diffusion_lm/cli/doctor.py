"""Checks this installation: package versions, devices, directories, gin files, SeqIO tasks, and one training step.

The exit code is 0 if every check passes and 1 otherwise. Packages that only `materialise` needs may be missing."""

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from diffusion_lm.cli import environment, output
from diffusion_lm.cli.search_path import packaged_folder
from diffusion_lm.core.files import is_bucket

REQUIRED: tuple[str, ...] = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "gin-config",
    "numpy",
    "grain",
    "array-record",
)
REQUIRED += ("sentencepiece", "sacrebleu", "rich", "jinja2")
FOR_TASKS = ("seqio", "tensorflow", "tensorflow-datasets", "babel", "num2words")


class Skipped(Exception):
    """Raised by a check that does not apply here; not a failure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="also check that this SeqIO task is registered"
    )
    parser.add_argument("--no_tasks", action="store_true", help="skip the checks that import TensorFlow")


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Runs the verb; returns the checks and the exit code."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("packages", _packages),
        ("packages for tasks", _packages_for_tasks),
        ("devices", _devices),
        ("compile cache", _compile_cache),
        ("data folder", _data_folder),
        ("materialised data", _materialised),
        ("gin files", _gin_files),
        ("one training step", _one_step),
    ]
    if not arguments.no_tasks:
        checks.append(("tasks", lambda: _tasks(arguments.task)))
    results = [_check(name, call) for name, call in checks]
    output.table(["", "check", "found"], [(r["status"], r["name"], r["found"]) for r in results], fold=[2])
    failed = [r["name"] for r in results if r["status"] == "FAIL"]
    output.say(f"\n{'failed: ' + ', '.join(failed) if failed else 'all checks passed'}")
    return {"ok": not failed, "checks": results}, environment.EXIT_FAILED if failed else environment.EXIT_OK


def _check(name: str, call: Callable[[], str]) -> dict[str, str]:
    output.progress(f"checking {name}")
    try:
        return {"name": name, "status": "ok", "found": call()}
    except Skipped as reason:
        return {"name": name, "status": "-", "found": str(reason)}
    except Exception as error:  # any error in a check is reported as the result of that check
        return {
            "name": name,
            "status": "FAIL",
            "found": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        }


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def _versions(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return found, missing


def _packages() -> str:
    found, missing = _versions(REQUIRED)
    if missing:
        raise RuntimeError(f"not installed: {', '.join(missing)}; install them with pip install diffusion-lm")
    return ", ".join(found)


def _packages_for_tasks() -> str:
    found, missing = _versions(FOR_TASKS)
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}; only materialise needs them")
    return ", ".join(found)


def _devices() -> str:
    import jax

    devices = jax.devices()
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){processes}" + (
        f", {output.size(memory)} each" if memory else ""
    )


def _writable(folder: Path) -> str:
    if is_bucket(folder):
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    return f"{folder}, {output.size(shutil.disk_usage(folder).free)} free"


def _compile_cache() -> str:
    folder = environment.compile_cache_folder()
    if folder is None:
        raise Skipped("off (DIFFUSION_LM_COMPILE_CACHE)")
    return _writable(folder)


def _data_folder() -> str:
    from diffusion_lm.data.store import default_root

    return _writable(default_root())


def _materialised() -> str:
    """Counts the materialised splits and names those with characters that their vocabulary cannot encode."""
    from diffusion_lm.data.round_trip import loss_sentences
    from diffusion_lm.data.store import MANIFEST, default_root, read_manifest

    root = default_root()
    if is_bucket(root) or not root.is_dir():
        raise Skipped("no data materialised yet")
    manifests = [read_manifest(path.parent) for path in sorted(root.glob(f"*/*/{MANIFEST}"))]
    found = [manifest for manifest in manifests if manifest is not None]
    lossy = [
        sentence
        for manifest in found
        for sentence in loss_sentences(f"{manifest.task}/{manifest.split}", manifest.unwritten)
    ]
    return "; ".join([f"{len(found)} splits", *lossy])


def _gin_files() -> str:
    folder = packaged_folder()
    files = list(folder.rglob("*.gin"))
    if not files:
        raise RuntimeError(f"no gin files in {folder}")
    return f"{len(files)} in {folder}"


def _tasks(names: list[str]) -> str:
    if _versions(FOR_TASKS)[1]:
        raise Skipped("not checked: packages are missing")
    from diffusion_lm.data import seqio_source
    from diffusion_lm.data.materialise import TASK_MODULES

    environment.import_modules(TASK_MODULES)
    for name in names:
        seqio_source.get_task(name)
    registered = list(seqio_source.seqio.TaskRegistry.names())
    return f"{len(registered)} registered" + (f"; {', '.join(names)} resolve" if names else "")


def _one_step() -> str:
    """Trains a small network for one step on random tokens and reports its loss."""
    import jax
    import numpy as np

    from diffusion_lm.architectures.single_stream import SingleStream
    from diffusion_lm.core.special import SpecialTokens
    from diffusion_lm.core.types import Batch
    from diffusion_lm.nn.transformer import TransformerSpec
    from diffusion_lm.objectives.autoregressive import Autoregressive
    from diffusion_lm.parallel.mesh import MeshSpec
    from diffusion_lm.parallel.rules import LogicalRules
    from diffusion_lm.parallel.shardings import place_batch
    from diffusion_lm.training.optimizers import AdamW
    from diffusion_lm.training.step import TrainStep

    spec = TransformerSpec(vocab_size=64, num_layers=2, model_dim=32, num_heads=2, head_dim=16, mlp_dim=64)
    train_step = TrainStep(SingleStream(spec), Autoregressive(), AdamW(), MeshSpec(), LogicalRules())
    shape = (2 * jax.device_count(), 16)
    slots = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    arrays: dict[str, Any] = dict(
        tokens=np.random.default_rng(0).integers(3, 64, shape, dtype=np.int32),
        target_mask=slots > 0,
        loss_weights=(slots > 0).astype(np.float32),
        segment_ids=np.ones(shape, np.int32),
        positions=slots,
        example_ids=np.repeat(np.arange(shape[0], dtype=np.uint32)[:, None], shape[1], axis=1),
        special=SpecialTokens(spec.vocab_size),
    )
    key = jax.random.key(0)
    placed = place_batch(Batch(**arrays), LogicalRules(), train_step.mesh)
    _, stats = train_step(train_step.init(key), placed, key, np.float32(1e-3))
    loss = float(stats.terms.loss)
    if not np.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    return f"loss {loss:.3f} (ln 64 = 4.159)"
