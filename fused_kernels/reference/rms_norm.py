"""T5's RMSNorm: x / r * weight with r = sqrt(mean(x^2) + eps), over the last dimension.

Nine passes over the activations; autograd through PyTorch's operations takes twenty, and keeps an
fp32 copy of x. With u = x / r and g = weight * dy: dx = (g - u mean(g u)) / r and dweight = the sum
over rows of dy u.

Shapes: any, then W; rows are all dimensions but the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST: int | None = None
"""Rows may have any length."""


def forward(x: Tensor, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise, in at least fp32.

    Args:
        x: [..., W].
        weight_W: the scale.
        eps: added to the mean square.

    Returns:
        The result, [..., W], and 1 / r, [..., 1] in the dtype of the computation, for `backward`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse = mean_square.div_(x.shape[-1]).add_(eps).rsqrt_()
    # Cast before scaling, as T5 does: bf16 results depend on the order.
    normalised = (wide * inverse).to(x.dtype)
    result = normalised.mul_(weight_W) if weight_W.dtype == x.dtype else normalised * weight_W
    return result, inverse


def backward(grad: Tensor, x: Tensor, weight_W: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale.

    Args:
        grad: of the result.
        x: as in `forward`.
        weight_W: as in `forward`.
        inverse: the second result of `forward`.
    """
    width = x.shape[-1]
    unit = (x.to(inverse.dtype) * inverse).reshape(-1, width)
    wide_grad = grad.to(inverse.dtype).reshape(-1, width)
    wide_weight = weight_W.to(inverse.dtype)
    product = wide_grad * unit
    mean = product.mv(wide_weight).div_(-width).unsqueeze(1)
    grad_x = (wide_grad * wide_weight).addcmul_(unit, mean).mul_(inverse.reshape(-1, 1))
    return grad_x.view_as(x).to(x.dtype), product.sum(0).to(weight_W.dtype)
