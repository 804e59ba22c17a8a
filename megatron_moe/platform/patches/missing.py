"""Gaps of the stock MoE layer on a CPU. Ours uses none of this; comparisons with it do."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.platform.patches.base import AttributePatch


class RouterGemm(AttributePatch):
    """`moe_utils.te_general_gemm` is tested for None but never defined without the extension."""

    name = "router-gemm"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.transformer.moe.moe_utils as moe_utils

        return [(moe_utils, "te_general_gemm", None)]


class HostSplits(AttributePatch):
    """The dropless dispatcher turns the sizes of its all-to-all into host values when it moves
    them off the GPU; sizes that are on the CPU already stay tensors, which the collective refuses.
    """

    name = "host-splits"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

        return [(token_dispatcher, "maybe_move_tensor_to_cpu", _to_host)]


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
