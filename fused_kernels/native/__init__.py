"""Operations in C++ for CPUs, each in one pass over memory, compiled once where they first run.

Nothing is compiled when the package is installed. `library` says whether and why not the operations
can be had here; `registry` asks it.
"""

from fused_kernels.native.library import unavailable

__all__ = ["unavailable"]
