"""t5x directories: read back by the standard library alone, and there and back bit by bit."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from megatron_moe.convert import model as convert_model
from megatron_moe.convert import t5x_arrays
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.t5x_tree import write_tree
from megatron_moe.errors import UsageError
from tests.convert.cases import CONFIG, model_of
from tests.convert.test_formats import Silent, same
from tools.convert_checkpoint import main


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of every tensor, and many chunks of every array."""
    monkeypatch.setattr(convert_model, "PART_BYTES", 700)
    monkeypatch.setattr(t5x_arrays, "CHUNK_BYTES", 500)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype)
    write(model, ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    found = read("t5x", tmp_path / "t5x", config=CONFIG)
    assert found.step == 5
    write(found, ConversionTarget(format="native", path=tmp_path / "native"), Silent)
    same(read("native", tmp_path / "native"), model)


def by_hand(folder: Path) -> Any:
    """A zarr array put together from its files: JSON, gzip and raw numbers."""
    head = json.loads((folder / ".zarray").read_text())
    assert (head["zarr_format"], head["order"], head["compressor"]["id"]) == (2, "C", "gzip")
    out = np.zeros(head["shape"], np.dtype(head["dtype"]))
    counts = [-(-n // c) for n, c in zip(head["shape"], head["chunks"], strict=True)]
    for place in itertools.product(*map(range, counts)):
        data = gzip.decompress((folder / ".".join(map(str, place))).read_bytes())
        chunk = np.frombuffer(data, out.dtype).reshape(head["chunks"])
        spans = [
            slice(i * c, min((i + 1) * c, n))
            for i, c, n in zip(place, head["chunks"], head["shape"], strict=True)
        ]
        out[tuple(spans)] = chunk[tuple(slice(0, s.stop - s.start) for s in spans)]
    return torch.from_numpy(out)


@pytest.mark.usefixtures("small_parts")
def test_the_files_are_what_t5x_writes(tmp_path: Path) -> None:
    model = model_of()
    write(model, ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    ours = {name: tensor.whole() for name, tensor in model.tensors.items()}
    layers = tmp_path / "t5x/target.decoder.layers_"
    gate = by_hand(Path(f"{layers}1.mlp.expert.wi_0.kernel"))
    assert torch.equal(gate, ours["layers.1.moe.experts.gate"])  # [E, H, 2F], as ours
    query = by_hand(Path(f"{layers}2.self_attention.query.kernel"))
    assert torch.equal(query, ours["layers.2.attention.query.weight"].T)  # [H, n * d]
    router = by_hand(Path(f"{layers}3.mlp.router.router_weights.w.kernel"))
    assert torch.equal(router, ours["layers.3.moe.router.weight"].T)  # [H, E]
    extra = by_hand(Path(f"{layers}3.extra_mlp.wo.kernel"))
    assert torch.equal(extra, ours["layers.3.shared.down.weight"].T)
    logits = by_hand(tmp_path / "t5x/target.decoder.logits_dense.kernel")
    assert torch.equal(logits, ours["output.weight"].T)
    embedding = by_hand(tmp_path / "t5x/target.token_embedder.embedding")
    assert torch.equal(embedding, ours["embedding.weight"])
    tree = msgpack.unpackb((tmp_path / "t5x/checkpoint").read_bytes(), raw=False)
    assert tree["version"] == 3
    spec = tree["optimizer"]["target"]["decoder"]["layers_0"]["mlp"]["wi_1"]["kernel"]
    assert spec["driver"] == "zarr"
    assert spec["kvstore"]["path"] == "target.decoder.layers_0.mlp.wi_1.kernel/"
    assert spec["metadata"]["shape"] == [16, 24]
    step = tree["optimizer"]["state"]["step"]
    shape, kind, data = msgpack.unpackb(step.data, raw=False)
    assert (step.code, shape, kind, data) == (1, [], "int32", b"\x05\x00\x00\x00")


def _tree(path: Path) -> dict[str, Any]:
    return msgpack.unpackb(path.read_bytes(), raw=False)["optimizer"]["target"]  # type: ignore[no-any-return]


def _rewrite(path: Path, name: str, leaf: Any) -> None:
    """The tree with another leaf."""
    found: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if "driver" in value:
                found[prefix + key] = value
            else:
                walk(value, f"{prefix}{key}/")

    walk(_tree(path), "")
    found[name] = leaf
    write_tree(path, {k: v for k, v in found.items() if v is not None}, 5)


def test_small_arrays_may_be_in_the_tree_itself(tmp_path: Path) -> None:
    model = model_of()
    write(model, ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    scale = model.tensors["final_norm.weight"].whole().numpy()
    packed = msgpack.packb((scale.shape, "float32", scale.tobytes()))
    shutil.rmtree(tmp_path / "t5x/target.decoder.decoder_norm.scale")
    _rewrite_inline(tmp_path / "t5x/checkpoint", packed)
    same(read("t5x", tmp_path / "t5x", config=CONFIG), model)


def _rewrite_inline(path: Path, packed: bytes) -> None:
    tree = msgpack.unpackb(path.read_bytes(), raw=False)
    inline = msgpack.ExtType(1, packed)
    tree["optimizer"]["target"]["decoder"]["decoder_norm"]["scale"] = inline
    path.write_bytes(msgpack.packb(tree))


OUTSIDE = {"driver": "zarr", "kvstore": {"driver": "file", "path": "../secret/"}}
ELSEWHERE = {"driver": "zarr", "kvstore": {"driver": "gcs", "bucket": "b"}, "path": "target.absent"}


ARRAY_OF_TEXT = msgpack.ExtType(1, msgpack.packb(((2,), "U1", b"a\0\0\0b\0\0\0")))


def test_a_chunk_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    """TensorStore allocates a chunk before it reads, and ends the process if it cannot."""
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    head = tmp_path / "t5x/target.decoder.decoder_norm.scale/.zarray"
    head.write_text(json.dumps({**json.loads(head.read_text()), "chunks": [1 << 50]}))
    with pytest.raises(UsageError, match=r"bytes of a chunk of .* must be at most 1100 times the"):
        read("t5x", tmp_path / "t5x", config=CONFIG)


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (None, "without decoder/decoder_norm/scale"),
        (OUTSIDE, r"t5x/secret must be a zarr array \(got 'missing'\)"),
        (OUTSIDE | {"path": ".."}, r"checkpoint must be the name of a folder \(got '..'\)"),
        (ELSEWHERE, "target.absent"),
        (3, r"decoder_norm/scale in .* must be an array of one of float32, .*\(got 'int'\)"),
        ("x", r"\(got 'str'\)"),
        ([1.5], r"\(got 'list'\)"),
        ({**OUTSIDE, "path": "a\0b"}, r"the name of a folder \(got 'a\\x00b'\)"),
        (ARRAY_OF_TEXT, r"\(got 'str32'\)"),
    ],
)
def test_a_wrong_tree_is_refused(tmp_path: Path, leaf: Any, said: str) -> None:
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    _rewrite(tmp_path / "t5x/checkpoint", "decoder/decoder_norm/scale", leaf)
    with pytest.raises(UsageError, match=said):
        read("t5x", tmp_path / "t5x", config=CONFIG)


@pytest.mark.parametrize("content", [b"", b"\xc1", msgpack.packb({"version": 3}), None])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    file = tmp_path / "t5x/checkpoint"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"t5x(/checkpoint)? must be (the|a) .* \(got "):
        read("t5x", tmp_path / "t5x", config=CONFIG)


def test_the_command_line_needs_to_know_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(model_of(), ConversionTarget(format="native", path=tmp_path / "native"), Silent)
    CONFIG.save(tmp_path / "config.json")
    to_t5x = ["--from", "native", "--load", str(tmp_path / "native"), "--to", "t5x"]
    assert main([*to_t5x, "--save", str(tmp_path / "t5x"), "--verify"]) == 0
    back = ["--from", "t5x", "--load", str(tmp_path / "t5x"), "--to", "hf"]
    save = ["--save", str(tmp_path / "hf")]
    assert main([*back, *save]) == 2
    assert "--preset must be given, or --config (got None)" in capsys.readouterr().err
    assert main([*back, *save, "--preset", "openmoe-tiny-released"]) == 2
    assert "embedding.weight must have shape [96, 256] (got [96, 16])" in capsys.readouterr().err
    assert main([*back, *save, "--config", str(tmp_path / "config.json"), "--verify"]) == 0
    same(read("hf", tmp_path / "hf"), model_of())
    assert main([*to_t5x, "--save", str(tmp_path / "x"), "--preset", "openmoe-tiny"]) == 2
    assert "--preset must be absent with --from native" in capsys.readouterr().err
