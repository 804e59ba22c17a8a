"""Our t5x directories, read by the steps of t5x's own `load_t5x_checkpoint` and `Checkpointer`.

Written after t5x/checkpoints.py, state_utils.py and checkpoint_importer.py, and flax's
`flatten_dict` and msgpack extensions; TensorStore is what t5x reads arrays with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import msgpack
import numpy as np
import pytest
import tensorstore as ts
import torch
from torch import Tensor

from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.t5x import t5x_name
from tests.convert.cases import model_of
from tests.convert.test_formats import Silent


class EmptyNode:
    """flax's `empty_node`, which stands for `{}` in a flattened dictionary."""


def msgpack_restore(data: bytes) -> Any:
    """`flax.serialization.msgpack_restore`: extension 1 is an array, 3 a scalar."""

    def unpack(code: int, packed: bytes) -> Any:
        assert code in (1, 3)
        shape, dtype, values = msgpack.unpackb(packed, raw=True)
        array = np.frombuffer(values, np.dtype(dtype.decode())).reshape(shape)
        return array[()] if code == 3 else array

    return msgpack.unpackb(data, ext_hook=unpack, raw=False)


def flatten_state_dict(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`state_utils.flatten_state_dict(keep_empty_nodes=True)`: a spec is a leaf, and so is `{}`."""
    if not tree:
        return {prefix: EmptyNode()}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict) and not value.keys() >= {"driver", "kvstore", "metadata"}:
            found.update(flatten_state_dict(value, path))
        else:
            found[path] = value
    return found


def load_t5x_checkpoint(path: str) -> dict[str, Any]:
    """All leaves by path, the arrays with the shape and dtype that their specs declare."""
    directory = path
    path = os.path.join(path, "checkpoint")
    contents = msgpack_restore(Path(path).read_bytes())
    assert contents["version"] >= 2, "earlier versions are rejected by t5x"
    flat = flatten_state_dict(contents["optimizer"])
    specs = {k: ts.Spec(v) if isinstance(v, dict) else v for k, v in flat.items()}
    state: dict[str, Any] = {}
    for key, leaf in specs.items():
        if not isinstance(leaf, ts.Spec):
            # `LazyAwaitableArray.from_array` takes shape and dtype of whatever is no spec.
            assert (leaf.shape, leaf.dtype) is not None
            state[key] = leaf
            continue
        spec = leaf.to_json()
        shape, dtype = spec["metadata"]["shape"], spec["dtype"]
        del spec["metadata"]["chunks"]
        del spec["metadata"]["compressor"]
        spec["kvstore"]["path"] = os.path.join(directory, spec["kvstore"]["path"])
        array = ts.open(spec, open=True).result().read().result()
        assert (list(array.shape), array.dtype.name) == (shape, dtype), key
        state[key] = array
    return state


def as_tensor(array: Any) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5x_restores_what_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype)
    write(model, ConversionTarget(format="t5x", path=tmp_path / "checkpoint_5"), Silent)
    state = load_t5x_checkpoint(str(tmp_path / "checkpoint_5"))
    step = state.pop("state/step")
    # As t5x writes it: an array without dimensions. `InferenceState` has nothing else.
    assert (step.shape, step.dtype, int(step)) == ((), np.int32, 5)
    assert state.keys() == {f"target/{t5x_name(name)[0]}" for name in model.tensors}
    for name, tensor in model.tensors.items():
        path, transposed = t5x_name(name)
        found = as_tensor(state[f"target/{path}"])
        assert torch.equal(found.t() if transposed else found, tensor.whole()), name


def test_this_reader_fails_on_an_empty_optimizer_state(tmp_path: Path) -> None:
    """As t5x does: `{}` is neither an array nor a spec."""
    write(model_of(), ConversionTarget(format="t5x", path=tmp_path / "t5x"), Silent)
    file = tmp_path / "t5x/checkpoint"
    tree = msgpack.unpackb(file.read_bytes(), raw=False)
    tree["optimizer"]["state"]["param_states"] = {}
    file.write_bytes(msgpack.packb(tree))
    with pytest.raises(AttributeError, match="'EmptyNode' object has no attribute 'shape'"):
        load_t5x_checkpoint(str(tmp_path / "t5x"))
