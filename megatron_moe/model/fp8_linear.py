"""Megatron-Core's linear layers, with a GEMM in emulated FP8 where one is set.

With sequence parallelism the input is gathered before it is rounded: its scale is that of the whole
sequence, as Transformer Engine's is.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from fused_kernels.fp8.gemm import Fp8Gemm


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's layer; with `fp8`, its GEMM is that one.

    Attributes:
        fp8: set by `emulate_fp8`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8: Fp8Gemm | None = None

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] (part of S under sequence parallelism) -> [S, B, N of this rank]."""
        if self.fp8 is None:
            found: tuple[Tensor, Tensor | None]
            found = super().forward(input_, weight, runtime_gather_output)
            return found
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            x = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return self.fp8(x, self.weight), None


class Fp8RowParallelLinear(RowParallelLinear):
    """Likewise."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8: Fp8Gemm | None = None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, B, K of this rank] -> [S, B, H], this rank's part of S under sequence parallelism."""
        if self.fp8 is None:
            found: tuple[Tensor, Tensor | None] = super().forward(input_)
            return found
        partial = self.fp8(input_, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None
