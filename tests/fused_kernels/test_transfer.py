"""Dispatch and combine kernels against plain indexing, with dropped choices and empty rows."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_kernels import row_blocks, select


@pytest.fixture
def combine(implementation: str) -> ModuleType:
    return select("combine_tokens", implementation).module


@pytest.fixture
def dispatch(implementation: str) -> ModuleType:
    return select("dispatch_tokens", implementation).module


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


def plain_combine(out: Tensor, weights: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
    return ((weights * kept).unsqueeze(2) * out[rows]).sum(1)


def test_dispatch_copies_tokens_and_sums_their_gradients(
    dispatch: ModuleType, case: dict[str, Tensor]
) -> None:
    x = case["x"].requires_grad_()
    buffer = x[case["source"]]
    filled = [0, 1, 3, 4, 6]
    found = dispatch.forward(x.detach(), case["source"])
    torch.testing.assert_close(found[filled], buffer[filled].detach())
    grad = torch.randn(7, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(buffer[filled], x, grad[filled])
    torch.testing.assert_close(dispatch.backward(grad, case["rows"], case["kept"]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_of_no_token_is_zero(
    dispatch: ModuleType, case: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Whatever token 0 holds."""
    x = case["x"].to(dtype)
    x[0] = torch.nan
    found = dispatch.forward(x, torch.tensor([-1, 1, 3, -1]))
    assert torch.equal(found[1:3], x[[1, 3]])
    assert found[[0, 3]].eq(0).all()


def test_combine_and_its_two_gradients(combine: ModuleType, case: dict[str, Tensor]) -> None:
    out = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights = case["weights"].requires_grad_()
    arguments = (out.detach(), weights.detach(), case["rows"], case["kept"])
    expected = plain_combine(out, weights, case["rows"], case["kept"])
    y = combine.forward(*arguments)
    torch.testing.assert_close(y, expected.detach())
    assert torch.equal(y[2], torch.zeros(5, dtype=torch.float64))
    grad = torch.randn(4, 5, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, (out, weights), grad)
    grads = combine.backward(grad, *arguments, case["source"])
    torch.testing.assert_close(grads, expected_grads)
    assert torch.equal(grads[0][[2, 5]], torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [1, 513, 1300])
@pytest.mark.parametrize("topk", [1, 3])
def test_at_random(
    dispatch: ModuleType, combine: ModuleType, topk: int, hidden: int, dtype: torch.dtype
) -> None:
    """Any number of choices, any width, nothing contiguous but the rows, against fp64."""
    torch.manual_seed(hidden)
    tokens, buffer_rows = 50, 50 * topk + 9
    rows = torch.randperm(buffer_rows)[: tokens * topk].view(topk, tokens).t()
    kept = torch.rand(topk, tokens).t() < 0.7
    rows = rows * kept
    source = torch.zeros(buffer_rows, dtype=torch.long)
    token_of = torch.arange(tokens).unsqueeze(1).expand(-1, topk)
    source[rows[kept]] = token_of[kept]
    filled = torch.zeros(buffer_rows, dtype=torch.bool)
    filled[rows[kept]] = True
    weights = torch.rand(topk, tokens).t()
    out, grad = torch.randn(buffer_rows, hidden).to(dtype), torch.randn(hidden, tokens).to(dtype)
    exact_out, exact_weights = (x.double().requires_grad_() for x in (out, weights))
    y = plain_combine(exact_out, exact_weights, rows, kept)
    exact = y, *torch.autograd.grad(y, (exact_out, exact_weights), grad.t().double())
    found = (
        combine.forward(out, weights, rows, kept),
        *combine.backward(grad.t(), out, weights, rows, kept, source),
    )
    tolerances = [2e-2, 2e-2, 1e-2] if dtype == torch.bfloat16 else [1e-5, 1e-6, 1e-5]
    for value, expected, share in zip(found, exact, tolerances, strict=True):
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(
            value.double(), expected.detach(), atol=share * largest, rtol=share
        )
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32]
    assert not found[1][~filled].any()
    tokens_TH = grad.t()
    assert torch.equal(dispatch.forward(tokens_TH, source), tokens_TH[source])
    summed = plain_combine(out.double(), torch.ones(tokens, topk), rows, kept)
    torch.testing.assert_close(
        dispatch.backward(out, rows, kept).double(), summed, atol=tolerances[0], rtol=tolerances[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_without_a_kept_choice_may_hold_anything(
    dispatch: ModuleType, combine: ModuleType, case: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Rows 2 and 5, and row 0 once token 0 loses its second choice: what is dropped names it."""
    kept, rows, weights = case["kept"].clone(), case["rows"], case["weights"].float()
    kept[0, 1] = False
    clean, grad = torch.randn(7, 5).to(dtype), torch.randn(4, 5).to(dtype)
    spoiled = clean.clone()
    spoiled[[0, 2]], spoiled[5] = torch.inf, torch.nan
    found, expected = (
        (
            combine.forward(out, weights, rows, kept),
            *combine.backward(grad, out, weights, rows, kept, case["source"]),
            dispatch.backward(out, rows, kept),
        )
        for out in (spoiled, clean)
    )
    for value, same in zip(found, expected, strict=True):
        assert torch.equal(value, same)
    assert not found[0][2].any(), "token 2 lost both choices"


@pytest.mark.parametrize("block", [1 << 17, 2000])
def test_combine_sums_the_gradient_of_its_weights_in_their_dtype(
    combine: ModuleType, case: dict[str, Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1001 products of ones: bfloat16, which has 8 bits, cannot hold their sum."""
    monkeypatch.setattr(row_blocks, "CACHED_ELEMENTS", block)
    out, grad = torch.ones(7, 1001, dtype=torch.bfloat16), torch.ones(4, 1001, dtype=torch.bfloat16)
    out[3] = 2.0
    weights, rows, kept = case["weights"].float(), case["rows"], case["kept"]
    grad_out, grad_weights = combine.backward(grad, out, weights, rows, kept, case["source"])
    assert grad_weights.dtype == torch.float32
    torch.testing.assert_close(
        grad_weights, torch.tensor([[2002.0, 1001.0], [1001.0, 1001.0], [0.0, 0.0], [1001.0, 0.0]])
    )
    expected = torch.zeros(7, 1001, dtype=torch.bfloat16)
    for t, k in kept.nonzero().tolist():
        expected[rows[t, k]] = weights[t, k].to(torch.bfloat16)
    torch.testing.assert_close(grad_out, expected)


def test_what_is_no_number_stays_none(combine: ModuleType, case: dict[str, Tensor]) -> None:
    """Whatever its bits, also where they round up to those of minus zero."""
    weights = torch.full((4, 2), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        y = combine.forward(torch.ones(7, 5, dtype=dtype), weights, case["rows"], case["kept"])
        assert y[case["kept"].any(1)].isnan().all()


@pytest.mark.parametrize("bad", [7, -1])
def test_an_index_outside_of_the_buffer_is_rejected(
    dispatch: ModuleType, combine: ModuleType, case: dict[str, Tensor], bad: int
) -> None:
    """Memory of others is neither read nor written."""
    rows, kept, weights = case["rows"].clone(), case["kept"], case["weights"]
    rows[1, 1] = bad
    out, grad = torch.zeros(7, 5, dtype=torch.float64), case["x"]
    source = case["source"].clone()
    source[2] = 4 if bad > 0 else -2  # -1 is no token
    with pytest.raises((IndexError, RuntimeError)):
        combine.forward(out, weights, rows, kept)
    with pytest.raises((IndexError, RuntimeError)):
        combine.backward(grad, out, weights, rows, kept, source)
    with pytest.raises((IndexError, RuntimeError)):
        dispatch.backward(out, rows, kept)
    with pytest.raises((IndexError, RuntimeError)):
        dispatch.forward(grad, source)
