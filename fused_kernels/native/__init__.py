"""Operations in C++ for CPUs, each in one pass over memory, compiled once where they first run.

Nothing is compiled when the package is installed. `library` compiles and loads the operations, or
returns why they are unavailable on this machine; `call` calls them.
"""

from fused_kernels.native.library import unavailable

__all__ = ["unavailable"]
