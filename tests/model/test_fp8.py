"""Flags of FP8 in the terms of its emulation."""

from __future__ import annotations

from fused_kernels.fp8.gemm import Fp8Settings
from megatron_moe.config import PrecisionConfig
from megatron_moe.platform import activate

activate()

from megatron_moe.model.fp8 import fp8_settings_of  # noqa: E402


def test_every_flag_has_its_effect() -> None:
    """Each differs from its default in one of the two."""
    plain = PrecisionConfig(fp8_format="e4m3", fp8_emulate=True)
    assert fp8_settings_of(plain, 1) == Fp8Settings(recipe="tensorwise")
    delayed = PrecisionConfig(
        fp8_format="hybrid",
        fp8_recipe="delayed",
        fp8_margin=2,
        fp8_amax_history_len=16,
        fp8_amax_compute_algo="max",
        fp8_emulate=True,
    )
    assert fp8_settings_of(delayed, 4) == Fp8Settings(
        recipe="delayed", hybrid=True, margin=2, history=16, most_recent=False, replicas=4
    )
