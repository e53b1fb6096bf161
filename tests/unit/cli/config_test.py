"""Loading gin files: what is accepted, and errors that say what is wrong, where, and what to do."""

import sys
import textwrap

import pytest

from diffusion_lm.cli import config
from diffusion_lm.core.errors import ConfigError

PARTS = """
import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol
from diffusion_lm.core.errors import require

class Objective(Protocol):
    kind: str
    def loss(self, x): ...

@dataclasses.dataclass(frozen=True)
class Causal:
    kind: str = "exact"
    z_loss: float = 0.0
    def loss(self, x): ...

@dataclasses.dataclass(frozen=True)
class Net:
    width: int = 8
    mode: Literal["full", "none"] = "none"

@dataclasses.dataclass(frozen=True)
class Run:
    model: Net
    objective: Objective
    steps: int = 1
    rate: float = 0.1
    name: str = "run"
    flag: bool = False
    lengths: tuple[int, ...] = ()
    extra: Mapping[str, int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))
        require(self.steps > 0, f"steps = {self.steps}", where="Run.steps", fix="Use >= 1.")

@dataclasses.dataclass(frozen=True)
class Pair:
    first: Run
    second: Run
"""
HEAD = """
from __gin__ import dynamic_registration
import gin_test_parts.parts
from gin_test_parts import parts
"""
BASE = (
    HEAD
    + """
parts.Run.model = @parts.Net()
parts.Run.objective = @parts.Causal()
parts.Run.steps = %STEPS
STEPS = 3
"""
)


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "gin_test_parts").mkdir()
    (folder / "gin_test_parts" / "__init__.py").write_text("")
    (folder / "gin_test_parts" / "parts.py").write_text(PARTS)
    (folder / "gin_test_parts" / "other.py").write_text(
        "class Net:\n    def __init__(self, width=1): self.width = width\n"
    )
    sys.path.insert(0, str(folder))
    import gin_test_parts.parts

    yield gin_test_parts.parts
    sys.path.remove(str(folder))


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    return write


def build(write, parts, text, *bindings, root="Run"):
    return config.load([write("x.gin", text)], bindings).build(getattr(parts, root))


def sentence(write, parts, text, *bindings, root="Run"):
    with pytest.raises(ConfigError) as caught:
        build(write, parts, text, *bindings, root=root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_builds_the_configured_object(write, parts):
    run = build(write, parts, BASE + "parts.Run.lengths = [1, 2]\nparts.Run.rate = 1\nparts.Run.extra = {'a': 1}")
    assert run == parts.Run(parts.Net(), parts.Causal(), steps=3, rate=1, lengths=(1, 2), extra={"a": 1})


def test_macro_misspelt_where_it_is_set(write, parts):
    message = sentence(write, parts, BASE + "STEPPS = 4\n")
    assert message == (
        "no binding uses the macro STEPPS; did you mean STEPS? (x.gin:10). Correct the name or remove the line."
    )


def test_macro_misspelt_where_it_is_used(write, parts):
    message = sentence(write, parts, BASE + "parts.Net.width = %STEP\n")
    assert "macro STEP is not defined; did you mean STEPS? (x.gin:10)" in message


def test_macro_misspelt_on_the_command_line(write, parts):
    assert "no binding uses the macro STEPPS; did you mean STEPS? (--gin.STEPPS)" in sentence(
        write, parts, BASE, "STEPPS=4"
    )


def test_macro_of_an_included_file_may_be_unused(write, parts):
    write("preset.gin", HEAD + "WIDTH = 3\n")
    assert build(write, parts, BASE + "include 'preset.gin'\n").steps == 3


def test_macro_can_be_built_alone(write, parts):
    text = HEAD + "NET = @parts.Net()\nparts.Net.width = 5\n"
    loaded = config.load([write("x.gin", text)], ["Net.mode=full"], macros=["NET"])
    assert loaded.build_macro("NET") == parts.Net(5, "full")
    with pytest.raises(ConfigError, match="do not define the macro SAMPLER"):
        loaded.build_macro("SAMPLER")


def test_required_macro_must_be_set(write, parts):
    text = BASE.replace("STEPS = 3", "STEPS = %gin.REQUIRED")
    assert "macro STEPS has no value (x.gin:8). Set it with --gin.STEPS=VALUE" in sentence(write, parts, text)
    assert build(write, parts, text, "STEPS=5").steps == 5


def test_macro_that_refers_to_itself(write, parts):
    assert "is defined in terms of itself" in sentence(
        write, parts, BASE.replace("STEPS = 3", "STEPS = %B\nB = %STEPS")
    )


def test_unknown_parameter(write, parts):
    message = sentence(write, parts, BASE + "parts.Run.step = 4\n")
    assert (
        "Run has no parameter 'step'; did you mean steps, rate? (x.gin:10). Its parameters are model, objective, steps"
        in message
    )


def test_unknown_class(write, parts):
    message = sentence(write, parts, BASE + "parts.Rum.steps = 4\n")
    assert "parts has no 'Rum'; did you mean Run? (x.gin:10)" in message


def test_unknown_class_in_a_reference(write, parts):
    message = sentence(write, parts, BASE + "parts.Run.objective = @parts.Casual()\n")
    assert "parts has no 'Casual'; did you mean Causal? (x.gin:10)" in message


def test_module_that_is_not_imported(write, parts):
    message = sentence(write, parts, BASE + "part.Run.steps = 4\n")
    assert "'part' of part.Run is not imported in this file; did you mean parts" in message


def test_module_that_does_not_exist(write, parts):
    message = sentence(write, parts, HEAD + "from gin_test_parts import pats\n")
    assert "no module named gin_test_parts.pats; did you mean parts?" in message
    assert "(x.gin:5)" in message


def test_missing_gin_file_suggests_similar_names(write, parts):
    write("quick.gin", BASE)
    with pytest.raises(ConfigError, match=r"gin file 'quik.gin' not found; did you mean quick.gin.*\? \(--gin_file\)"):
        config.load(["quik.gin"])


def test_include_under_a_scope(write, parts):
    """Two files that bind the same parameter can be used together; nested includes and scopes get the scope too."""
    head = "from __gin__ import dynamic_registration\nfrom gin_test_parts import parts\n"
    write("narrow.gin", head + "WIDTH = 8\nparts.Net.width = 2\n")
    write("wide.gin", head + "include 'mode.gin'\nparts.Net.width = 64\ninner/parts.Net.width = 128\n")
    write("mode.gin", head + "parts.Net:\n  mode = 'full'\n")
    text = BASE + "include 'narrow.gin as narrow'\ninclude 'wide.gin as wide'\n"
    assert build(write, parts, text, "Run.model=@narrow/Net()").model == parts.Net(width=2)
    assert build(write, parts, text, "Run.model=@wide/Net()").model == parts.Net(width=64, mode="full")
    assert build(write, parts, text, "Run.model=@wide/inner/Net()").model == parts.Net(width=128, mode="full")
    assert build(write, parts, text).model == parts.Net()


def test_scopes_in_the_references_of_a_file_under_a_scope_are_inside_it(write, parts):
    write("run.gin", HEAD + "parts.Run.model = @inner/parts.Net()\ninner/parts.Net.width = 16\n")
    text = BASE + "include 'run.gin as own'\nparts.Pair.first = @own/parts.Run()\nparts.Pair.second = @parts.Run()\n"
    pair = build(write, parts, text, root="Pair")
    assert (pair.first.model.width, pair.second.model.width) == (16, 8)


def test_missing_include_names_the_including_line(write, parts):
    assert "(x.gin:1)" in sentence(write, parts, "include 'nowhere.gin'\n")


def test_include_cycle(write, parts):
    assert "includes itself" in sentence(write, parts, "include 'x.gin'\n")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("parts.Run.steps = 'x'", "Run.steps = 'x': must be an int"),
        ("parts.Run.steps = 1e3", "Run.steps = 1000.0: must be an int (x.gin:10). Write 1000."),
        ("parts.Run.steps = '12'", "Write 12 without quotes."),
        ("parts.Run.steps = True", "Run.steps = True: must be an int"),
        ("parts.Run.steps = None", "Run.steps = None: must be an int"),
        ("parts.Run.rate = 'x'", "Run.rate = 'x': must be a float"),
        ("parts.Run.flag = 1", "Run.flag = 1: must be a bool (True or False)"),
        ("parts.Run.flag = 'true'", "Write True without quotes."),
        ("parts.Run.name = 3", "Run.name = 3: must be a string"),
        ("parts.Run.lengths = 3", "Run.lengths = 3: must be a tuple of int (x.gin:10). Write (3,)."),
        ("parts.Run.lengths = (3, 'x')", "Run.lengths = [3, 'x']: must be a tuple of int"),
        ("parts.Run.extra = {'a': 'b'}", "Run.extra = {'a': 'b'}: must be a Mapping or None"),
        ("parts.Net.mode = 'ful'", "Net.mode = 'ful': must be one of 'full', 'none'"),
        ("parts.Run.model = 3", "Run.model = 3: must be a Net"),
        ("parts.Run.model = @parts.Net", "Write @Net(), with parentheses"),
        ("parts.Run.model = @parts.Causal()", "Run.model = @Causal(): must be a Net"),
        ("parts.Run.objective = @parts.Net()", "Net has no kind, loss."),
        ("parts.Run.steps = @parts.Net()", "Run.steps = @Net(): must be an int"),
    ],
)
def test_wrong_type(write, parts, line, complaint):
    assert complaint in sentence(write, parts, BASE + line + "\n")


def test_wrong_type_through_a_macro_names_both_places(write, parts):
    message = sentence(write, parts, BASE, "STEPS='many'")
    assert "Run.steps = 'many' (from STEPS, --gin.STEPS): must be an int (x.gin:8)" in message


def test_wrong_value_names_the_line_that_set_it(write, parts):
    message = sentence(write, parts, BASE + "parts.Run.steps = 0\n")
    assert message == "steps = 0 (Run.steps, set at x.gin:10). Use >= 1."


def test_missing_parameter(write, parts):
    message = sentence(write, parts, BASE.replace("parts.Run.model = @parts.Net()", ""))
    assert "Run requires model, which no gin file sets (Run.model)" in message


def test_syntax_error(write, parts):
    assert "(x.gin:10)" in sentence(write, parts, BASE + "parts.Run.steps == 4\n")
    assert "(x.gin:1" in sentence(write, parts, BASE + "parts.Run.lengths = (4,\n")


def test_binding_of_a_given_file_must_be_built(write, parts):
    message = sentence(write, parts, BASE + "parts.Pair.first = @parts.Run()\n")
    assert "Pair.first has no effect: no Pair is built (x.gin:10)" in message
    message = sentence(write, parts, BASE + "ar/parts.Run.steps = 2\n")
    assert "ar/Run.steps has no effect: no Run is built in scope 'ar'" in message


def test_binding_of_an_included_file_may_be_unused(write, parts):
    write("preset.gin", HEAD + "parts.Pair.first = @parts.Run()\n")
    assert build(write, parts, BASE + "include 'preset.gin'\n").steps == 3


SCOPES = (
    BASE
    + """
parts.Pair.first = @ar/parts.Run()
parts.Pair.second = @diffusion/parts.Run()
ar/parts.Run.steps = 7
"""
)


def test_scopes(write, parts):
    pair = build(write, parts, SCOPES, root="Pair")
    assert (pair.first.steps, pair.second.steps) == (7, 3)


def test_flag_that_a_scope_overrides_everywhere_is_an_error(write, parts):
    assert build(write, parts, SCOPES, "Run.steps=9", root="Pair").second.steps == 9
    text = SCOPES + "diffusion/parts.Run.steps = 8\n"
    message = sentence(write, parts, text, "Run.steps=9", root="Pair")
    assert (
        "Run.steps has no effect: ar/Run.steps is more specific and overrides it (x.gin:13) (--gin.Run.steps)"
        in message
    )


def test_flag_for_a_macro_that_nothing_built_reads(write, parts):
    write("preset.gin", HEAD + "parts.Pair.first = %WHICH\nWHICH = @parts.Run()\n")
    message = sentence(write, parts, BASE + "include 'preset.gin'\n", "WHICH=@Run()")
    assert "WHICH has no effect: no object that is built uses it (--gin.WHICH)" in message


def test_macro_that_a_flag_makes_unused_is_not_an_error(write, parts):
    assert build(write, parts, BASE, "Run.steps=9").steps == 9


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("STEPS=100", "steps", 100),
        ("Run.steps=100", "steps", 100),
        ("parts.Run.steps=100", "steps", 100),
        ("gin_test_parts.parts.Run.steps=100", "steps", 100),
        ("Run.name='x y'", "name", "x y"),
        ("Run.name=x", "name", "x"),
        ("Run.name=/data/wmt14-fr.en", "name", "/data/wmt14-fr.en"),
        ("Run.name=gs://bucket/x", "name", "gs://bucket/x"),
        ("Run.rate=1e-3", "rate", 1e-3),
        ("Run.flag=True", "flag", True),
        ("Run.extra=None", "extra", None),
        ("Run.lengths=(1, 2)", "lengths", (1, 2)),
        ("Run.steps=%STEPS", "steps", 3),
    ],
)
def test_flags(write, parts, flag, field, value):
    text = BASE if "STEPS" in flag else BASE.replace("parts.Run.steps = %STEPS", "parts.Run.steps = %STEPS # replaced")
    assert getattr(build(write, parts, text, flag), field) == value


def test_flag_with_a_reference_needs_no_import(write, parts):
    assert build(write, parts, BASE, "Run.model=@Net()", "Net.width=16").model.width == 16


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("Run.steps", "--gin.Run.steps has no value. Write --gin.NAME=VALUE."),
        ("Run.flag=true", "true is not a Python value (--gin.Run.flag). Write True"),
        ("Run.name=x y", "gin cannot parse the value x y (--gin.Run.name). Quote a string twice: --gin.Run.name=\"'"),
        ("Rum.steps=3", "the gin files import no class or function named Rum; did you mean Run?"),
        ("Run.step=3", "Run has no parameter 'step'; did you mean steps, rate? (--gin.Run.step)"),
        ("Run.model=@Nett()", "did you mean Net? (--gin.Run.model)"),
    ],
)
def test_wrong_flags(write, parts, flag, complaint):
    assert complaint in sentence(write, parts, BASE, flag)


def test_ambiguous_short_name(write, parts):
    text = BASE + "from gin_test_parts import other\n"
    message = sentence(write, parts, text, "Net.width=3")
    assert "Net is ambiguous: gin_test_parts.other.Net or gin_test_parts.parts.Net" in message
    assert build(write, parts, text, "parts.Net.width=3").model.width == 3
    assert build(write, parts, text, "Net.mode='full'").model.mode == "full", "only one of the two has a mode"


def test_search_path_and_packaged_folder(write, parts, tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    monkeypatch.setattr("diffusion_lm.cli.search_path.packaged_folder", lambda: packaged)
    write("packaged/recipes/a.gin", BASE + "include 'sizes/small.gin'\n")
    write("packaged/sizes/small.gin", HEAD + "parts.Net.width = 2\n")
    assert config.load(["gin/recipes/a.gin"]).build(parts.Run).model.width == 2
    write("mine/sizes/small.gin", HEAD + "parts.Net.width = 4\n")
    assert config.load(["recipes/a.gin"], search_path=["mine"]).build(parts.Run).model.width == 4
    write("sizes/small.gin", HEAD + "parts.Net.width = 6\n")
    assert config.load(["recipes/a.gin"], search_path=["mine"]).build(parts.Run).model.width == 6


def test_resolved_text_builds_the_same_object(write, parts):
    loaded = config.load([write("x.gin", SCOPES)], ["Run.lengths=(4, 5)"])
    pair = loaded.build(parts.Pair)
    text = loaded.resolved()
    assert "STEPS = 3" in text
    assert config.load([write("resolved.gin", text)]).build(parts.Pair) == pair


def test_loading_clears_the_previous_configuration(write, parts):
    build(write, parts, BASE + "parts.Net.width = 99\n")
    assert build(write, parts, BASE).model.width == 8
