"""t5x directories as people have them: copied from buckets, incomplete, damaged, of other kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from megatron_moe.convert import t5x_arrays
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.model import of_tensor
from megatron_moe.convert.t5x_arrays import check_chunks
from megatron_moe.errors import UsageError
from tests.convert.cases import CONFIG, model_of
from tests.convert.test_formats import Silent, same
from tools.convert_checkpoint import main

GATE = "target.decoder.layers_1.mlp.expert.wi_0.kernel"


@pytest.fixture
def t5x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with several chunks for each array."""
    monkeypatch.setattr(t5x_arrays, "CHUNK_BYTES", 2000)
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    CONFIG.save(tmp_path / "config.json")
    return tmp_path / "t5x"


def edit(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the spec of every array."""
    tree = msgpack.unpackb((directory / "checkpoint").read_bytes(), raw=False)

    def walk(node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and "kvstore" in value:
                node[key] = change(value)
            elif isinstance(value, dict):
                walk(value)

    walk(tree["optimizer"]["target"])
    (directory / "checkpoint").write_bytes(msgpack.packb(tree))


def path_of(spec: dict[str, Any]) -> str:
    return str(spec["kvstore"]["path"])


STORES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "file": lambda spec: spec,
    "gfile": lambda spec: spec | {"kvstore": {"driver": "gfile", "path": path_of(spec)[:-1]}},
    # Before TensorStore 0.1.14 the path stood outside of the store.
    "old": lambda spec: spec | {"kvstore": {"driver": "file"}, "path": path_of(spec)},
    "bucket": lambda spec: (
        spec
        | {
            "kvstore": {
                "driver": "gcs",
                "bucket": "b",
                "path": f"runs/checkpoint_4/{path_of(spec)}",
            }
        }
    ),
}


@pytest.mark.parametrize("store", STORES)
def test_a_copy_of_any_store_is_read(t5x: Path, store: str) -> None:
    edit(t5x, STORES[store])
    same(read("t5x", t5x, config=CONFIG), model_of())


def test_paths_with_dots_are_read_and_written(t5x: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorStore itself rejects them."""
    (t5x.parent / "below").mkdir()
    monkeypatch.chdir(t5x.parent / "below")
    found = read("t5x", Path("../t5x"), config=CONFIG)
    write(found, ConversionTarget(format="t5x", path=Path("../below/../again")), Silent)
    same(read("t5x", t5x.parent / "again", config=CONFIG), model_of())


def convert(directory: Path, *flags: str) -> list[str]:
    words = f"--from t5x --load {directory} --to native --save {directory.parent}/out"
    return [*words.split(), "--config", f"{directory.parent}/config.json", *flags]


def error_of(directory: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The only line, of a command that leaves nothing behind."""
    capsys.readouterr()
    assert main(convert(directory, *flags)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if not line.startswith("\r") and "converting" not in line]
    assert len(lines) == 1, said
    out = directory.parent / "out"
    assert not out.exists() or not list(out.iterdir())
    return lines[0].removeprefix("convert_checkpoint.py: error: ")


@pytest.mark.parametrize("flag", ["--dry-run", "--verify"])
def test_a_chunk_that_was_not_copied_is_missed(
    t5x: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = sorted(file for file in (t5x / GATE).iterdir() if file.name != ".zarray")
    assert len(chunks) > 3
    chunks[2].unlink()
    error = error_of(t5x, capsys, flag)
    assert error.startswith(f"{t5x}/{GATE} must be an array with all its {len(chunks)} chunks")
    assert f"(got 'without {chunks[2].name}'); copy the array again" in error
    for file in chunks[:2] + chunks[3:]:
        file.unlink()
    count = len(chunks) - 1
    assert f"(got 'without {chunks[0].name} and {count} more')" in error_of(t5x, capsys, flag)


def test_a_chunk_that_disappears_while_converting_is_missed(t5x: Path) -> None:
    """TensorStore's own check: the files are looked for only before anything is written."""
    model = read("t5x", t5x, config=CONFIG)
    next(file for file in (t5x / GATE).iterdir() if file.name != ".zarray").unlink()
    with pytest.raises(UsageError, match=r"an array of whole chunks \(got 'NOT_FOUND: chunk"):
        model.tensors["layers.1.moe.experts.gate"].whole()


def test_a_cut_chunk_is_one_line(t5x: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunk = next(file for file in (t5x / GATE).iterdir() if file.name != ".zarray")
    os.truncate(chunk, chunk.stat().st_size // 2)
    error = error_of(t5x, capsys)
    assert error.startswith(f"{t5x}/{GATE} must be an array of whole chunks (got 'FAILED_PRECOND")
    assert f'"{chunk.name}"' in error
    assert "tensorstore_spec" not in error


def test_an_array_without_its_metadata_is_named(
    t5x: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (t5x / GATE / ".zarray").unlink()
    expected = f"{t5x}/{GATE} must be a zarr array (got 'without .zarray'); copy the array again"
    assert error_of(t5x, capsys) == expected


@pytest.mark.parametrize("content", ["", "[]", '{"shape": [4]}', '{"shape": [4], "chunks": [0]}'])
def test_damaged_metadata_is_one_line(
    t5x: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (t5x / GATE / ".zarray").write_text(content)
    error = error_of(t5x, capsys)
    assert error.startswith(f"{t5x}/{GATE}/.zarray must be the JSON file of a zarr array (got ")


def test_a_store_without_folders_is_named(t5x: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(t5x, lambda spec: spec | {"kvstore": {"driver": "ocdbt", "path": path_of(spec)}})
    error = error_of(t5x, capsys)
    assert f"{t5x}/checkpoint must be one of file, gfile, gcs (got 'ocdbt'); convert it" in error


def test_a_link_that_leads_elsewhere_is_rejected(
    t5x: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (t5x / GATE).rename(t5x.parent / "elsewhere")
    (t5x / GATE).symlink_to(t5x.parent / "elsewhere")
    assert "(got 'a link to another place')" in error_of(t5x, capsys)


def test_other_checkpoints_of_jax_are_named(
    tmp_path: Path, t5x: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orbax = tmp_path / "orbax"
    (orbax / "d").mkdir(parents=True)
    (orbax / "manifest.ocdbt").touch()
    found = "(got 'an Orbax checkpoint, with manifest.ocdbt'); load it in t5x and save it with"
    assert found in error_of(orbax, capsys)
    run = tmp_path / "run"
    run.mkdir()
    t5x.rename(run / "checkpoint_5")
    error = error_of(run, capsys)
    assert "must be the folder of one t5x checkpoint (got 'a folder of checkpoints')" in error
    assert f"--load {run}/checkpoint_5" in error


def test_scanned_layers_are_named(t5x: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = msgpack.unpackb((t5x / "checkpoint").read_bytes(), raw=False)
    decoder = tree["optimizer"]["target"]["decoder"]
    decoder["decoder"] = decoder.pop("layers_0")
    for i in (1, 2, 3):
        del decoder[f"layers_{i}"]
    (t5x / "checkpoint").write_bytes(msgpack.packb(tree))
    error = error_of(t5x, capsys)
    assert error.startswith(f"parameters of {t5x} must be an array for each layer")
    assert "(got 'scanned layers: decoder/decoder/" in error


def test_the_preset_of_another_size_is_named(t5x: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = convert(t5x)[:-2]
    assert main([*words, "--preset", "openmoe-base-16e-released"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    expected = "must be a checkpoint of the model that --preset or --config names"
    assert f"{t5x} {expected} (got 'one with" in error
    assert error.endswith("it has 4 layers, 2 of them with experts")


def test_chunks_of_zeros_are_written(tmp_path: Path) -> None:
    """TensorStore would leave them out, and a reader could not tell them from lost ones."""
    model = model_of()
    name = "layers.1.moe.experts.down"
    model.tensors[name] = of_tensor(torch.zeros(model.tensors[name].shape))
    write(model, ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    same(read("t5x", tmp_path / "t5x", config=CONFIG), model)


def test_metadata_of_more_chunks_than_memory_holds(tmp_path: Path) -> None:
    head = {"shape": [10**9, 1, 3], "chunks": [1, 1, 2]}
    for name in ("0.0.0", "0.0.1", "1.0.1", "1.0.2", "01.0.0", "x", "1.0"):
        (tmp_path / name).touch()
    (tmp_path / ".zarray").write_text(json.dumps(head))
    with pytest.raises(UsageError, match=r"without 1\.0\.0 and 1999999996 more"):
        check_chunks(tmp_path)
    (tmp_path / ".zarray").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="the JSON file of a zarr array"):
        check_chunks(tmp_path)
