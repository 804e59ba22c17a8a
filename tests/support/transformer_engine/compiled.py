"""What Transformer Engine's layers call of their compiled extension, in torch.

The names and the order of arguments are those of Transformer Engine 2.11.0; all public functions of
this module become members of `transformer_engine_torch`. Products are computed in fp32, or in the
type of wider operands, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def get_num_cublas_streams() -> int:
    return 1


def get_cudnn_version() -> int:
    return 92000


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    **overlap: Any,
) -> tuple[Tensor, None, None, None]:
    """B times A, each transposed if it says so: operands are in the order of column-major BLAS."""
    assert quantizer is None and not gelu and (bias is None or not bias.numel())
    product = _product(A, transa, B, transb)
    if out is not None:
        _store(out, product.view_as(out), accumulate)
        return out, None, None, None
    result = product.to(_dtype(out_dtype, B))
    if not transb:
        result = result.view(*B.shape[:-1], -1)
    return result, None, None, None


def te_general_grouped_gemm(
    A: Sequence[Any],
    transa: bool,
    B: Sequence[Any],
    transb: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    m_splits: Sequence[int],
    bias: Any,
    bias_dtype: Any,
    single_output: bool,
    pre_gelu: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Any:
    """One product for each pair of operands; into parts of one tensor, or each into its own."""
    assert not single_output or sum(m_splits) == out[0].shape[0]
    targets = out[0].split(list(m_splits)) if single_output else out
    for a, b, target in zip(A, B, targets, strict=True):
        if getattr(a, "custom", False):
            product = _custom_product(a, b, transa, transb, grad, target.dtype)
        else:
            product = _product(a, transa, b, transb)
        _store(target, product, accumulate)
    return bias


def split_quantize(tensor: Tensor, sizes: Sequence[int], quantizers: Sequence[Any]) -> list[Any]:
    """Each part by its own quantizer."""
    return [q.quantize(part) for q, part in zip(quantizers, tensor.split(sizes), strict=True)]


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    tensors: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), in place."""
    assert mode == 1 and bias_correction == 1
    for grad, param, first, second in zip(*tensors, strict=True):
        first.lerp_(grad.float(), 1 - beta1)
        second.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
        scale = (second / (1 - beta2**step)).sqrt_().add_(eps)
        param.mul_(1 - lr * weight_decay)
        param.addcdiv_(first, scale, value=-lr / (1 - beta1**step))


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, [1]; no norm of each."""
    assert not per_tensor
    norms = torch.stack([tensor.float().norm() for tensor in tensors[0]])
    return norms.norm().view(1), norms.new_empty(0)


def multi_tensor_scale(
    chunk_size: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Each second tensor becomes ``scale`` times the first."""
    for source, target in zip(*tensors, strict=True):
        target.copy_(source * scale)


def _product(A: Tensor, transa: bool, B: Tensor, transb: bool) -> Tensor:
    a, b = A.reshape(-1, A.shape[-1]), B.reshape(-1, B.shape[-1])
    wide = torch.promote_types(b.dtype, torch.float32)
    left, right = (b.t() if transb else b), (a.t() if transa else a)
    return left.to(wide) @ right.to(wide)


def _custom_product(a: Any, b: Any, transa: bool, transb: bool, grad: bool, dtype: Any) -> Tensor:
    """Of tensors quantized by a custom recipe, as Transformer Engine's single GEMM computes it.

    Its grouped GEMM has no branch for them.
    """
    from transformer_engine.pytorch.custom_recipes.gemm import custom_gemm

    layout = ("T" if transa else "N") + ("T" if transb else "N")
    product: Tensor = custom_gemm(a, b, None, dtype, layout=layout, grad=grad)[0]
    return product


def _store(target: Tensor, product: Tensor, accumulate: bool) -> None:
    target.copy_(target.to(product.dtype) + product if accumulate else product)


def _dtype(named: Any, like: Tensor) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType

    if named is None:
        return like.dtype
    (found,) = [dtype for dtype, name in TE_DType.items() if name == named]
    return found
