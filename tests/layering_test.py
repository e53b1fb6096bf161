"""The rules of CONTRIBUTING.md that a machine can check: layers, foreign imports, file lengths, the gin folder."""

import ast
import functools
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "diffusion_lm"
LAYERS = {
    "core": 0,
    "nn": 1,
    "noise": 1,
    "parallel": 1,
    "architectures": 2,
    "objectives": 3,
    "samplers": 3,
    "data": 4,
    "training": 5,
    "evaluation": 5,
    "recipes": 5,
    "interop": 5,
    "planning": 5,
    "bench": 5,
    "cli": 6,
}
# Rooms of these floors do not import each other; those of floor 5 may (recipes use training and evaluation).
SEPARATE_LAYERS = (1, 3)
MODULES = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = sorted(
    path for folder in ("diffusion_lm", "tasks", "tests", "launch") for path in (ROOT / folder).rglob("*.py")
)


def _name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: pathlib.Path) -> set[str]:
    """Full names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno} imports relatively; give the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(name: str) -> str | None:
    """`diffusion_lm.nn.masks.Causal` -> `nn`; None for what is not on a floor."""
    parts = name.split(".")
    return parts[1] if parts[0] == "diffusion_lm" and len(parts) > 1 and parts[1] in LAYERS else None


def _violation(importer: str, imported: str) -> str | None:
    below, above = LAYERS[importer], LAYERS[imported]
    if above > below:
        return f"floor {below} imports floor {above}"
    if above == below and importer != imported and below in SEPARATE_LAYERS:
        return "siblings of this floor do not import each other"
    return None


def test_every_folder_is_on_a_floor():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(LAYERS), f"give {folders - set(LAYERS)} a layer in {__file__}"


def test_violations_are_seen():
    assert _violation("core", "nn")
    assert _violation("nn", "parallel")
    assert _violation("objectives", "samplers")
    assert _violation("recipes", "training") is None
    assert _violation("nn", "core") is None


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_lower_floors_never_import_higher_ones(path):
    importer = _room("diffusion_lm." + path.relative_to(PACKAGE).as_posix().replace("/", ".").removesuffix(".py"))
    if importer is None:
        assert not any(_room(name) for name in _imports(path)), "the package itself imports no floor"
        return
    wrong = {
        name: why
        for name in _imports(path)
        if (imported := _room(name)) is not None and (why := _violation(importer, imported))
    }
    assert not wrong


def _may_import(path: pathlib.Path) -> set[str]:
    """Which of the confined packages a file of the library may import."""
    where = path.relative_to(PACKAGE).as_posix()
    if where in ("cli/config.py", "cli/gin_reader.py"):
        return {"gin"}
    if where.startswith("data/seqio_"):
        return {"seqio", "tensorflow", "tensorflow_datasets"}
    if where == "bench/torch_baseline.py":  # a script that another interpreter runs
        return {"torch", "transformers"}
    return set()


CONFINED = {"gin", "seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text", "clu", "t5", "t5x", "absl"}
CONFINED |= {"torch", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_gin_and_tensorflow_stay_in_their_packages(path):
    found = {name.split(".")[0] for name in _imports(path)} & CONFINED
    assert found <= _may_import(path)


@pytest.mark.parametrize("path", sorted((ROOT / "tasks").rglob("*.py")), ids=_name)
def test_tasks_import_data_and_metrics_only(path):
    allowed = ("diffusion_lm.core", "diffusion_lm.data", "diffusion_lm.evaluation.metrics")
    ours = {name for name in _imports(path) if name.startswith("diffusion_lm.")}
    assert all(name.startswith(allowed) for name in ours), ours


@functools.cache
def _class_names(*packages: str) -> set[str]:
    return {
        node.name
        for package in packages
        for path in (PACKAGE / package).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


def _switches(source: str, classes: set[str]) -> list[str]:
    """Comparisons and type tests by which code would tell one objective, sampler or architecture from another."""
    subjects = ("objective", "sampler", "architecture")

    def named(node: ast.expr) -> bool:
        """The thing itself, its type or its name: `run.objective`, `type(sampler)`, `x.objective.name`."""
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("type", "str", "repr"):
            return any(named(argument) for argument in node.args)
        if isinstance(node, ast.Attribute) and node.attr in ("name", "kind", "__name__", "__qualname__", "__class__"):
            return named(node.value)
        last = getattr(node, "attr", getattr(node, "id", "")).lower()
        return last.endswith(subjects) or last.removesuffix("_name").removesuffix("_kind").endswith(subjects)

    def names_class(node: ast.expr) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(getattr(part, "attr", getattr(part, "id", None)) in classes for part in parts)

    def literal(node: ast.expr) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            wrong = any(map(named, sides)) and any(literal(side) or names_class(side) for side in sides)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            wrong = len(node.args) == 2 and names_class(node.args[1])
        elif isinstance(node, ast.Match):
            wrong = named(node.subject)
        else:
            continue
        if wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "if run.objective == 'sundae': pass",
        "if objective_name in ('ar', 'mdlm'): pass",
        "if type(sampler).__name__ == 'Greedy': pass",
        "isinstance(x, Denoising)",
        "isinstance(x, (int, objectives.Denoising))",
        "type(stage.run.objective) is Denoising",
        "match objective:\n  case _: pass",
    ],
)
def test_switches_are_seen(source):
    assert _switches(source, {"Denoising"})


@pytest.mark.parametrize(
    "source", ["objective is None", "a.objective == b.objective", "name == 'x'", "isinstance(x, int)"]
)
def test_harmless_comparisons_are_let_through(source):
    assert not _switches(source, {"Denoising"})


ABOVE = [path for path in MODULES if LAYERS.get(path.relative_to(PACKAGE).parts[0], -1) >= 4]


@pytest.mark.parametrize("path", ABOVE, ids=_name)
def test_nothing_above_the_objectives_tells_them_apart(path):
    classes = _class_names("objectives", "samplers", "architectures")
    assert not _switches(path.read_text(), classes)


def _loose_json(source):
    """Lines that may write NaN or Infinity, which are not JSON."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if getattr(call.func, "attr", "") in ("dumps", "dump")
        and getattr(getattr(call.func, "value", None), "id", "") == "json"
        and not any(word.arg == "allow_nan" and ast.unparse(word.value) == "False" for word in call.keywords)
    ]


@pytest.mark.parametrize("source", ["json.dumps(x)", "json.dump(x, file, allow_nan=True)"])
def test_loose_json_is_seen(source):
    assert _loose_json(source)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_that_is_written_as_json_can_hold_nan(path):
    """Results go through `core.files.json_text`, where such numbers become null."""
    assert not _loose_json(path.read_text())


def test_files_are_small():
    lengths = {_name(path): len(path.read_text().splitlines()) for path in ALL_CODE}
    assert not {name: length for name, length in lengths.items() if length > 500}, "over 500 lines a file is two files"
    long = {name: length for name, length in lengths.items() if length > 300}
    assert len(long) <= len(lengths) / 10, f"more than a tenth of the files is over 300 lines: {long}"
    assert statistics.median(lengths.values()) <= 300


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("*_test.py")]
    assert sorted(names) == sorted(set(names))


def test_gin_folder_does_not_shadow_the_gin_package():
    """With an `__init__.py` in gin/, `import gin` at the top of the repository would find the folder."""
    assert not list((ROOT / "gin").rglob("__init__.py"))
    assert not list((ROOT / "gin").rglob("*.py"))
    run = subprocess.run(
        [sys.executable, "-c", "import gin; print(gin.__file__); gin.parse_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert pathlib.Path(run.stdout.strip()).parent != ROOT / "gin"


def test_no_module_is_called_tasks():
    """tasks/ is importable as diffusion_lm_tasks: a top-level module `tasks` would collide with everybody's."""
    wrong = {_name(path) for path in ALL_CODE if any(name.split(".")[0] == "tasks" for name in _imports(path))}
    assert not wrong
