"""Feed-forward weights of a dense Llama-style model, to put beside the experts of an MoE model.

Shapes: F width, H hidden. Matrices are [out, in].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.analysis.foreign import check_not_quantized
from megatron_moe.analysis.foreign_config import CONFIG
from megatron_moe.analysis.model import ExpertWeights
from megatron_moe.checkpoint.disk import read_json
from megatron_moe.convert.hf_files import MANY, SIZE, open_files, whole_number
from megatron_moe.convert.model import LazyTensor
from megatron_moe.errors import Corrupt, UsageError

DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` that are read: their matrices have the same names."""
_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """An opened dense model.

    Args:
        label: name in reports.
        path: its directory.
        layers: weights of each layer, read when needed.
        hidden_size: H.
        width: F.
        identity: hash of size and time of each file.
    """

    label: str
    path: Path
    layers: Mapping[int, ExpertWeights]
    hidden_size: int
    width: int
    identity: str


def open_dense(path: str | Path, label: str | None = None) -> DenseModel:
    """Open a dense model in the Hugging Face layout; names and shapes are checked.

    Args:
        path: its directory.
        label: name in reports; `None` means the directory's.

    Raises:
        UsageError: it is of another family, or files are missing or damaged.
    """
    path = Path(path)
    source = str(path / CONFIG)
    values = read_json(path / CONFIG)
    kind = values.get("model_type")
    if kind not in DENSE:
        fix = "MoE models are given to --load"
        raise UsageError(f"model_type in {source}", kind, f"one of {', '.join(DENSE)}", fix)
    count = whole_number(values, "num_hidden_layers", source, most=MANY)
    hidden = whole_number(values, "hidden_size", source, most=SIZE)
    width = whole_number(values, "intermediate_size", source, most=SIZE)
    tensors = open_files(path)
    check_not_quantized(path, tensors)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    layers = {}
    for layer in range(count):
        names = [f"model.layers.{layer}.mlp.{name}.weight" for name in _NAMES]
        found = (_get(path, tensors, *pair) for pair in zip(names, shapes, strict=True))
        layers[layer] = ExpertWeights(*found)
    files = sorted(file for file in path.iterdir() if file.is_file())
    sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return DenseModel(
        label=label or path.resolve().name,
        path=path,
        layers=layers,
        hidden_size=hidden,
        width=width,
        identity=hashlib.sha256(repr(sizes).encode()).hexdigest(),
    )


def _get(
    path: Path, tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, int]
) -> LazyTensor:
    if name not in tensors:
        expected = "a dense checkpoint with all matrices"
        raise Corrupt(str(path), f"one without {name}", expected)
    found = tensors[name]
    if found.shape != shape:
        what = f"shape of {name} in {path}"
        raise Corrupt(what, list(found.shape), f"{list(shape)} as in {CONFIG}")
    return found
