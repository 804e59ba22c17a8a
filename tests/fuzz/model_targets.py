"""Parsers of checkpoints, this project's and others'."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as distributed

from megatron_moe.analysis.foreign_config import read_settings
from megatron_moe.checkpoint.directory import latest_step, read_manifest
from megatron_moe.checkpoint.disk import read_json
from megatron_moe.checkpoint.foreign import weights_in
from megatron_moe.checkpoint.index import INDEX
from megatron_moe.checkpoint.metadata import CONFIG as RUN_CONFIG
from megatron_moe.checkpoint.metadata import STATE, parse_json_files, read_json_files
from megatron_moe.checkpoint.reading import TensorReader
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.pickled import read_pickle
from megatron_moe.convert.t5x_arrays import open_array
from megatron_moe.convert.torch_dist import open_tensors, read_saved
from tests.analysis import families
from tests.checkpoint import toy
from tests.convert.cases import CONFIG, model_of
from tests.convert.test_llama import CONFIG as LLAMA
from tests.convert.test_llama import save as save_llama
from tests.convert.test_llama import weights
from tests.fuzz.target import HOSTILE, Opened, Target

SMALL = replace(
    CONFIG,
    model=replace(CONFIG.model, num_layers=2),
    moe=replace(CONFIG.moe, moe_layer_freq="[0,1]"),
)


def _contents(name: str, path: Path, config: Any = None) -> None:
    """Open, and read every tensor."""
    for tensor in read(name, path, config=config).tensors.values():
        tensor.digest()


def _hugging_face(name: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        path = folder / "hf"
        write(model_of(SMALL), ConversionTarget(format="hf", path=path, max_shard=60_000), _quiet)
        file = min(path.glob(name))
        return Opened(file, lambda: _contents("hf", path))

    return make


def _quiet(_: int) -> None:
    """No report of progress."""


def _bin(folder: Path) -> Opened:
    path = folder / "hf"
    write(model_of(SMALL), ConversionTarget(format="hf", path=path), _quiet)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return Opened(path / "pytorch_model.bin", lambda: read("hf", path))


def _llama(folder: Path) -> Opened:
    config = {**LLAMA, "rope_parameters": {"rope_theta": 300.0}, "head_dim": 8}
    path = save_llama(folder / "llama", config, weights(LLAMA))
    return Opened(path / "config.json", lambda: _contents("hf", path))


def _mixture(kind: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        families.save(families.make(kind), folder)
        return Opened(folder / "config.json", lambda: read_settings(folder))

    return make


def _t5x(name: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        path = folder / "t5x"
        write(model_of(SMALL), ConversionTarget(format="t5x", path=path), _quiet)
        return Opened(path / name, lambda: _contents("t5x", path, SMALL))

    return make


def _zarr(name: str) -> Callable[[Path], Opened]:
    """A file of one array."""

    def make(folder: Path) -> Opened:
        whole = _t5x(f"{NORM}/{name}")(folder)
        path, spec = folder / "t5x", {"kvstore": {"path": NORM}}

        def read_array() -> None:
            open_array(path, "decoder/decoder_norm/scale", spec, False).digest()

        return Opened(whole.file, read_array)

    return make


NORM = "target.decoder.decoder_norm.scale"


def _packed(leaf: Any) -> bytes:
    """A t5x tree in which one leaf is something else."""
    import msgpack

    tree = {"decoder_norm": {"scale": leaf}, "layers_0": leaf, "x\0y": leaf}
    target = {"decoder": tree, "token_embedder": {"embedding": leaf}}
    packed: bytes = msgpack.packb({"version": 3, "optimizer": {"target": target, "state": leaf}})
    return packed


def _leaves() -> tuple[bytes, ...]:
    import msgpack

    array = [((2,), "float32", b"12345678"), ((1 << 60,), "float32", b""), ((2,), "O", b"12345678")]
    more = [((2,), "U9", b"1"), (("a",), "float32", b""), ((-1,), "V0", b""), 7, ((2,), 3, None)]
    extensions = [
        msgpack.ExtType(kind, msgpack.packb(v)) for v in (*array, *more) for kind in (1, 3)
    ]
    stores = [{"driver": "file", "path": p} for p in ("a\0b", "..", "/", "", 3, "x" * 400)]
    specs = [{"driver": "zarr", "kvstore": store} for store in stores]
    specs += [{"driver": d, "kvstore": {"path": "target.x"}} for d in ("zarr", 3, None)]
    return tuple(_packed(v) for v in (None, 1, 1.5, "x", b"x", [1], True, {}, *extensions, *specs))


def _native(name: str, read_step: Callable[[Path, Path], object]) -> Callable[[Path], Opened]:
    """A file of a step; checksums are not compared, or no fault would reach the parser."""

    def make(folder: Path) -> Opened:
        step = toy.save(folder / "run", 3)
        return Opened(step / name, lambda: read_step(step, step / name))

    return make


def _parse(step: Path, file: Path) -> None:
    files = {name: read_json(step / name) for name in (RUN_CONFIG, STATE, INDEX)}
    records = {n: [r.sha256, r.bytes] for n, r in read_manifest(step).items()}
    parse_json_files(step, {"manifest.json": records, **files})


def _tensors(step: Path, _: Path) -> None:
    opened = parse_json_files(step, read_json_files(step))
    reader = TensorReader(step, opened.tensors)
    for kind, name in opened.tensors:
        reader.whole(kind, name)


def _tracker(folder: Path) -> Opened:
    step = toy.save(folder, 3)
    return Opened(step.parent / "latest_checkpointed_iteration.txt", lambda: latest_step(folder))


def _distributed(name: str) -> Callable[[Path], Opened]:
    def make(folder: Path) -> Opened:
        state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}
        distributed.save(state, checkpoint_id=folder / "d", no_dist=True)

        def read_all() -> None:
            for tensor in open_tensors(folder / "d").values():
                tensor.read([(0, size) for size in tensor.shape])

        return Opened(folder / "d" / name, read_all)

    return make


def _saved(folder: Path) -> Opened:
    torch.save({"args": [1, "x"], "t": torch.ones(3)}, folder / "common.pt")
    return Opened(folder / "common.pt", lambda: read_saved(folder / "common.pt"))


def _pickle(folder: Path) -> Opened:
    import pickle

    file = folder / "p"
    file.write_bytes(pickle.dumps({"a": (1, 2.5, "x"), "b": [None, {3}], "c": Path("/")}))
    return Opened(file, lambda: read_pickle(file.read_bytes(), "p"))


def _map(file: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"a": file}}).encode()


def _targets() -> Sequence[Target]:
    names = tuple(
        map(_map, ("a\0b", "\ud83d", "..", "", "../x", "x" * 5000, "\x1b[2J", "/dev/zero"))
    )
    head = '{"shape": @, "chunks": @, "dtype": "<f4", "compressor": null, "zarr_format": 2}'
    shapes = ("[16]", "[1e400]", '["a"]', "[9223372036854775807]", f"[{'9' * 5000}]", "[[1]]")
    heads = tuple(head.replace("@", shape).encode() for shape in shapes)
    return [
        Target("checkpoint-manifest", _native("manifest.json", lambda s, f: read_manifest(s)),
               HOSTILE),
        Target("checkpoint-config", _native(RUN_CONFIG, _parse), HOSTILE),
        Target("checkpoint-state", _native(STATE, _parse), HOSTILE),
        Target("checkpoint-index", _native(INDEX, _parse), HOSTILE),
        Target("checkpoint-tensors", _native("rank-00000.safetensors", _tensors)),
        Target("checkpoint-tracker", _tracker, HOSTILE),
        Target("hf-config", _hugging_face("config.json"), HOSTILE),
        Target("hf-index", _hugging_face("*.index.json"), (*HOSTILE, *names)),
        Target("hf-safetensors", _hugging_face("*.safetensors")),
        Target("hf-bin", _bin),
        Target("llama-config", _llama, HOSTILE),
        *(Target(f"{kind}-config", _mixture(kind), HOSTILE) for kind in ("mixtral", "deepseek_v3")),
        Target("t5x-tree", _t5x("checkpoint"), (*HOSTILE, *_leaves())),
        Target("t5x-zarray", _zarr(".zarray"), (*HOSTILE, *heads)),
        Target("t5x-chunk", _zarr("0")),
        Target("torch-dist-metadata", _distributed(".metadata")),
        Target("torch-dist-tensors", _distributed("__0_0.distcp")),
        Target("torch-save", _saved),
        Target("pickle", _pickle, HOSTILE),
        Target("directory", _native("config.json", lambda s, f: weights_in(s)), HOSTILE),
    ]  # fmt: skip


TARGETS = _targets()
