"""Dispatch and combine kernels against plain indexing, with dropped choices and empty rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_kernels.reference import _blocks, combine_tokens, dispatch_tokens


@pytest.fixture
def case() -> dict[str, Tensor]:
    """Four tokens, two choices, seven rows; token 2 dropped twice, token 3 once, row 5 empty."""
    rows = torch.tensor([[3, 0], [1, 4], [0, 0], [6, 0]])
    kept = torch.tensor([[True, True], [True, True], [False, False], [True, False]])
    source = torch.tensor([0, 1, 0, 0, 1, 0, 3])
    torch.manual_seed(0)
    return {
        "x": torch.randn(4, 5, dtype=torch.float64),
        "weights": torch.rand(4, 2, dtype=torch.float64),
        "rows": rows,
        "kept": kept,
        "source": source,
    }


def plain_combine(out: Tensor, case: dict[str, Tensor], weights: Tensor) -> Tensor:
    tokens = []
    for t in range(4):
        total = torch.zeros(5, dtype=torch.float64)
        for k in range(2):
            if case["kept"][t, k]:
                total = total + weights[t, k] * out[case["rows"][t, k]]
        tokens.append(total)
    return torch.stack(tokens)


def test_dispatch_copies_tokens_and_sums_their_gradients(case: dict[str, Tensor]) -> None:
    x = case["x"].requires_grad_()
    buffer = dispatch_tokens.forward(x, case["source"])
    filled = [0, 1, 3, 4, 6]
    torch.testing.assert_close(buffer[filled], x[case["source"][filled]])
    grad = torch.randn(7, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(buffer[filled], x, grad[filled])
    torch.testing.assert_close(dispatch_tokens.backward(grad, case["rows"], case["kept"]), expected)


def test_combine_and_its_two_gradients(case: dict[str, Tensor]) -> None:
    out = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = case["weights"].requires_grad_()
    arguments = (out.detach(), weights.detach(), case["rows"], case["kept"])
    expected = plain_combine(out, case, weights)
    y = combine_tokens.forward(*arguments)
    torch.testing.assert_close(y, expected.detach())
    assert torch.equal(y[2], torch.zeros(5, dtype=torch.float64))
    grad = torch.randn(4, 5, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, (out, weights), grad)
    grads = combine_tokens.backward(grad, *arguments, case["source"])
    torch.testing.assert_close(grads, expected_grads)
    assert torch.equal(grads[0][[2, 5]], torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("block", [1 << 17, 2000])
def test_combine_sums_the_gradient_of_its_weights_in_their_dtype(
    case: dict[str, Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1001 products of ones: bfloat16, which has 8 bits, cannot hold their sum."""
    monkeypatch.setattr(_blocks, "CACHED_ELEMENTS", block)
    out, grad = torch.ones(7, 1001, dtype=torch.bfloat16), torch.ones(4, 1001, dtype=torch.bfloat16)
    out[3] = 2.0
    weights, rows, kept = case["weights"].float(), case["rows"], case["kept"]
    grad_out, grad_weights = combine_tokens.backward(grad, out, weights, rows, kept, case["source"])
    assert grad_weights.dtype == torch.float32
    torch.testing.assert_close(
        grad_weights, torch.tensor([[2002.0, 1001.0], [1001.0, 1001.0], [0.0, 0.0], [1001.0, 0.0]])
    )
    expected = torch.zeros(7, 1001, dtype=torch.bfloat16)
    for t, k in kept.nonzero().tolist():
        expected[rows[t, k]] = weights[t, k].to(torch.bfloat16)
    torch.testing.assert_close(grad_out, expected)
