"""A model that the kernel of norms cannot hold is refused before process groups exist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fused_kernels import Kernels, load_kernels
from fused_kernels.triton import rms_norm
from megatron_moe.config.presets import PRESETS
from megatron_moe.errors import UsageError
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.training import run

REFERENCE = load_kernels("reference", "cpu")


def with_triton_norm() -> Kernels:
    """As on a GPU: the norm is Triton's."""
    selected = [
        replace(each, implementation="triton") if each.operation == "rms_norm" else each
        for each in REFERENCE.selected
    ]
    return replace(REFERENCE, rms_norm=rms_norm, selected=tuple(selected))


@pytest.mark.parametrize(
    ("width", "kernels", "refused"),
    [
        (16385, with_triton_norm(), True),
        (16384, with_triton_norm(), False),
        (16385, REFERENCE, False),
    ],
    ids=["one too wide", "the widest", "reference"],
)
def test_width(
    width: int, kernels: Kernels, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "kernels_for", lambda *_: kernels)
    preset = PRESETS["openmoe-tiny"]
    config = replace(preset, model=replace(preset.model, hidden_size=width))
    if not refused:
        assert run.compare_kernels(config, "cpu", RankGroup()) == []
        return
    with pytest.raises(UsageError) as found:
        run.compare_kernels(config, "cpu", RankGroup())
    assert str(found.value) == (
        "--hidden-size must be <= 16384 with the triton kernel of norms (got 16385);"
        " set --kernel-impl reference"
    )
