"""Rules about the package's classes: unique names, typed settings, and a limit of fields per method."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import diffusion_lm

ROOT = pathlib.Path(diffusion_lm.__file__).parent
SHARED_NAMES = {
    "Cosine",  # a noise schedule and a learning rate schedule, in modules of their own
    "Schedule",  # their protocols
    "ExactCount",  # masks of an exact count, and the estimator that scores by them (LLaDA)
}
MOST_FIELDS = 14


def classes():
    """Yields (file, class) of every public class of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield path.relative_to(ROOT), node


def untyped_fields(node: ast.ClassDef) -> list[str]:
    """Returns the fields of a dataclass whose annotation contains `Any`; class variables are no fields."""
    is_dataclass = any("dataclass" in ast.unparse(one) for one in (*node.decorator_list, *node.bases))
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign)] if is_dataclass else []
    return [
        f"{node.name}.{ast.unparse(field.target)}: {ast.unparse(field.annotation)}"
        for field in fields
        if not ast.unparse(field.annotation).startswith("ClassVar")
        and any(isinstance(name, ast.Name) and name.id == "Any" for name in ast.walk(field.annotation))
    ]


def test_no_two_public_classes_have_the_same_name():
    homes: dict[str, list[str]] = {}
    for path, node in classes():
        homes.setdefault(node.name, []).append(str(path))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1 and name not in SHARED_NAMES} == {}
    assert {name for name in SHARED_NAMES if len(homes.get(name, ())) < 2} == set(), "an exception that is not needed"


def test_no_field_of_a_dataclass_is_any():
    assert [field for _, node in classes() for field in untyped_fields(node)] == []


def test_an_untyped_field_would_be_found():
    source = "@dataclasses.dataclass\nclass A:\n    x: int\n    y: dict[str, Any]\n    z: ClassVar[Any] = 1\n"
    assert untyped_fields(ast.parse(source).body[0]) == ["A.y: dict[str, Any]"]


@pytest.mark.parametrize("package", ["objectives", "samplers"])
def test_objectives_and_samplers_have_few_fields(package):
    found = {}
    for info in pkgutil.iter_modules([str(ROOT / package)]):
        module = importlib.import_module(f"diffusion_lm.{package}.{info.name}")
        for name, one in inspect.getmembers(module, dataclasses.is_dataclass):
            if one.__module__ == module.__name__ and hasattr(one, "generate" if package == "samplers" else "loss"):
                found[name] = len(dataclasses.fields(one))
    assert len(found) >= 6
    assert {name: count for name, count in found.items() if count > MOST_FIELDS} == {}
