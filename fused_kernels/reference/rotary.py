"""Rotary position embedding: each pair (x_i, x_{i+D/2}) of a head turned by its angle, in fp32.

Source: Su et al., RoFormer (arXiv 2104.09864), eq. 15, half-split as in GPT-NeoX.

Shapes: S tokens of a row, B rows, N heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate; the result has the dtype of ``x_SBND``.

    Args:
        x_SBND: queries or keys.
        cos: [S, D/2], the same for all rows, or [S, B, D/2]; its dtype is that of the computation.
        sin: likewise.
    """
    return _rotated(x_SBND, cos, sin, 1)


def backward(grad_SBND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x: that of the result, rotated back."""
    return _rotated(grad_SBND, cos, sin, -1)


def _rotated(x_SBND: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotated by ``sign`` times the angle, in three passes."""
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos[:, :, None], sin[:, :, None]
    cos = torch.cat((cos, cos), -1)
    x = x_SBND.to(cos.dtype)
    first, second = x.chunk(2, dim=-1)
    rotated = x * cos
    new_first, new_second = rotated.chunk(2, dim=-1)
    new_first.addcmul_(second, sin, value=-sign)
    new_second.addcmul_(first, sin, value=sign)
    return rotated.to(x_SBND.dtype)
