"""`pretrain_openmoe.py` with matrix products of bf16 computed in fp32 and rounded once.

    python examples/experiments/bf16_products.py --preset openmoe-tiny --bf16 ...

That is what a tensor core computes. A processor without instructions for bf16 (before AVX-512 BF16
or AMX) has no GEMM for it either: PyTorch's own then takes ten to thirty times as long as this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
FUNCTIONAL = {
    aten.mm: aten.mm.default,
    aten.bmm: aten.bmm.default,
    aten.mv: aten.mv.default,
    aten.addmm: aten.addmm.default,
    aten.baddbmm: aten.baddbmm.default,
    aten.addmm_: aten.addmm.default,
    aten.baddbmm_: aten.baddbmm.default,
}
"""Products, and what computes them without writing into an operand."""


class Bf16Products(TorchDispatchMode):
    """Products with an operand in bf16 are computed in fp32."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute the product, or pass anything else on."""
        given = dict(kwargs or {})
        product = FUNCTIONAL.get(func.overloadpacket)
        if product is None or func._overloadname not in ("default", "out"):
            return func(*args, **given)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if all(x.dtype != torch.bfloat16 for x in tensors):
            return func(*args, **given)
        out = given.pop("out", args[0] if func.overloadpacket.__name__.endswith("_") else None)
        result = product(*(_wide(x) for x in args), **given)
        return result.to(tensors[0].dtype) if out is None else out.copy_(result)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) else x


def main(run: Callable[[], Any]) -> Any:
    """The program's result."""
    with Bf16Products():
        return run()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from pretrain_openmoe import main as pretrain

    sys.exit(main(pretrain))
