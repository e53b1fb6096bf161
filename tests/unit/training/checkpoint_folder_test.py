"""What is in `checkpoints/` besides checkpoints: cut-off saves are removed, everything else belongs to the user."""

import pytest
from training_stubs import AUTOREGRESSIVE, small_run

from diffusion_lm.core.errors import ConfigError
from diffusion_lm.training.checkpoint import FOLDER, Checkpointer, CheckpointPolicy, finished_steps
from diffusion_lm.training.loop import train

OF_THE_USER = ("2024.notes", "3.backup", "3.keep", "12.orbax-checkpoint-tmp-mine", "12.orbax-checkpoint-tmp.zip", "old")
OF_ORBAX = ("4.orbax-checkpoint-tmp", "14.orbax-checkpoint-tmp-1700000000")


def opened(workdir):
    with Checkpointer(workdir, CheckpointPolicy()) as checkpoints:
        return checkpoints.latest_step


def test_starting_a_run_keeps_the_folders_of_the_user_and_removes_cut_off_saves(tmp_path):
    folder = tmp_path / FOLDER
    for name in (*OF_THE_USER, *OF_ORBAX):
        (folder / name).mkdir(parents=True)
        (folder / name / "thesis.txt").write_text("the only copy")
    train(small_run(objective=AUTOREGRESSIVE, steps=1), tmp_path)
    assert {entry.name for entry in folder.iterdir()} == {*OF_THE_USER, "1"}
    assert all((folder / name / "thesis.txt").read_text() == "the only copy" for name in OF_THE_USER)


@pytest.mark.parametrize("name", ["2024", "7"])
@pytest.mark.parametrize("content", [(), ("thesis.txt",), ("params", "thesis.txt")])
def test_a_numbered_folder_that_no_save_wrote_is_refused_and_not_removed(tmp_path, name, content):
    folder = tmp_path / FOLDER / name
    folder.mkdir(parents=True)
    for item in content:
        (folder / item).write_text("the only copy")
    with pytest.raises(ConfigError, match=rf"{FOLDER}/{name} has the name of a checkpoint.*Move it"):
        opened(tmp_path)
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(content)


def test_a_numbered_folder_with_a_part_of_a_save_is_removed(tmp_path):
    """In a bucket, a save that was cut off has the name of its step."""
    for item in ("params.orbax-checkpoint-tmp-17", "meta"):
        (tmp_path / FOLDER / "7" / item).mkdir(parents=True)
    assert opened(tmp_path) is None
    assert not (tmp_path / FOLDER / "7").exists()


def test_a_link_is_never_followed_and_never_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("the only copy")
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "14.orbax-checkpoint-tmp").symlink_to(tmp_path / "elsewhere")
    assert opened(tmp_path) is None
    assert (tmp_path / FOLDER / "14.orbax-checkpoint-tmp" / "thesis.txt").exists()


def test_digits_of_other_scripts_are_no_steps(tmp_path):
    (tmp_path / FOLDER / "²").mkdir(parents=True)
    (tmp_path / FOLDER / "²" / "commit_success.txt").write_text("")
    assert finished_steps(tmp_path) == []
