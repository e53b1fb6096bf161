"""What is imported, what is installed, what the wheel holds."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import packaging.requirements
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TENSORFLOW_SIDE = ("tensorflow", "tensorflow-text", "tensorflow-datasets", "seqio", "clu")

# Does not find the packages in the list, as on a machine without them.
BLOCKER = """
import importlib.machinery, sys
blocked = set({blocked!r})
class Blind:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Blind()
"""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _core_distributions() -> set[str]:
    """What the core dependencies bring in, without TensorFlow, SeqIO and what only they need."""
    found: set[str] = set()
    waiting = [_canonical(re.match(r"[\w.-]+", need)[0]) for need in PROJECT["project"]["dependencies"]]
    while waiting:
        name = waiting.pop()
        if name in found or name in TENSORFLOW_SIDE:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [_canonical(re.match(r"[\w.-]+", need)[0]) for need in needs if "extra ==" not in need]
    return found


def _blocked_modules() -> set[str]:
    """Top-level modules that are installed here but would not be with the core alone."""
    core = _core_distributions() | {"diffusion-lm", "pip", "setuptools"}
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {_canonical(owner) for owner in owners} & core and re.fullmatch(r"[A-Za-z]\w*", module)
    }


def _python(code: str, cwd: pathlib.Path = ROOT) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def test_import_loads_nothing_heavy():
    loaded = json.loads(_python("import json, sys, diffusion_lm; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"tensorflow", "seqio", "tensorflow_datasets", "gin", "clu", "keras", "tokenizers", "huggingface_hub"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_T59_every_module_imports_with_the_core_only(tmp_path):
    """TensorFlow, SeqIO, TFDS and all that comes with extras only are refused; data/seqio_*.py alone may need them."""
    blocked = _blocked_modules()
    expected = {"pytest", "ruff", "tensorflow", "seqio", "tensorflow_datasets"}
    installed = {module for module in expected if importlib.metadata.packages_distributions().get(module)}
    assert installed <= blocked
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in sorted((ROOT / "diffusion_lm").rglob("*.py"))
        if not path.name.startswith("seqio_") and path.name != "__main__.py"
    ]
    code = BLOCKER.format(blocked=sorted(blocked)) + (
        "import importlib, json, traceback\n"
        "failed = {}\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception:\n"
        "        failed[name] = traceback.format_exc()[-600:]\n"
        "print(json.dumps(failed))\n"
    )
    failed = json.loads(_python(code, cwd=tmp_path).splitlines()[-1])
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())


TRAIN_FROM_MATERIALISED = """
import io, pathlib, sys
import numpy as np
import sentencepiece
from diffusion_lm.architectures.single_stream import SingleStream
from diffusion_lm.data.converters import SingleStreamConverter
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.iterator import DataPipeline
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import split_folder, write_records
from diffusion_lm.data.vocabulary import Vocabulary
from diffusion_lm.nn.transformer import TransformerSpec
from diffusion_lm.objectives.autoregressive import Autoregressive
from diffusion_lm.training.loop import train
from diffusion_lm.training.run import TrainRun

text, model = [f"fact {n} is {n * n}" for n in range(40)], io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text), model_writer=model, vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1,
    bos_id=2, unk_id=3, minloglevel=2)
vocabulary = Vocabulary(model.getvalue())
records = [
    Record(inputs=vocabulary.encode(line[:6]), targets=vocabulary.encode(line[6:]), example_id=n)
    for n, line in enumerate(text)]
write_records(split_folder("facts", "train", "."), records, Manifest("facts", "train", vocabulary.specials),
              vocabulary=vocabulary)
spec = TransformerSpec(vocab_size=vocabulary.size, num_layers=1, model_dim=16, num_heads=1, head_dim=16, mlp_dim=16)
data = DataPipeline(sources=(GrainSource("facts", root="."),), converter=SingleStreamConverter(12, 24))
run = TrainRun(model=SingleStream(spec), objective=Autoregressive(), data=data, steps=2, batch_size=4)
assert train(run, "run").step == 2
assert not {"tensorflow", "seqio", "tensorflow_datasets"} & set(sys.modules)
print("trained")
"""


def test_T59_training_from_materialised_data_needs_no_tensorflow(tmp_path):
    code = BLOCKER.format(blocked=sorted(_blocked_modules())) + TRAIN_FROM_MATERIALISED
    assert _python(code, cwd=tmp_path).endswith("trained\n")


def test_every_package_is_listed():
    """`packages` in pyproject.toml is a list because two folders are mapped; a new folder must be added to it."""
    here = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("diffusion_lm/**/__init__.py")
    }
    here |= {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".").replace("tasks", "diffusion_lm_tasks", 1)
        for path in ROOT.glob("tasks/**/__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == here | {"diffusion_lm.gin_files"}


def test_lock_pins_every_dependency():
    lock = {
        _canonical(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    extras = [need for needs in PROJECT["project"]["optional-dependencies"].values() for need in needs]
    direct = {_canonical(re.match(r"[\w.-]+", need)[0]) for need in PROJECT["project"]["dependencies"] + extras}
    assert direct <= lock, "run make lock"


@pytest.mark.skipif(not os.environ.get("DIFFUSION_LM_LOCKED"), reason="not an environment that the Makefile made")
def test_environment_is_the_locked_one():
    pins = [packaging.requirements.Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    locked = {_canonical(pin.name): pin.specifier for pin in pins if pin.marker is None or pin.marker.evaluate()}
    ours = {"diffusion-lm", "pip", "uv"}
    installed = {_canonical(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    wrong = {
        name: version
        for name, version in installed.items()
        if name not in ours and not (name in locked and version in locked[name])
    }
    assert not wrong, "other versions than constraints.txt has; run make lock, or remove the environment"


def test_license_is_complete():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy: a build inside of the repository would pick up what earlier builds left there."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffusion_lm", "gin", "tasks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_every_file_of_the_package(wheel):
    held = set(wheel.namelist())
    for folder, target in {"diffusion_lm": "diffusion_lm", "tasks": "diffusion_lm_tasks"}.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_file() and "__pycache__" not in inside.parts:
                assert f"{target}/{inside.as_posix()}" in held


def test_wheel_holds_every_gin_file(wheel):
    held = set(wheel.namelist())
    files = [path.relative_to(ROOT / "gin").as_posix() for path in (ROOT / "gin").rglob("*.gin")]
    assert files
    assert {f"diffusion_lm/gin_files/{name}" for name in files} <= held


def test_wheel_claims_two_modules_only(wheel):
    """Neither `gin` (the package of gin-config) nor `tasks`, `tests`, `launch` becomes a module of ours."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"diffusion_lm", "diffusion_lm_tasks"}


def test_wheel_has_license_and_command(wheel):
    names = {pathlib.PurePosixPath(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "LICENSE" in names
    assert "diffusion-lm = diffusion_lm.cli.main:main" in wheel.read(names["entry_points.txt"]).decode()
