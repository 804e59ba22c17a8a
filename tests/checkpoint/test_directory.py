"""Trackers, revisions, manifests: what counts as a checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from megatron_moe.checkpoint import (
    has_checkpoint,
    latest_step,
    load_logical,
    read_config,
    verify,
)
from megatron_moe.checkpoint.directory import (
    MANIFEST,
    TRACKER,
    prune,
    read_manifest,
    remove,
    revisions,
    step_directory,
)
from megatron_moe.errors import CheckpointError, Corrupt, NoCheckpoint
from tests.checkpoint import toy


@pytest.fixture
def saved(tmp_path):
    toy.save(tmp_path, 10)
    toy.save(tmp_path, 20)
    return tmp_path


def test_the_tracker_names_the_step_to_resume_from(saved):
    assert latest_step(saved) == 20
    (saved / TRACKER).write_text("10\n")  # a user goes back
    assert latest_step(saved) == 10
    assert step_directory(saved)[1].name == "iter_0000010"
    assert step_directory(saved, 20) == (20, saved / "iter_0000020")


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "''"), ("\n", "''"), ("ten", "'ten'"), ("-10", "'-10'"), ("30", "'30'"), ("٣", "'٣'")],
)
def test_a_broken_tracker_is_an_error_that_lists_the_steps(saved, text, found):
    (saved / TRACKER).write_text(text)
    with pytest.raises(CheckpointError) as error:
        latest_step(saved)
    assert TRACKER in str(error.value) and found in str(error.value)
    assert "--ckpt-step: 10, 20" in str(error.value)


def test_a_tracker_whose_step_was_deleted_is_an_error(saved):
    shutil.rmtree(saved / "iter_0000020")
    with pytest.raises(
        CheckpointError, match=r"a complete step of this directory \(got '20'\).*--ckpt-step: 10$"
    ):
        latest_step(saved)


def test_a_missing_tracker_beside_checkpoints_is_an_error(saved):
    (saved / TRACKER).unlink()
    assert has_checkpoint(saved)
    with pytest.raises(CheckpointError, match="'missing'"):
        latest_step(saved)


def test_nothing_saved_is_an_error_without_the_flags_of_one_command(tmp_path):
    for path, found in ((tmp_path, "an empty directory"), (tmp_path / "absent", "missing")):
        assert not has_checkpoint(path)
        with pytest.raises(NoCheckpoint, match=f"{found}'[)]$"):
            latest_step(path)


def test_an_empty_tracker_alone_is_not_an_empty_directory(tmp_path):
    (tmp_path / TRACKER).write_text("")
    assert has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is none"):
        latest_step(tmp_path)


def test_a_second_save_of_a_step_replaces_the_first(saved):
    toy.save(saved, 20)
    assert revisions(saved) == {10: [saved / "iter_0000010"], 20: [saved / "iter_0000020-1"]}
    toy.save(saved, 20)
    assert revisions(saved)[20] == [saved / "iter_0000020-2"]
    assert latest_step(saved) == 20


def test_the_highest_revision_counts_if_a_kill_left_two(saved):
    for revision in (2, 10):
        shutil.copytree(saved / "iter_0000020", saved / f"iter_0000020-{revision}")
    assert step_directory(saved)[1].name == "iter_0000020-10"


def test_temporary_directories_of_killed_saves_never_count_and_are_removed(saved):
    shutil.copytree(saved / "iter_0000010", saved / ".saving-iter_0000030-abcd")
    shutil.copytree(saved / "iter_0000010", saved / ".removing-iter_0000030-abcd")
    assert list(revisions(saved)) == [10, 20]
    toy.save(saved, 40)
    assert not [p for p in saved.iterdir() if p.name.startswith(".")]


def test_removal_leaves_nothing(saved):
    remove(saved / "iter_0000010")
    assert sorted(p.name for p in saved.iterdir()) == ["iter_0000020", TRACKER]


def _rewrite(path, change):
    """Change a manifest and make its digest right again, as an attacker would."""
    content = json.loads((path / MANIFEST).read_text())
    change(content)
    del content["digest"]
    text = json.dumps(content, sort_keys=True)
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "x\n"])
def test_a_manifest_that_leaves_the_checkpoint_is_rejected(saved, name):
    path = saved / "iter_0000020"
    _rewrite(path, lambda c: c["files"].update({name: {"sha256": "0", "bytes": 1}}))
    with pytest.raises(Corrupt, match="a name inside the checkpoint"):
        read_manifest(path)


def test_a_link_that_leaves_the_checkpoint_is_rejected(saved):
    path = saved / "iter_0000020"
    (path / "rank-00000.safetensors").unlink()
    (path / "rank-00000.safetensors").symlink_to(saved / "iter_0000010/rank-00000.safetensors")
    with pytest.raises(Corrupt, match="a name inside the checkpoint"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), r"version in .* must be 1 \(got 2\)"),
        (lambda c: c.update(format="other"), r"format in .* \(got 'other'\)"),
        (lambda c: c.update(files=[]), "an object of files"),
        (lambda c: c["files"].update({"x": {"bytes": 1}}), "sha256 and bytes"),
    ],
)
def test_a_manifest_of_another_kind_is_rejected(saved, change, message):
    _rewrite(saved / "iter_0000020", change)
    with pytest.raises(Corrupt, match=message):
        read_manifest(saved / "iter_0000020")


def test_a_flipped_digit_in_the_manifest_is_noticed(saved):
    path = saved / "iter_0000020" / MANIFEST
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))
    with pytest.raises(Corrupt, match="digest"):
        read_manifest(path.parent)


@pytest.mark.parametrize("how", ["renamed", "copied", "linked"])
def test_a_directory_of_another_step_is_an_error_that_names_both(saved, how):
    path, other = saved / "iter_0000010", saved / "iter_0000030"
    if how == "renamed":
        path.rename(other)
    elif how == "copied":
        shutil.copytree(path, other)
    else:
        other.symlink_to(path)
    (saved / TRACKER).write_text("30\n")
    for read in (verify, read_config, lambda d: dict(load_logical(d))):
        with pytest.raises(Corrupt) as error:
            read(saved)
        assert str(error.value).startswith(
            f"step in {other / MANIFEST} must be 30, as the directory's name says (got 10);"
            " it was saved as iter_0000010 and renamed or copied; give it that name again"
        )
    if how != "renamed":
        verify(saved, 10)


def test_a_revision_has_the_step_of_its_name(saved):
    (saved / "iter_0000010").rename(saved / "iter_0000020-1")
    with pytest.raises(Corrupt, match=r"must be 20, as the directory's name says \(got 10\)"):
        verify(saved)


def _steps(directory):
    return list(revisions(directory))


@pytest.mark.parametrize(
    ("step", "last", "every", "left"),
    [
        (50, 2, None, [40, 50]),
        (50, 1, None, [50]),
        (50, 9, None, [10, 20, 30, 40, 50]),
        (50, 1, 20, [20, 40, 50]),
        (30, 1, None, [30, 40, 50]),  # a run that went back leaves what was ahead of it
    ],
)
def test_old_steps_are_removed(tmp_path, step, last, every, left):
    for number in (10, 20, 30, 40, 50):
        toy.save(tmp_path, number)
    gone = prune(tmp_path, step, last, every)
    assert _steps(tmp_path) == left
    assert sorted(gone + left) == [10, 20, 30, 40, 50]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert latest_step(tmp_path) == 50
