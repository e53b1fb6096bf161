"""Compares logits of encoder-decoders with `transformers`, imported and exported; `make test-interop` runs it."""

import numpy as np
import pytest
import t5_cases as cases
from huggingface_cases import TOLERANCE, difference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from diffusion_lm.interop.huggingface import load, save  # noqa: E402
from diffusion_lm.nn.embeddings import relative_buckets  # noqa: E402

ALL = [*cases.GOLDEN, *cases.LIVE]


@pytest.mark.parametrize("name", ALL)
def test_logits_are_equal_and_transformers_loads_the_export(name, tmp_path):
    model, arrays = cases.build(name), cases.inputs()
    model.save_pretrained(tmp_path / "in")
    imported = load(tmp_path / "in")
    theirs = cases.reference(model, arrays)
    assert difference(cases.our_logits(imported, arrays), theirs, arrays["target_mask"]) < TOLERANCE
    assert np.abs(theirs).max() > 1

    save(tmp_path / "out", imported.architecture, imported.params, family=model.config.model_type)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    after = dict(again.named_parameters())
    assert set(after) == {path for path, _ in model.named_parameters()}
    for path, weight in model.named_parameters():
        assert torch.equal(weight, after[path]), path
    assert difference(cases.reference(again.eval(), arrays), theirs, arrays["target_mask"]) == 0
    # What transformers makes of our files is read as the same network again.
    again.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").architecture == imported.architecture


@pytest.mark.parametrize("name", ALL)
def test_export_finds_the_family(name, tmp_path):
    cases.build(name).save_pretrained(tmp_path / "in")
    imported = load(tmp_path / "in")
    kind = "umt5" if name.startswith("umt5") else "t5"
    assert save(tmp_path / "out", imported.architecture, imported.params) == kind
    assert load(tmp_path / "out").architecture.spec == imported.architecture.spec


def test_bins_hold_every_copy(tmp_path):
    """torch.save writes tied tables under all of their names."""
    for name in cases.GOLDEN:
        model = cases.build(name)
        (tmp_path / name).mkdir()
        if name == "umt5":  # whose own head, which is refused, cannot be told from a copy by its name
            continue
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        model.config.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}_safe")
        from_bin, from_safe = load(tmp_path / name), load(tmp_path / f"{name}_safe")
        assert "decoder.embed_tokens.weight" in from_bin.report.ignored
        assert from_bin.architecture == from_safe.architecture
        table = from_bin.params["embed"]["tokens"]
        np.testing.assert_array_equal(table, from_safe.params["embed"]["tokens"])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 10), (64, 256)])
def test_buckets_are_those_of_transformers(bidirectional, buckets, max_distance):
    """Also at distances whose logarithm is on the border of two buckets."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-1100, 1101)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional, buckets, max_distance)
    ours = relative_buckets(distance, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())
