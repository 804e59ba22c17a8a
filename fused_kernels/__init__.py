"""The operations around the expert GEMMs, one file per operation and implementation.

`reference/` is plain torch and runs anywhere; `native/` is C++ for CPUs, compiled at first use
where a compiler is found; `triton/` is Triton for GPUs. An implementation is a folder whose files
have the same names and signatures as the reference's; `operations` has the signatures, `registry`
selects. This package imports only torch, and Triton where its kernels are selected.
"""

from fused_kernels.operations import Kernel, Kernels
from fused_kernels.registry import KernelUnavailable, load_kernels, select

__all__ = ["Kernel", "KernelUnavailable", "Kernels", "load_kernels", "select"]
