"""Files that would run code or lead out of their directory: refused, and nothing has run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.errors import UsageError
from tests.convert.cases import CONFIG, model_of


def payload(flag: Path) -> bytes:
    """A pickle, written by hand, that makes a file when it is loaded."""
    return b"cposix\nsystem\n(S'touch " + str(flag).encode() + b"'\ntR."


def test_the_payload_would_run(tmp_path: Path) -> None:
    import pickle

    pickle.loads(payload(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", ["plain", "in torch's archive"])
def test_in_pytorch_s_files(tmp_path: Path, protocol: str) -> None:
    write(model_of(), ConversionTarget(format="hf", path=tmp_path / "hf"), lambda _: None)
    (tmp_path / "hf/model.safetensors").unlink()
    file, data = tmp_path / "hf/pytorch_model.bin", payload(tmp_path / "ran")
    if protocol == "plain":
        file.write_bytes(data)
    else:
        import zipfile

        torch.save({"model.norm.weight": torch.ones(16)}, file)
        with zipfile.ZipFile(file) as good:
            members = {name: good.read(name) for name in good.namelist()}
        with zipfile.ZipFile(file, "w") as bad:
            for name, content in members.items():
                bad.writestr(name, data if name.endswith("data.pkl") else content)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin"):
        read("hf", tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


def _zarray(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "target.decoder.decoder_norm.scale/.zarray"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _leaf(leaf: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "checkpoint"
        tree = msgpack.unpackb(file.read_bytes(), raw=False)
        tree["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"] = leaf(directory)
        file.write_bytes(msgpack.packb(tree))

    return change


def _objects(directory: Path) -> Any:
    return msgpack.ExtType(1, msgpack.packb(([1], "O", payload(directory.parent / "ran"))))


def read_all(directory: Path) -> None:
    for tensor in read("t5x", directory, config=CONFIG).tensors.values():
        tensor.digest()


@pytest.mark.parametrize(
    "change",
    [
        _zarray(dtype="|O"),
        _zarray(dtype="|O", filters=[{"id": "pickle", "protocol": 5}]),
        _zarray(compressor={"id": "pickle"}),
        _leaf(_objects),
        _leaf(lambda d: msgpack.ExtType(4, payload(d.parent / "ran"))),
    ],
    ids=["objects", "pickle filter", "pickle compressor", "object array", "extension"],
)
def test_in_t5x_files(tmp_path: Path, change: Callable[[Path], None]) -> None:
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), lambda _: None)
    folder = tmp_path / "t5x/target.decoder.decoder_norm.scale"
    (folder / "0").write_bytes(payload(tmp_path / "ran"))
    change(tmp_path / "t5x")
    with pytest.raises(UsageError):
        read_all(tmp_path / "t5x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["../outside/", "/", "sub/../../"])
def test_an_index_that_leads_out_of_the_directory(tmp_path: Path, place: str) -> None:
    target = ConversionTarget(format="hf", path=tmp_path / "hf", max_shard=20_000)
    write(model_of(), target, lambda _: None)
    (tmp_path / "outside").mkdir()
    index = tmp_path / "hf/model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = sorted(set(values["weight_map"].values()))[0]
    shutil.move(tmp_path / "hf" / name, tmp_path / "outside" / name)
    wrong = f"{tmp_path}/outside/{name}" if place == "/" else f"{place}{name}"
    values["weight_map"] = {k: wrong if v == name else v for k, v in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"file name in .* must be a file of the same directory"):
        read("hf", tmp_path / "hf")
