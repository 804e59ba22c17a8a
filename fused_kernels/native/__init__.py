"""Operations in C++ for CPUs, each in one pass over memory, compiled once where they first run.

Nothing is compiled when the package is installed. `library` says whether the operations can be
had here, and why not; `call` calls them.
"""

from fused_kernels.native.library import unavailable

__all__ = ["unavailable"]
