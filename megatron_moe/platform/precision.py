"""Whether a device can multiply in FP8."""

from __future__ import annotations

from megatron_moe.config import PrecisionConfig
from megatron_moe.errors import UsageError


def check_precision(precision: PrecisionConfig, device_type: str) -> None:
    """Check that the FP8 GEMMs that are asked for exist, or are emulated.

    Args:
        precision: the format, and whether it is emulated.
        device_type: of the run's device.

    Raises:
        UsageError: FP8 on a CPU, or without layers of Transformer Engine.
    """
    if precision.fp8_format is None or precision.fp8_emulate:
        return
    fix = "no CPU multiplies in FP8"
    if device_type != "cpu":
        fix = "layers of Transformer Engine are not built"
    raise UsageError("--fp8-format", precision.fp8_format, "used with --fp8-emulate", fix)
