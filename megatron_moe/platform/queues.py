"""The hardware queues of a GPU: `CUDA_DEVICE_MAX_CONNECTIONS`.

With one queue, kernels start in the order in which they were issued, so that a collective that is
issued before a GEMM runs beside it; with several, it may start after it. Tensor parallelism counts
on that up to Hopper (Megatron-LM requires it there as well); Blackwell does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_moe.errors import UsageError

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10
"""Major compute capability."""


def check_queues(tensor_parallel: int, capability: int, environment: Mapping[str, str]) -> None:
    """Check the variable, which must be set before CUDA starts.

    Args:
        tensor_parallel: size.
        capability: major compute capability of the GPU.
        environment: of this process.

    Raises:
        UsageError: tensor parallelism on a GPU that needs one queue, without the variable.
    """
    value = environment.get(VARIABLE)
    if tensor_parallel > 1 and capability < _BLACKWELL and value != "1":
        expected = "1 with --tensor-model-parallel-size > 1 on this GPU"
        fix = f"export {VARIABLE}=1: collectives otherwise start after the GEMMs that hide them"
        raise UsageError(f"environment variable {VARIABLE}", value, expected, fix)
