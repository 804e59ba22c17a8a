"""The nearest orthogonal matrix, nearly: Newton-Schulz iterations of odd polynomials.

For X = U S V^T with singular values at most 1, a step a X + (b X X^T + c (X X^T)^2) X is
U p(S) V^T with p(s) = a s + b s^3 + c s^5: vectors stay, values move towards 1. So only products
of matrices are needed, and a few steps do (Bjorck and Bowie 1971; Jordan et al., "Muon", 2024).

    singular value             0.001   0.01   0.1    0.5    1      from 0.01 to 1
    simple, 5 steps            0.471   0.699  0.712  0.765  0.696  within 0.68 and 1.14
    quintic, 5 steps           0.475   1.018  1.019  0.986  0.978  within 0.97 and 1.04
    polar_express, 5 steps     0.846   1.066  0.874  0.933  1.027  within 0.87 and 1.13
    polar_express, 8 steps     1.000   1.000  1.000  1.000  1.000  1 to 1e-15

Shapes: B matrices [R, C] at once, as experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from megatron_moe.training.optim.squares import squares

Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
}
"""a, b and c of each step, under Megatron-LM's names. `simple`: Jordan's, large at 0 and never
settled. `quintic`: one set for each of five steps (modded-nanogpt, after Cesista). `polar_express`:
the best polynomial for what the steps before have left (Amsel et al., arXiv 2505.16932), each with
the paper's margin for rounding."""
_REPEATED = ("polar_express",)
"""Sets whose last step is repeated; of the others all are, from the first on."""
NORM_FLOOR = 1e-7
"""Least Frobenius norm that a matrix is divided by: that of an expert without tokens is 0."""

Sum = Callable[[Tensor], None]
"""Adds up a tensor over the ranks that split a matrix, in place."""


def coefficients(kind: str, steps: int) -> Iterator[Coefficients]:
    """a, b and c of so many steps."""
    sets = COEFFICIENTS[kind]

    def endless() -> Iterator[Coefficients]:
        yield from sets
        while True:
            yield from sets[-1:] if kind in _REPEATED else sets

    return islice(endless(), steps)


def orthogonalize(
    matrices_BRC: Tensor,
    steps: Iterator[Coefficients],
    *,
    dtype: torch.dtype = torch.float32,
    along: int | None = None,
    total: Sum | None = None,
) -> Tensor:
    """Newton-Schulz of each matrix.

    Args:
        matrices_BRC: fp32; not changed. A matrix of zeros stays one.
        steps: a, b and c of each step.
        dtype: in which products are computed.
        along: the dimension, 1 or 2, over which X X^T (of columns) or X^T X (of rows) is summed;
            `None` takes the longer one, which is cheaper.
        total: of a matrix that ranks split along that dimension, each with a block of it: sums over
            them.

    Returns:
        fp32, [B, R, C].
    """
    _, rows, columns = matrices_BRC.shape
    if along is None:
        along = 1 if rows > columns else 2
    wide = matrices_BRC.mT if along == 1 else matrices_BRC
    norm = squares(matrices_BRC, (1, 2))
    if total is not None:
        total(norm)
    # The Frobenius norm is at least the largest singular value.
    x = (wide / norm.sqrt_().clamp_(min=NORM_FLOOR).float()).to(dtype)
    for a, b, c in steps:
        gram = x @ x.mT
        if total is not None:
            summed = gram.float()
            total(summed)
            gram = summed.to(dtype)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.float()
    return x.mT if along == 1 else x
