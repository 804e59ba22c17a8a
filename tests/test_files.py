"""What files are by their first bytes."""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path

import pytest

from megatron_moe.files import (
    describe_file_start,
    first_bytes,
    is_file_name,
    is_lfs_pointer,
    open_regular,
    read_small,
)

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 4309802\n"


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(POINTER)
    assert is_lfs_pointer(first_bytes(path))
    assert "Git LFS pointer" in describe_file_start(path)
    assert "git lfs pull" in describe_file_start(path)


def test_a_text_about_git_lfs_is_no_pointer(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("The first line is: " + POINTER)
    assert not is_lfs_pointer(first_bytes(path))
    assert describe_file_start(path) == "it begins with b'The first line is: versi'"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (gzip.compress(b"abc", mtime=0), "it is compressed with gzip"),
        (b"IQ== 0\nIg== 1\n", "it is a vocabulary of tiktoken"),
        (b"<!DOCTYPE html>\n<html>", "it is an HTML page"),
        (b"\x80\x02}q\x00.", "it is a pickle"),
        (b"\x00\x01", "it begins with b'\\x00\\x01'"),
    ],
)
def test_files_by_their_beginning(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert describe_file_start(path) == what


def test_a_zip_archive_and_a_missing_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.bin", "w") as archive:
        archive.writestr("data.pkl", "")
    assert "zip archive" in describe_file_start(tmp_path / "weights.bin")
    missing = describe_file_start(tmp_path / "none")
    assert missing == "it cannot be read: No such file or directory"


def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_small, first_bytes, open_regular):
        with pytest.raises(OSError, match="it is a named pipe, not a regular file"):
            read(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a device"):
        read_small("/dev/zero")
    with pytest.raises(OSError, match="Is a directory"):
        read_small(tmp_path)


def test_what_a_shell_passes_may_be_a_pipe() -> None:
    reads, writes = os.pipe()
    os.write(writes, b"text")
    os.close(writes)
    assert read_small(f"/dev/fd/{reads}") == b"text"
    os.close(reads)


@pytest.mark.parametrize("name", ["a\0b", "\ud83d"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(OSError, match="no file has such a name"):
        open_regular(name)


def test_a_file_that_is_too_large_for_memory(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(11))
    assert read_small(tmp_path / "x", 11) == bytes(11)
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_small(tmp_path / "x", 10)


def test_names_in_a_directory() -> None:
    good = ["a", ".zarray", "model-00001.safetensors", "schön", "x" * 255, "caf\udce9"]
    bad = ["", ".", "..", "a/b", "/a", "a\0b", "\ud83d", "x" * 256, "ö" * 128, None, 3]
    assert [name for name in [*good, *bad] if is_file_name(name)] == good
