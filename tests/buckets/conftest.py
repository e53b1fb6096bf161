"""The bucket `gs://bucket`, in memory."""

import importlib
import pathlib
import sys
import types

import fsspec
import pytest
from etils.epath import backend, gpath

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / "unit" / floor) for floor in ("training", "cli", "recipes"))]

fake_bucket = importlib.import_module("fake_bucket")


@pytest.fixture(scope="session")
def server():
    return fake_bucket.Server()


@pytest.fixture
def bucket(server, monkeypatch):
    """Its objects by name, and `uploads`, the names as they were written."""
    fake_bucket.OBJECTS.clear()
    fake_bucket.UPLOADS.clear()
    monkeypatch.setenv("EPATH_USE_TF", "false")  # TensorFlow brings its own way to buckets, which cannot be redirected
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anybody")
    storage = types.ModuleType("google.cloud.storage")  # Orbax asks it whether the bucket has folders of its own
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    fsspec.register_implementation("gcs", fake_bucket.FileSystem, clobber=True)
    for cached in (backend.fsspec_backend._get_filesystem, gpath._is_tf_installed):
        cached.cache_clear()
    yield fake_bucket
    gpath._is_tf_installed.cache_clear()
