"""What is written to a gin file is read back as the same data, and nothing of it runs."""

import pytest

from diffusion_lm.cli import config
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.gin_text import Built, GinText, MacroName, literal

HOSTILE = (
    "a\nimport os",
    "a\r\nMODEL = 3",
    "'''\"\"\"\\",
    "'; include 'x.gin'",
    "@os.system('touch owned')",
    "%MACRO",
    "a\u2028b\x85c\x00d\udcffe",
    "# no comment \\",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_read_back_as_data(text, tmp_path):
    """As a value and as a comment; the file has the one binding that was meant."""
    written = GinText().comment(text).imports("diffusion_lm.nn.rope")
    written.bind("NAME", text).bind("LIST", [text, (text,), {text: text}])
    (tmp_path / "a.gin").write_text(written.text(), encoding="utf-8")
    loaded = config.load([str(tmp_path / "a.gin")], macros=["NAME", "LIST"])
    assert [binding.name for binding in loaded.bindings] == ["NAME", "LIST"]
    assert loaded.build_macro("NAME") == text
    assert loaded.build_macro("LIST") == [text, (text,), {text: text}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"x", 1j, len])
def test_what_is_not_plain_data_is_refused(value):
    for given in (value, [value], {"a": value}):
        with pytest.raises(ConfigError, match="cannot be written to a gin file"):
            literal(given)


def test_numbers_of_numpy_and_other_subclasses_are_refused():
    """Their `repr` is code ("np.int64(3)"), and a subclass of str may have any `repr`."""
    np = pytest.importorskip("numpy")

    class Text(str):
        def __repr__(self):
            return "@os.system"

    for value in (np.int64(3), np.float64(0.5), Text("a")):
        with pytest.raises(ConfigError, match="is not plain data"):
            GinText().bind("NAME", value)


@pytest.mark.parametrize("name", ["", "A B", "A\nB = 1", "A\n", "1A", "A = 1 #", "é", "@A", "a//b", "a..b", "A:"])
def test_names_are_identifiers(name):
    text = GinText().imports("diffusion_lm.nn.rope")
    with pytest.raises(ConfigError, match="not a valid name of"):
        text.bind(name, 1)
    with pytest.raises(ConfigError, match="not a valid name of"):
        text.block("rope.LinearRope", {name: 1})
    with pytest.raises(ConfigError, match="not a valid name of"):
        text.bind("A", MacroName(name))
    with pytest.raises(ConfigError, match="not a valid name of"):
        text.bind("A", Built(name))


def test_only_modules_of_the_package_are_named():
    with pytest.raises(ConfigError, match="only modules of diffusion_lm"):
        GinText().imports("os.path")
    with pytest.raises(ConfigError, match="only modules of diffusion_lm"):
        GinText().imports("diffusion_lm_tasks.anything")
    text = GinText().imports("diffusion_lm.nn.rope")
    for refused in (lambda: text.bind("os.system", 1), lambda: text.bind("A", Built("os.system"))):
        with pytest.raises(ConfigError, match="does not import os"):
            refused()


def test_an_include_has_no_scope_that_its_name_gives():
    assert GinText().include("it's.gin").text() == 'include "it\'s.gin"\n'
    with pytest.raises(ConfigError, match="' as '"):
        GinText().include("a.gin as b")
