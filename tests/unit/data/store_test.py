import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.special import SpecialTokens
from diffusion_lm.data.grain_source import GrainSource
from diffusion_lm.data.schema import Manifest, Record
from diffusion_lm.data.store import default_root, split_folder, write_records

SPECIALS = SpecialTokens(vocab_size=50, eos_id=1, bos_id=2, mask_id=4)
MANIFEST = Manifest("t", "train", SPECIALS)


def records(count):
    return [Record([10, 11], np.arange(5, 5 + i % 7), i, "in", f"out {i}", {"answers": [str(i)]}) for i in range(count)]


def test_record_survives_its_bytes():
    record = Record([1, 2, 3], [], 2**32 - 1, "naïve\n", "", {"a": [1, None, "x"]})
    again = Record.decode(record.encode())
    assert again == record
    assert again.inputs.dtype == np.int32
    assert again.reference == {"a": [1, None, "x"]}


def test_written_records_come_back_at_random(tmp_path):
    written = records(25)
    manifest = write_records(split_folder("t", "train", tmp_path), written, MANIFEST, records_per_shard=10)
    source = GrainSource("t", "train", root=tmp_path)
    assert manifest == source.manifest
    assert (manifest.count, manifest.max_inputs_length, manifest.max_targets_length) == (25, 2, 6)
    assert manifest.target_tokens == sum(len(record.targets) for record in written)
    assert len(manifest.shards) == 3
    assert source.open().records([24, 0, 13]) == [written[24], written[0], written[13]]
    assert source.records(3) == written[:3]
    assert source.open().lengths.tolist() == [[len(r.inputs), len(r.targets), 0] for r in written]


def test_a_killed_writer_goes_on_after_its_last_complete_shard(tmp_path):
    folder = split_folder("t", "train", tmp_path)
    written = records(25)

    def dying():
        yield from written[:22]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(folder, dying(), MANIFEST, records_per_shard=10)
    assert not folder.exists()
    first = folder.with_name("train.partial") / "records-00000.array_record"
    before = os.stat(first).st_ino, os.stat(first).st_mtime_ns
    write_records(folder, written, MANIFEST, records_per_shard=10)
    after = folder / "records-00000.array_record"
    assert (os.stat(after).st_ino, os.stat(after).st_mtime_ns) == before
    assert GrainSource("t", root=tmp_path).records() == written
    assert sorted(path.name for path in folder.parent.iterdir()) == ["train", "train.lock"]


def test_shards_of_another_dataset_are_not_continued(tmp_path):
    folder = split_folder("t", "train", tmp_path)

    def dying():
        yield from records(12)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(folder, dying(), dataclasses.replace(MANIFEST, chunk_length=3), records_per_shard=5)
    other = records(30)[15:]
    write_records(folder, other, MANIFEST, records_per_shard=5)
    assert GrainSource("t", root=tmp_path).records() == other


def test_missing_dataset_says_which_command_makes_it(tmp_path):
    with pytest.raises(ConfigError, match=rf"diffusion-lm materialise --task t --split dev --root {tmp_path}"):
        GrainSource("t", "dev", root=tmp_path).open()


def test_files_that_do_not_match_the_manifest_are_refused(tmp_path):
    folder = split_folder("t", "train", tmp_path)
    write_records(folder, records(5), MANIFEST)
    np.save(folder / "lengths.npy", np.zeros((4, 2), np.int32))
    with pytest.raises(ConfigError, match="files do not match the manifest of 5 records"):
        GrainSource("t", root=tmp_path).open()


def test_finished_folder_is_not_overwritten(tmp_path):
    folder = split_folder("t", "train", tmp_path)
    write_records(folder, records(5), MANIFEST)
    with pytest.raises(ConfigError, match="already contains a dataset"):
        write_records(folder, records(6), MANIFEST)


def test_T35_mask_id_in_the_data_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="record 1 of t/train contains the MASK token 4"):
        write_records(tmp_path / "d", [Record([5], [6], 0), Record([5], [7, 4], 1)], MANIFEST)
    with pytest.raises(ConfigError, match="outside the vocabulary of 50"):
        write_records(tmp_path / "d", [Record([5], [50], 0)], MANIFEST)


def test_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_LM_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "data"
    assert GrainSource("a", "b").folder == tmp_path / "data" / "a" / "b"
    monkeypatch.delenv("DIFFUSION_LM_CACHE")
    assert default_root().parts[-3:] == (".cache", "diffusion_lm", "data")


def test_reading_loads_neither_tensorflow_nor_seqio(tmp_path):
    write_records(split_folder("t", "train", tmp_path), records(5), MANIFEST)
    program = f"""
import sys
from diffusion_lm.data import converters, iterator, materialise, vocabulary
from diffusion_lm.data.grain_source import GrainSource
pipeline = iterator.DataPipeline(GrainSource("t", root={str(tmp_path)!r}), converters.SingleStreamConverter(4, 8))
assert pipeline.batch(0, 2).tokens.shape == (2, 13)
assert not {{"tensorflow", "seqio"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
