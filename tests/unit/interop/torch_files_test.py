"""Pickled weights are read without torch; names that tensors do not need are refused."""

import collections
import os
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from huggingface_cases import FOLDER

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.interop.torch_files import TorchFile

TABLE = np.arange(24, dtype=np.float32).reshape(4, 6)


def test_tensors_of_all_dtypes_and_strides():
    file = TorchFile(FOLDER / "weights.bin")
    expected = {
        "table": TABLE,
        "columns": TABLE.T[1:3],
        "half": TABLE[1:, ::2].astype(np.float16),
        "bfloat16": TABLE.astype(ml_dtypes.bfloat16),
        "parameter": TABLE[0],
        "empty": np.zeros((0, 3), np.float32),
        "number": np.asarray(7, np.int64),
    }
    assert file.names() == list(expected)
    for name, value in expected.items():
        assert file.shape(name) == value.shape
        assert file.dtype(name) == value.dtype
        if value.ndim:
            np.testing.assert_array_equal(file.read(name), value)
    np.testing.assert_array_equal(file.read("columns", slice(1, 2)), TABLE.T[2:3])


def _with_pickle(path, data: bytes):
    """A copy of the fixture with another pickle."""
    with zipfile.ZipFile(FOLDER / "weights.bin") as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("data.pkl") else old.read(entry.filename))
    return path


class _Attack:
    def __reduce__(self):
        return os.system, ("echo owned > owned",)


class _Lookup:
    def __reduce__(self):
        return getattr, (collections.OrderedDict, "__init__")


@pytest.mark.parametrize(("content", "named"), [(_Attack(), "system"), (_Lookup(), "getattr")])
def test_code_is_refused_by_name_and_not_run(content, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _with_pickle(tmp_path / "bad.bin", pickle.dumps({"weight": content}, protocol=2))
    with pytest.raises(ConfigError, match=rf"bad\.bin refers to .*{named}"):
        TorchFile(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [([1, 2], "a list instead of a dict"), ({"step": 3}, "'step' is a int instead of a tensor")],
)
def test_other_contents_are_refused(content, complaint, tmp_path):
    with pytest.raises(ConfigError, match=complaint):
        TorchFile(_with_pickle(tmp_path / "bad.bin", pickle.dumps(content, protocol=2)))


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    whole = (FOLDER / "weights.bin").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "short.bin").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"cannot read short\.bin"):
            TorchFile(tmp_path / "short.bin")


def test_a_tensor_past_the_end_of_its_storage_is_refused(tmp_path):
    with zipfile.ZipFile(FOLDER / "weights.bin") as old:
        root = old.namelist()[0].split("/")[0]
        data = old.read(f"{root}/data.pkl")
    # The first tensor has 4 rows and its storage 24 numbers; more rows would read what lies behind it.
    assert data.count(b"K\x04K\x06") >= 1
    path = _with_pickle(tmp_path / "long.bin", data.replace(b"K\x04K\x06", b"K\x44K\x06", 1))
    file = TorchFile(path)
    with pytest.raises(ConfigError, match="'table' extends past the end"):
        file.read("table")


def test_a_missing_storage_is_refused(tmp_path):
    shutil.copy(FOLDER / "weights.bin", tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as old, zipfile.ZipFile(tmp_path / "part.bin", "w") as new:
        for entry in old.infolist():
            if "/data/" not in entry.filename:
                new.writestr(entry.filename, old.read(entry.filename))
    with pytest.raises(ConfigError, match="storage 0 is missing"):
        TorchFile(tmp_path / "part.bin").read("table")
