"""`--verify` compares with a second reading: a reader or a writer that is wrong is noticed."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.convert import hf_files, t5x_arrays
from megatron_moe.convert import model as convert_model
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.model import LazyTensor
from megatron_moe.convert.second_reading import raw_safetensors, raw_zarr
from megatron_moe.errors import Corrupt
from tests.convert.cases import CONFIG, model_of
from tests.convert.test_formats import Silent
from tools.convert_checkpoint import main

GATE = "target.decoder.layers_1.mlp.expert.wi_0.kernel"
FORMATS = ("native", "hf", "t5x")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same model in every format, with many chunks and parts."""
    monkeypatch.setattr(convert_model, "PART_BYTES", 700)
    monkeypatch.setattr(t5x_arrays, "CHUNK_BYTES", 500)
    found = {name: tmp_path / name for name in FORMATS}
    for name, path in found.items():
        write(model_of(), ConversionTarget(format=name, path=path), Silent)
    CONFIG.save(tmp_path / "config.json")
    return found


def convert(sources: dict[str, Path], source: str, target: str) -> int:
    path = sources[source]
    words = f"--from {source} --load {path} --to {target} --save {path.parent}/out --verify"
    config = ["--config", str(path.parent / "config.json")] if source == "t5x" else []
    return main([*words.split(), *config])


@pytest.mark.parametrize(("source", "target"), [("t5x", "native"), ("hf", "t5x"), ("native", "hf")])
def test_every_verification_names_its_second_reading(
    sources: dict[str, Path], source: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(sources, source, target) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("verified: ")]
    ways = {
        "t5x": "chunk by chunk with gzip and NumPy",
        "hf": "by safetensors header and raw bytes",
        "native": "have the SHA-256 of",
    }
    first, second, third, logits = said
    assert str(sources[source]) in first
    assert ways[source] in first
    assert ways[target] in second
    assert "(SHA-256)" in second
    assert third == "verified: 49 tensors, read back by the converter, have the same SHA-256"
    assert "logits of 8 tokens are the same as those of " in logits


def test_zeros_in_place_of_a_lost_chunk_are_noticed(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reader as it was: TensorStore's default, and no look at the files."""
    opened = t5x_arrays.library("tensorstore").open

    def lenient(spec: dict[str, Any], **how: Any) -> Any:
        return opened({k: v for k, v in spec.items() if k != "fill_missing_data_reads"}, **how)

    class Store:
        open = staticmethod(lenient)

    monkeypatch.setattr(t5x_arrays, "check_chunks", lambda folder: None)
    monkeypatch.setattr(t5x_arrays, "library", lambda name: Store)
    lost = next(file for file in (sources["t5x"] / GATE).iterdir() if file.name != ".zarray")
    lost.unlink()
    assert convert(sources, "t5x", "native") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "decoder/layers_1/mlp/expert/wi_0/kernel in " in error
    assert (
        f"must be readable a second time (got \"[Errno 2] No such file or directory: '{lost}'"
        in (error)
    )


def test_a_wrong_reading_of_safetensors_is_noticed(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def zeros(path: Path, key: str, shape: tuple[int, ...], dtype: str) -> LazyTensor:
        read = lambda start, stop: torch.zeros(stop - start, *shape[1:])  # noqa: E731
        return LazyTensor(shape, torch.float32, read)

    monkeypatch.setattr(hf_files, "_slice", zeros)
    assert convert(sources, "hf", "t5x") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must be the same in both readings (got 'other values')" in error


@pytest.mark.parametrize("target", ["native", "t5x"])
def test_a_result_that_is_not_what_was_written_is_noticed(
    sources: dict[str, Path],
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = write

    def damaging(model: Any, to: ConversionTarget, progress: Any) -> Path:
        where = written(model, to, progress)
        if target == "t5x":
            chunk = next(file for file in (where / GATE).iterdir() if file.name != ".zarray")
            data = bytearray(gzip.decompress(chunk.read_bytes()))
            data[5] ^= 1
            chunk.write_bytes(gzip.compress(bytes(data)))
        else:
            file = next(where.glob("*.safetensors"))
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)
        return where

    monkeypatch.setattr("tools.convert_checkpoint.write", damaging)
    assert convert(sources, "hf", target) == 2
    said = capsys.readouterr()
    assert f"{sources[target].parent}/out" in said.err.splitlines()[-1]
    assert "read back by the converter" not in said.out


def test_the_second_readers_read_what_the_libraries_read(sources: dict[str, Path]) -> None:
    (file,) = sources["hf"].glob("*.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(raw_safetensors(file)[name].whole(), tensor)
    gate = read("t5x", sources["t5x"], config=CONFIG).tensors["layers.1.moe.experts.gate"].whole()
    found = raw_zarr(sources["t5x"] / GATE, False)
    assert len(list((sources["t5x"] / GATE).iterdir())) > 8
    assert torch.equal(found.whole(), gate)
    assert torch.equal(found.rows(1, 3), gate[1:3])
    query = raw_zarr(sources["t5x"] / "target.decoder.layers_0.self_attention.query.kernel", True)
    expected = model_of().tensors["layers.0.attention.query.weight"].whole()
    assert torch.equal(query.rows(3, 20), expected[3:20])


def test_tensor_files_beside_the_weights_are_not_read(
    sources: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = sources["hf"] / "adapter.safetensors"
    save_file({"positions": torch.arange(3)}, other)
    assert convert(sources, "hf", "native") == 0
    assert f"tensors of {sources['hf']}, read by safetensors, equal" in capsys.readouterr().out
    with pytest.raises(Corrupt, match=r"positions in .*adapter.safetensors must be one of F64, "):
        raw_safetensors(other)
