"""Where Triton's kernels run: in its interpreter on the CPU, and on a GPU in `make test-gpu`.

The interpreter runs a kernel's program on NumPy arrays, one program after the other. It shows that
indices, masks and formulas are right, not that the compiled code is, nor its rounding to bfloat16
or FP8: the interpreter truncates. So its tests compute in fp32 and fp64, and bfloat16 is tested on
a GPU alone.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Of the operands."""
    return torch.device("cpu" if request.param == "interpreter" else "cuda")
