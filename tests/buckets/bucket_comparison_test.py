"""A comparison in a bucket, report included, has the results of one on a disk."""

import json

import pytest
from comparison_test import comparison, root, undisturbed  # noqa: F401 (fixtures)

from diffusion_lm.recipes.compare import compare

pytestmark = pytest.mark.thorough


def test_a_comparison_in_a_bucket_is_that_of_a_folder(comparison, undisturbed, bucket):  # noqa: F811
    found = compare(comparison, "gs://bucket/tiny", log=lambda line: None)
    assert json.loads(bucket.OBJECTS["bucket/tiny/results.json"][0]) == json.loads(
        (undisturbed / "results.json").read_text()
    )
    assert str(found.report) == "gs://bucket/tiny/report/index.html"
    assert b"<html" in bucket.OBJECTS["bucket/tiny/report/index.html"][0]
    assert bucket.OBJECTS["bucket/tiny/results.md"][0] == (undisturbed / "results.md").read_bytes()
    uploads = len(bucket.UPLOADS)
    compare(comparison, "gs://bucket/tiny", log=lambda line: None)
    assert not [name for name in bucket.UPLOADS[uploads:] if "checkpoints" in name], "nothing is trained again"
