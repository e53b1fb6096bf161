"""A hostile checkpoint: no text of its files or its name is executed through a gin file that `import` writes."""

import json
import pathlib
import shutil

import pytest
from diffusion_cases import FOLDER as DIFFUSION
from huggingface_cases import FOLDER as PLAIN

from diffusion_lm.cli import config as gin_files
from diffusion_lm.cli.main import main
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.huggingface import Specials, describe, find_specials, load
from diffusion_lm.interop.name_maps.t5x import _activation
from diffusion_lm.interop.run_folder import model_gin, write_run_folder

FAMILIES = {
    **{name: PLAIN / name for name in ("gpt2", "llama", "qwen3", "gemma3", "bert", "roberta", "modernbert", "t5")},
    **{name: DIFFUSION / name for name in ("llada", "dream", "sdar", "diffugpt")},
}
CODE = "4\nfrom os import path\nMASK_ID = @path.abspath('.')"
NAMES = (
    "a\nfrom os import path\nMODEL = @path.abspath('.')",
    "it's '''\"\"\"",
    "@os.system('x') %MODEL",
    "include 'other.gin' as x",
    "back\\slash\\",
    "\u2028b\rMODEL = 3",
    "not UTF-8 \udcff",
)
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id")


def _copy(source, target, **changes):
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize("value", [CODE, "</s>", True, 4.0, [CODE], [[4]], {"a": 4}, -7, 1 << 40])
@pytest.mark.parametrize("field", IDS)
def test_special_tokens_are_ids_of_the_vocabulary(field, value):
    for config, generation in (({field: value}, {}), ({}, {field: value})):
        with pytest.raises(ConfigError, match=field):
            find_specials(config, generation, 43)


def test_several_eos_ids_and_a_padding_of_minus_one():
    """LLaMA 1's files have a padding of -1, which means none."""
    found = find_specials({"eos_token_id": [7, 8], "pad_token_id": -1, "bos_token_id": None}, {}, rows=9)
    assert found == Specials(eos_ids=(7, 8))
    with pytest.raises(ConfigError, match=r"eos_token_id = \[7, 9\]"):
        find_specials({"eos_token_id": [7, 9]}, {}, rows=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_of_config_json_reaches_a_network(family, tmp_path):
    """Every key in turn holds code. The import is refused, or gives the same network and tokens as without it."""
    source = FAMILIES[family]
    plain = describe(source)
    folder = _copy(source, tmp_path / "in")
    values = json.loads((source / "config.json").read_text())
    for field in dict.fromkeys([*values, *IDS]):
        (folder / "config.json").write_text(json.dumps(values | {field: CODE}))
        try:
            found = describe(folder)
        except ConfigError:
            continue
        assert (found.spec, found.specials, found.trained) == (plain.spec, plain.specials, plain.trained), field


@pytest.fixture(scope="module")
def imported():
    return load(FAMILIES["llama"])


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_the_folder_is_text(name, tmp_path, imported):
    for file, folder in (("a.gin", name), ("b.gin", "plain")):
        (tmp_path / file).write_text(model_gin(imported, pathlib.Path(folder)), encoding="utf-8")
    read = [gin_files.load([str(tmp_path / file)], macros=["MODEL"]) for file in ("a.gin", "b.gin")]
    assert [str(b.value) for b in read[0].bindings] == [str(b.value) for b in read[1].bindings]
    assert read[0].build_macro("MODEL") == imported.architecture


def test_gin_files_of_a_folder_whose_name_is_code(tmp_path):
    """They have the same bindings as those of a folder with a plain name."""
    for name, run in ((NAMES[0] + NAMES[-1], "run"), ("plain", "other")):
        folder = _copy(FAMILIES["sdar"], tmp_path / name)
        write_run_folder(load(folder), folder, tmp_path / run)
    for file in ("objective.gin", "sampler.gin"):
        assert (tmp_path / "run" / file).read_text() == (tmp_path / "other" / file).read_text()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    macros = ["MODEL"]
    read = [gin_files.load([str(tmp_path / run / "model.gin")], macros=macros).bindings for run in ("run", "other")]
    assert [str(b.value) for b in read[0]] == [str(b.value) for b in read[1]]


@pytest.mark.parametrize(
    ("family", "field"),
    [
        *(("sdar", field) for field in ("eos_token_id", "bos_token_id", "pad_token_id", "mask_token_id", "block_size")),
        ("dream", "eos_token_id"),  # its objective.gin names EOS
    ],
)
def test_import_of_a_diffusion_model_writes_nothing_where_an_id_is_text(family, field, tmp_path, capsys):
    folder = _copy(FAMILIES[family], tmp_path / "in", **{field: CODE})
    assert main(["import", str(folder), "--workdir", str(tmp_path / "run")]) == 2
    assert field in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tokenizer_files_outside_of_the_folder_are_not_copied(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a\nb\n")
    folder = _copy(FAMILIES["llama"], tmp_path / "in")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(ConfigError, match="is a link to a file outside"):
        write_run_folder(load(folder), folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_cache_of_the_hub_is_made_of_links(tmp_path):
    cache = tmp_path / "models--a--b"
    folder = _copy(FAMILIES["llama"], cache / "snapshots" / "0123")
    (cache / "blobs").mkdir()
    (cache / "blobs" / "4567").write_text("a\nb\n")
    (folder / "vocab.txt").symlink_to("../../blobs/4567")
    write_run_folder(load(folder), folder, tmp_path / "run")
    copied = tmp_path / "run" / "tokenizer" / "vocab.txt"
    assert copied.read_text() == "a\nb\n"
    assert not copied.is_symlink()
    # Another folder called `blobs` is none of a cache.
    (tmp_path / "in").mkdir()
    shutil.copytree(cache, tmp_path / "in" / "plain", symlinks=True)
    moved = tmp_path / "in" / "plain" / "snapshots" / "0123"
    with pytest.raises(ConfigError, match="is a link to a file outside"):
        write_run_folder(load(moved), moved, tmp_path / "again")


def test_export_does_not_follow_links_out_of_a_run_folder(tmp_path, capsys):
    folder = _copy(FAMILIES["llama"], tmp_path / "in")
    write_run_folder(load(folder), folder, tmp_path / "run")
    (tmp_path / "secret").write_text("a")
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "vocab.txt").symlink_to(tmp_path / "secret")
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 2
    assert "is a link to a file outside" in capsys.readouterr().err


def test_ids_and_texts_of_a_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    from gguf_writing import write_gguf

    path = tmp_path / "a.gguf"
    for key, value in (
        ("tokenizer.ggml.eos_token_id", CODE),
        ("tokenizer.ggml.bos_token_id", 43),
        ("llama.block_count", CODE),
        ("llama.attention.head_count", 0),
        ("llama.attention.layer_norm_rms_epsilon", CODE),
        ("llama.rope.freq_base", CODE),
        ("llama.rope.scaling.type", CODE),
        ("general.architecture", CODE),
    ):
        write_gguf(FAMILIES["llama"], path, metadata={key: value})
        with pytest.raises(ConfigError) as caught:
            describe(path)
        assert "\n" not in str(caught.value), key


def test_a_gguf_file_whose_name_is_code(tmp_path):
    pytest.importorskip("gguf")
    from gguf_writing import write_gguf

    path = tmp_path / (NAMES[0] + ".gguf")
    write_gguf(FAMILIES["llama"], path)
    (tmp_path / "a.gin").write_text(model_gin(load(path), path))
    found = gin_files.load([str(tmp_path / "a.gin")], macros=["MODEL"])
    assert found.build_macro("MODEL").spec.vocab_size == 43


@pytest.mark.parametrize(
    "text", ["(@os.system('x'),)", "(['a'],)", "(1, 2)", "(" * 5000 + ")", "('gelu\nimport os', 'linear')"]
)
def test_the_gin_file_of_a_t5x_checkpoint_is_not_run(text, tmp_path):
    (tmp_path / "config.gin").write_text(f"network.T5Config.mlp_activations = {text}\n")
    with pytest.raises(ConfigError, match="mlp_activations") as caught:
        _activation(tmp_path)
    assert "\n" not in str(caught.value)
