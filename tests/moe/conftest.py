"""Megatron-Core keeps the scale of router losses in a class attribute: each test starts without."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
