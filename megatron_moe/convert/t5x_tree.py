"""The `checkpoint` file of t5x: a msgpack tree with a TensorStore spec for each large array.

    {version, optimizer: {target: nested dicts of specs and arrays, state: {step, param_states}}}

Without optimizer state there is no `param_states`, as t5x's `InferenceState` writes it: t5x reads
every leaf of the tree as an array or a spec, and an empty dictionary is neither.

Arrays inside the file are msgpack extension types of flax: 1 an array, 3 a scalar, each a packed
(shape, dtype, bytes). Every other extension type is an error: no other object is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.errors import CheckpointError, Corrupt, UsageError
from megatron_moe.files import read_small

FILE = "checkpoint"
VERSION = 3
_ARRAY, _SCALAR = 1, 3


def library(name: str) -> Any:
    """Import a package of the extra `t5x`.

    Raises:
        UsageError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        fix = "pip install 'megatron-moe[t5x]'"
        raise UsageError(
            f"package {name}", "missing", "installed for the t5x format", fix
        ) from None


def read_tree(directory: Path) -> dict[str, Any]:
    """Read the `optimizer` entry: `target`, a tree of specs and arrays, and `state`.

    Raises:
        Corrupt: the file is missing or is not such a tree.
    """
    msgpack, path = library("msgpack"), directory / FILE
    try:
        tree = msgpack.unpackb(read_small(path), ext_hook=_extension, raw=False)
    except FileNotFoundError:
        raise _no_tree(directory) from None
    except (OSError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corrupt(str(path), str(error), "the msgpack file of a t5x checkpoint") from None
    found = tree.get("optimizer") if isinstance(tree, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("target"), dict):
        raise Corrupt(str(path), "another tree", "a tree with optimizer/target")
    return found


_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "_sharding")
"""Files of Orbax, which newer t5x writes with `use_orbax=True`."""


def _no_tree(directory: Path) -> CheckpointError:
    """The error for a directory without the file `checkpoint`."""
    orbax = [name for name in _ORBAX if (directory / name).exists()]
    below = sorted(directory.glob("checkpoint_*/" + FILE))
    if orbax:
        fix = "load it in t5x and save it with Checkpointer (use_orbax=False)"
        found = f"an Orbax checkpoint, with {orbax[0]}"
    elif below:
        found, fix = "a folder of checkpoints", f"for example --load {below[-1].parent}"
    else:
        found, fix = "missing" if not directory.is_dir() else f"without a file {FILE}", ""
    return CheckpointError(str(directory), found, "the folder of one t5x checkpoint", fix)


def _extension(code: int, data: bytes) -> Any:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"extension type {code}")
    shape, dtype, values = library("msgpack").unpackb(data)
    if dtype == "bfloat16":
        return np.frombuffer(values, library("ml_dtypes").bfloat16).reshape(shape)
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"an array of {dtype}")
    return np.frombuffer(values, kind).reshape(shape)


def write_tree(path: Path, target: dict[str, Any], step: int) -> None:
    """Write the file: specs by path below `target`, and the step.

    Raises:
        OSError: the disk is full or the path is not writable.
    """
    msgpack = library("msgpack")
    nested: dict[str, Any] = {}
    for name, spec in target.items():
        *folders, leaf = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = spec
    count = msgpack.packb(((), "int32", np.int32(step).tobytes()))
    state = {"step": msgpack.ExtType(_ARRAY, count)}
    tree = {"version": VERSION, "optimizer": {"target": nested, "state": state}}
    path.write_bytes(msgpack.packb(tree))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and leaf of every array or spec of a tree."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and "driver" not in value:
            yield from leaves(value, f"{path}/")
        else:
            yield path, value


def step_of(tree: dict[str, Any]) -> int:
    """Optimizer steps taken; 0 if the file does not record them."""
    state = tree.get("state")
    step = state.get("step") if isinstance(state, dict) else None
    return int(step) if isinstance(step, np.ndarray | int) and np.size(step) == 1 else 0
