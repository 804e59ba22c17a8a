"""From a directory to the model in it, of any format."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.analysis.foreign_model import open_foreign_model
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.native_model import open_native_model
from megatron_moe.checkpoint.disk import read_json
from megatron_moe.errors import UsageError


def open_model(path: str | Path, step: int | None = None, label: str | None = None) -> MoEModel:
    """Open a native checkpoint directory, OpenMoE in the Hugging Face layout, or another family.

    Args:
        path: the directory.
        step: step of a native checkpoint; `None` means the tracker's. Files of other families do
            not say it, so that it is what the user knows.
        label: name in reports; `None` makes one of directory and step.

    Raises:
        UsageError: there is no such model, it is damaged, or it has no MoE layer.
    """
    path = Path(path)
    config = path / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    foreign = kind not in (None, "openmoe", "llama")
    opener = open_foreign_model if foreign else open_native_model
    model: MoEModel = opener(path, step, label)
    if not model.sizes.moe_layers:
        raise UsageError(f"MoE layers of {path}", 0, "at least one", "it is a dense model")
    return model
