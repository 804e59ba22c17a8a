"""What files are by their first bytes."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest

from megatron_moe.files import describe_file_start, first_bytes, is_lfs_pointer

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
