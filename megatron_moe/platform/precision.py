"""Whether a device can multiply in FP8."""

from __future__ import annotations

from megatron_moe.config import PrecisionConfig
from megatron_moe.errors import UsageError


def check_precision(precision: PrecisionConfig, device_type: str) -> None:
    """Check that the FP8 GEMMs that are asked for exist.

    Args:
        precision: the format.
        device_type: of the run's device.

    Raises:
        UsageError: FP8 on a CPU, or without layers of Transformer Engine.
    """
    if precision.fp8_format is None:
        return
    if device_type == "cpu":
        raise UsageError("--fp8-format", precision.fp8_format, "unset on a CPU")
    fix = "layers of Transformer Engine are not built"
    raise UsageError("--fp8-format", precision.fp8_format, "unset", fix)
