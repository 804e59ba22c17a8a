"""Names that the engine uses without having them, where Transformer Engine is not installed."""

from __future__ import annotations

from typing import Any

from megatron_moe.platform.patches.base import AttributePatch


class RouterGemm(AttributePatch):
    """`moe_utils.te_general_gemm` is tested for None but never defined without the extension."""

    name = "router-gemm"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.transformer.moe.moe_utils as moe_utils

        if hasattr(moe_utils, "te_general_gemm"):
            return []
        return [(moe_utils, "te_general_gemm", None)]
