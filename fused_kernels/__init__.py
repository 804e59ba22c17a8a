"""The operations around the expert GEMMs, one file per operation and implementation.

`reference/` is plain torch and runs anywhere. Another implementation is a folder beside it whose
files have the same names and signatures. `registry` chooses, and says what it chose.
This package imports only torch.
"""

from fused_kernels.registry import Kernel, KernelUnavailable, select, select_all

__all__ = ["Kernel", "KernelUnavailable", "select", "select_all"]
