"""The operations around the expert GEMMs, one file per operation and implementation.

`reference/` is plain torch and runs anywhere; `native/` is C++ for CPUs, compiled at first use
where there is a compiler. An implementation is a folder whose files have the same names and
signatures as the reference's. `registry` chooses, and says what it chose. This package imports only
torch.
"""

from fused_kernels.registry import Kernel, KernelUnavailable, select, select_all

__all__ = ["Kernel", "KernelUnavailable", "select", "select_all"]
