"""Every gin file in gin/ is read, checked and built, without data. The files are found, not listed."""

import re

import pytest

from diffusion_lm.cli import config
from diffusion_lm.cli.arguments import build_root
from diffusion_lm.cli.bindings import Reference, macros_in
from diffusion_lm.cli.main import main
from diffusion_lm.cli.search_path import packaged_folder
from diffusion_lm.core.errors import ConfigError

FOLDER = packaged_folder()
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.gin"))
WHOLE = [name for name in FILES if name.startswith("recipes/") and "/parts/" not in name]
SUITES = [name for name in FILES if name.startswith("suites/") and "/parts/" not in name]
BENCH = [name for name in FILES if name.startswith("bench/") and "/parts/" not in name]
PRESETS = [name for name in FILES if not name.startswith("recipes/") and "/parts/" not in name]

STAND_INS = {
    "VOCAB_SIZE": "64",
    "BATCH_SIZE": "8",
    "PEAK_LEARNING_RATE": "1e-3",
    "LEARNING_RATE": "1e-3",
    "TASK": "'embedded_translation'",
    "INITIAL": "'runs/first'",
}
"""Values of macros that a preset leaves to its user. A macro whose name ends in what follows needs no entry."""
STAND_IN_ENDINGS = {"STEPS": "4", "STEPS_SMALL": "4", "STEPS_LARGE": "4", "EXAMPLES": "4", "LENGTH": "8", "WINDOW": "8"}


def wrapped(tmp_path, *names):
    """Returns the name of a file that includes `names`, as a recipe would."""
    path = tmp_path / "wrapper.gin"
    lines = [f"include '{name}'" for name in names]
    path.write_text("\n".join(["from __gin__ import dynamic_registration", *lines, ""]))
    return str(path)


def load(tmp_path, *names, macros=None):
    """Returns the configuration of presets, macros that they leave open bound to stand-ins."""
    path, bindings = wrapped(tmp_path, *names), dict(macros or {})
    while True:
        try:
            return config.load([path], [f"{name}={value}" for name, value in bindings.items()])
        except ConfigError as error:
            missing = re.match(r"macro (\S+) (is not defined|has no value)", error.what)
            if not missing or missing[1] in bindings:
                raise
            bindings[missing[1]] = stand_in(missing[1])


def stand_in(name):
    if name in STAND_INS:
        return STAND_INS[name]
    ending = next((value for end, value in STAND_IN_ENDINGS.items() if name.endswith(end)), None)
    assert ending is not None, f"give macro {name} a stand-in in {__file__}"
    return ending


def companions(name):
    """Returns the presets that one is meant to be combined with."""
    both = "_encoder_decoder" if "encoder_decoder" in name else ""
    if name.startswith("models/sizes/"):
        return [name, f"models/{'encoder_decoder' if both else 'decoder_only'}.gin"]
    if name == "models/lora.gin":
        return ["models/decoder_only.gin", "models/sizes/nano.gin", name]
    if name.startswith("models/"):
        return [name, f"models/sizes/nano{both}.gin"]
    return [name]


def test_there_are_files():
    assert len(FILES) > 10
    assert {name.count("/") for name in WHOLE} == {1, 2}, "recipes of subfolders are found too"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_checked_and_what_it_offers_can_be_built(name, tmp_path):
    loaded = load(tmp_path, *companions(name))
    assert loaded.bindings
    if name.startswith("runs/"):
        assert build_root(loaded) == build_root(loaded), "built twice, it must be equal"
        return
    offers = [one.scope for one in loaded.current.values() if isinstance(one.value, Reference) and one.is_macro]
    for offer in offers:
        assert loaded.build_macro(offer) == loaded.build_macro(offer), "built twice, it must be equal"


def test_every_part_is_included_by_a_file():
    loaded = [config.load([f"gin/{name}"]) for name in [*WHOLE, *BENCH]]
    loaded += [config.load([f"gin/{name}"], macros=["SUITE"]) for name in SUITES]
    loaded += [config.load([f"gin/{name}"], macros=["SAMPLER"]) for name in PRESETS if name.startswith("samplers/")]
    used = {path.resolve() for one in loaded for path in one.files}
    assert {name for name in FILES if "/parts/" in name and (FOLDER / name).resolve() not in used} == set()


@pytest.mark.parametrize("name", WHOLE)
def test_recipe_builds_and_builds_equal_objects(name):
    root = build_root(config.load([f"gin/{name}"]))
    assert root == build_root(config.load([f"gin/{name}"]))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.thorough
def test_resolved_recipe_is_the_same_recipe(name, tmp_path):
    loaded = config.load([f"gin/{name}"])
    root = build_root(loaded)
    (tmp_path / "resolved.gin").write_text(loaded.resolved())
    assert build_root(config.load([str(tmp_path / "resolved.gin")])) == root


@pytest.mark.parametrize("name", WHOLE)
def test_misspelt_macro_is_refused_in_every_recipe(name):
    loaded = config.load([f"gin/{name}"])
    referred = {macro for one in loaded.bindings for macro in macros_in(one.value)}
    chosen = next(one.scope for one in loaded.current.values() if one.is_macro and one.scope in referred)
    with pytest.raises(ConfigError, match=rf"no binding uses the macro {chosen}X; did you mean {chosen}\b"):
        config.load([f"gin/{name}"], [f"{chosen}X=1"])


@pytest.mark.parametrize("name", WHOLE)
def test_unknown_parameter_and_wrong_type_are_refused_in_every_recipe(name):
    with pytest.raises(ConfigError, match=r"TransformerSpec has no parameter 'num_layer'; did you mean num_layers"):
        config.load([f"gin/{name}"], ["TransformerSpec.num_layer=3"])
    with pytest.raises(ConfigError, match=r"TransformerSpec\.num_layers = 'three': must be an int"):
        config.load([f"gin/{name}"], ["TransformerSpec.num_layers='three'"])


@pytest.mark.parametrize(
    ("size", "model", "total"),
    [
        ("base", "decoder_only", 281_562_240),
        ("large", "decoder_only", 570e6),
        ("xl", "decoder_only", 1.68e9),
        ("base_encoder_decoder", "encoder_decoder", 591e6),
    ],
)
def test_sizes_are_those_of_the_paper(size, model, total, tmp_path):
    loaded = load(tmp_path, f"models/{model}.gin", f"models/sizes/{size}.gin", macros={"VOCAB_SIZE": "256000"})
    counts = dict(loaded.build_macro("MODEL").count_parameters())
    assert counts.get("total", sum(counts.values())) == pytest.approx(total, rel=2e-3)


@pytest.mark.parametrize(
    ("both", "size", "shown"), [("decoder_only", "base", "281.6M (281,562,240)"), ("encoder_decoder", "base", "591")]
)
def test_explain_of_a_model_by_itself(both, size, shown, capsys):
    size += "_encoder_decoder" if both == "encoder_decoder" else ""
    files = [f"--gin_file=gin/models/{both}.gin", f"--gin_file=gin/models/sizes/{size}.gin"]
    assert main(["explain", *files, "--gin.VOCAB_SIZE=256000"]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["total"])
    assert total.split(maxsplit=1)[1].startswith(shown)


def test_gin_folder_does_not_shadow_the_package():
    assert not list(FOLDER.rglob("__init__.py"))
