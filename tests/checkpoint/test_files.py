"""Single files: what is written is what the safetensors package reads, and its hash."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint.disk import (
    CHUNK,
    FileRecord,
    check_file,
    read_json,
    replace_text,
    write_json,
)
from megatron_moe.checkpoint.tensor_files import TensorFiles, TensorSource, write_tensors
from megatron_moe.errors import CheckpointError, Corrupt


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    tensors = {
        "odd bytes first": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "strided": torch.randn(4, 6)[:, 1::2],
        "one of a strided": torch.randn(2)[0::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "double": torch.randn(2, dtype=torch.float64),
        "larger than a chunk": torch.randn(CHUNK // 4 + 5),
    }
    path = tmp_path / "a.safetensors"
    record = write_tensors(
        path, [TensorSource.of(*item) for item in tensors.items()], {"format": "pt"}
    )
    data = path.read_bytes()
    assert record == FileRecord(hashlib.sha256(data).hexdigest(), len(data))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)


def test_we_read_what_the_safetensors_package_writes(tmp_path):
    tensor = torch.randn(4, 3)
    save_file({"x": tensor}, tmp_path / "b.safetensors", metadata={"who": "they"})
    files = TensorFiles(tmp_path)
    assert torch.equal(files.tensor("b.safetensors", "x", "F32", (4, 3)), tensor)
    assert files.metadata("b.safetensors") == {"who": "they"}


@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (4, 3)), ("F32", (3, 4))])
def test_a_tensor_of_another_dtype_or_shape_is_rejected(tmp_path, dtype, shape):
    write_tensors(tmp_path / "a.safetensors", [TensorSource.of("x", torch.zeros(4, 3))], {})
    with pytest.raises(Corrupt, match="F32"):
        TensorFiles(tmp_path).tensor("a.safetensors", "x", dtype, shape)


def test_a_file_that_is_no_safetensors_file_is_rejected_by_name(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(Corrupt, match=r"bad\.safetensors"):
        TensorFiles(tmp_path).tensor("bad.safetensors", "x", "F32", (1,))


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    record = write_tensors(path, [TensorSource.of("x", torch.zeros(100))], {})
    good = path.read_bytes()
    assert check_file(path, record) is None
    flipped = bytearray(good)
    flipped[-7] ^= 1
    path.write_bytes(flipped)
    assert "a.safetensors has SHA-256" in (check_file(path, record) or "")
    path.write_bytes(good[:-3])
    assert f"a.safetensors has {len(good) - 3} bytes, expected {len(good)}" in (
        check_file(path, record) or ""
    )
    path.unlink()
    assert "a.safetensors is missing" in (check_file(path, record) or "")


def test_json_that_would_not_come_back_is_rejected(tmp_path):
    with pytest.raises(CheckpointError, match="JSON"):
        write_json(tmp_path / "nan.json", {"loss": float("nan")})
    with pytest.raises(CheckpointError, match="JSON"):
        write_json(tmp_path / "object.json", {"state": object()})


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100000])
def test_what_is_no_json_object_is_rejected_by_name(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text)
    with pytest.raises(Corrupt, match=r"state\.json"):
        read_json(tmp_path / "state.json")


def test_replacing_a_small_file_leaves_nothing_else(tmp_path):
    path = tmp_path / "tracker"
    replace_text(path, "1\n")
    replace_text(path, "2\n")
    assert path.read_text() == "2\n"
    assert [p.name for p in tmp_path.iterdir()] == ["tracker"]
