"""Index and zip files of `torch_dist` checkpoints that are damaged or made to harm: one line."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe.convert.torch_dist import StoredTensor, open_tensors, read_saved, read_tensor
from megatron_moe.errors import Corrupt

Place = tuple[tuple[int, ...], tuple[int, ...]]


def index_of(folder: Path, shape: tuple[int, ...], chunks: list[Place]) -> StoredTensor:
    """A tensor whose `.metadata` PyTorch's own classes write, with chunks [offsets, sizes]."""
    (folder / "data.distcp").write_bytes(bytes(100))
    parts = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in chunks]
    properties = TensorProperties(torch.float32)
    entry = TensorStorageMetadata(properties, torch.Size(shape), parts)
    storage = {MetadataIndex("x", o): _StorageInfo("data.distcp", 0, 100) for o, _ in chunks}
    metadata = Metadata({"x": entry}, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return open_tensors(folder)["x"]


@pytest.mark.parametrize(
    ("shape", "chunks", "said"),
    [
        ((8,), [((0,), (4,)), ((0,), (4,))], r"overlap, \[0:4\] and \[0:4\]"),
        ((8,), [((0,), (4,)), ((2,), (4,))], r"overlap, \[0:4\] and \[2:6\]"),
        ((4, 4), [((0, 0), (4, 2)), ((0, 2), (2, 2)), ((1, 2), (2, 2))], "overlap"),
        ((8,), [((0,), (4,)), ((6,), (4,))], r"with a chunk \[6:10\]"),
        ((8,), [((0,), (4,))], "with 4 of 8 elements"),
        ((8,), [((0, 0), (4, 2))], "with a chunk"),
        ((8,), [((0,), (2, 4))], "with a chunk"),
        ((), [((), ()), ((), ())], "with 2 of 1 elements"),
        ((2**40, 2**40), [((0, 0), (2**40, 2**40))], "of the shape"),
    ],
)
def test_chunks_cover_every_element_once(
    tmp_path: Path, shape: tuple[int, ...], chunks: list[Place], said: str
) -> None:
    with pytest.raises(Corrupt, match=said):
        index_of(tmp_path, shape, chunks)


def test_chunks_that_are_no_grid_and_thousands_of_them_are_accepted(tmp_path: Path) -> None:
    uneven: list[Place] = [((0, 0), (4, 2)), ((0, 2), (1, 2)), ((1, 2), (3, 2)), ((2, 0), (0, 2))]
    assert len(index_of(tmp_path, (4, 4), uneven).chunks) == 4
    grid = [((64 * i, 2 * j), (64, 2)) for i in range(64) for j in range(64)]
    assert len(index_of(tmp_path, (4096, 128), grid).chunks) == 4096


def test_an_index_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".metadata").mkdir()
    with pytest.raises(Corrupt, match=r"must be a readable file \(got .*Is a directory"):
        open_tensors(tmp_path)


def saved(folder: Path) -> Path:
    torch.save(torch.arange(12.0), folder / "x.pt")
    return folder / "x.pt"


def compressed(file: Path) -> None:
    """`data.pkl` that is larger than its file."""
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x/data.pkl", "w") as record,
    ):
        for _ in range(8):
            record.write(bytes(1 << 20))


def changed(file: Path, offset: int, value: bytes) -> None:
    """Write into the entries of the central directory and the local headers of all records."""
    data = bytearray(file.read_bytes())
    for signature, more in ((b"PK\x01\x02", 2), (b"PK\x03\x04", 0)):
        place = data.find(signature)
        while place >= 0:
            data[place + offset + more : place + offset + more + len(value)] = value
            place = data.find(signature, place + 4)
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "an empty zip": lambda file: zipfile.ZipFile(file, "w").close(),
    "an unknown compression": lambda file: changed(file, 8, b"\x63\x00"),
    "deflate that is none": lambda file: changed(file, 8, b"\x08\x00"),
    "encryption": lambda file: changed(file, 6, b"\x01\x00"),
    "compressed": compressed,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_zip_files_are_one_line(case: str, tmp_path: Path) -> None:
    file = saved(tmp_path)
    DAMAGE[case](file)
    with pytest.raises(Corrupt) as error:
        read_saved(file)
    assert "\n" not in str(error.value)
    with pytest.raises(Corrupt, match=r"^x must be a tensor of torch.save \(got ") as error:
        read_tensor(file, 0, file.stat().st_size, "x", True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stream", [b"ctorch._utils\n_rebuild_tensor_v2\n)R.", b"N."])
def test_a_tensor_of_another_form_is_one_line(stream: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a/data.pkl", stream)
    with pytest.raises(Corrupt, match=r"must be a tensor of torch\.save"):
        read_tensor(tmp_path / "x", 0, (tmp_path / "x").stat().st_size, "x", True)


def test_numbers_that_are_no_whole_elements_are_one_line(tmp_path: Path) -> None:
    file = saved(tmp_path)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content + b"\x00" if name.endswith("data/0") else content)
    with pytest.raises(Corrupt, match=r"must be a tensor of torch.save \(got '?\"?self.size"):
        read_tensor(file, 0, file.stat().st_size, "x", True)
