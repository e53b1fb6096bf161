"""TFDS builders for two public data sets that TFDS lacks; they download on first use."""

import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

_MBPP_URL = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl"
_MBPP_SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
_CODE_URL = "https://huggingface.co/datasets/code-search-net/code_search_net/resolve/main/data/python.zip"

# The paper (arXiv 2108.07732, section 2.1): 1-10 prompts, 11-510 test, 511-600 validation, 601-974 fine-tuning.
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}


class Mbpp(tfds.core.GeneratorBasedBuilder):
    """Mostly Basic Python Problems, google-research/mbpp (CC BY 4.0)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        features = dict.fromkeys(("text", "code", "test_setup_code"), text)
        features |= dict.fromkeys(("test_list", "challenge_test_list"), texts)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="https://github.com/google-research/google-research/tree/master/mbpp",
            features=tfds.features.FeaturesDict({**features, "task_id": tfds.features.Scalar(np.int32)}),
        )

    def _split_generators(self, dl_manager):
        content = epath.Path(dl_manager.download(_MBPP_URL)).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != _MBPP_SHA256:
            raise ValueError(f"mbpp.jsonl: SHA-256 {found}, expected {_MBPP_SHA256}: the published file has changed.")
        rows = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
        return {
            split: self._generate_examples([row for row in rows if first <= row["task_id"] <= last])
            for split, (first, last) in MBPP_SPLITS.items()
        }

    def _generate_examples(self, rows):
        for row in rows:
            yield row["task_id"], {name: row[name] for name in self.info.features}


class CodeSearchNetPython(tfds.core.GeneratorBasedBuilder):
    """Python functions of CodeSearchNet (arXiv 1909.09436): permissively licensed repositories, split by repository."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="https://github.com/github/CodeSearchNet",
            features=tfds.features.FeaturesDict(dict.fromkeys(("text", "repository", "path"), text)),
        )

    def _split_generators(self, dl_manager):
        archive = dl_manager.download(_CODE_URL)
        names = {"train": "train", "validation": "valid", "test": "test"}
        return {split: self._generate_examples(archive, name) for split, name in names.items()}

    def _generate_examples(self, archive, folder) -> Iterator[tuple[str, dict[str, str]]]:
        with epath.Path(archive).open("rb") as file, zipfile.ZipFile(io.BytesIO(file.read())) as content:
            members = sorted(n for n in content.namelist() if f"/{folder}/" in n and n.endswith(".jsonl.gz"))
            for member in members:
                lines = gzip.decompress(content.read(member)).decode().splitlines()
                for number, row in enumerate(map(json.loads, lines)):
                    # The older archive calls the source `original_string`, the newer one `whole_func_string`.
                    source = row.get("original_string") or row["whole_func_string"]
                    repository = row.get("repo") or row["repository_name"]
                    path = row.get("path") or row["func_path_in_repository"]
                    yield f"{member}/{number}", {"text": source, "repository": repository, "path": path}
