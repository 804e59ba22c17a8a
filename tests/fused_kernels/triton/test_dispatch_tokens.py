"""Dispatch in Triton: an exact copy, and a gradient that equals automatic differentiation's."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.reference import dispatch_tokens as reference
from fused_kernels.triton import dispatch_tokens
from tests.fused_kernels.triton.cases import CASES, exact, routed

Case = tuple[int, int, int, float]


@pytest.mark.parametrize("hidden", [1, 33, 2100])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_both_passes(device: torch.device, sizes: Case, hidden: int) -> None:
    """Values are those of the reference bit for bit; gradients those of fp64."""
    case = routed(*sizes, device)
    torch.manual_seed(hidden)
    x = torch.randn(hidden, sizes[0]).t().to(device)
    found = dispatch_tokens.forward(x, case.source_R)
    assert torch.equal(found, reference.forward(x, case.source_R))
    grad = torch.randn(sizes[2], hidden).to(device)
    ones = torch.ones_like(case.weights_TK, dtype=torch.float64)
    expected = exact(grad.double(), ones, case)
    summed = dispatch_tokens.backward(grad, case.rows_TK, case.kept_TK)
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("hidden", [3, 2100])
def test_a_row_of_no_token_is_zero(device: torch.device, hidden: int) -> None:
    """It reads nothing: the row before the first token is not there."""
    x = torch.full((2, hidden), torch.nan, device=device)
    x[1] = 2.0
    found = dispatch_tokens.forward(x, torch.tensor([-1, 1, -1], device=device))
    assert found.tolist() == [[0.0] * hidden, [2.0] * hidden, [0.0] * hidden]


def test_no_token_and_no_row(device: torch.device) -> None:
    none = torch.zeros(0, 2, dtype=torch.long, device=device)
    x = torch.zeros(0, 8, device=device)
    assert dispatch_tokens.forward(x, none[:, 0]).shape == (0, 8)
    summed = dispatch_tokens.backward(torch.ones(4, 8, device=device), none, none.bool())
    assert summed.shape == (0, 8)


def test_what_is_dropped_adds_nothing_even_if_it_is_no_number(device: torch.device) -> None:
    """Row 0 is named by dropped choices alone."""
    grad = torch.full((3, 5), torch.nan, device=device)
    grad[2] = 1.0
    rows, kept = torch.tensor([[0, 2]], device=device), torch.tensor([[False, True]], device=device)
    assert torch.equal(dispatch_tokens.backward(grad, rows, kept), grad[2:])


def test_operands_that_do_not_fit_are_rejected(device: torch.device) -> None:
    x, source = torch.zeros(4, 8, device=device), torch.zeros(3, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"expected torch\.int64 \(3,\), found torch\.int32"):
        dispatch_tokens.forward(x, source.int())
    with pytest.raises(TypeError, match="use the reference kernels"):
        dispatch_tokens.forward(x.int(), source)
    with pytest.raises(ValueError, match=r"expected torch\.bool \(4, 2\)"):
        dispatch_tokens.backward(x, source.new_zeros(4, 2), torch.zeros(4, 1).bool())


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_bfloat16_is_rounded_once(sizes: Case) -> None:
    device = torch.device("cuda")
    case = routed(*sizes, device)
    grad = torch.randn(sizes[2], 520, device=device).bfloat16()
    ones = torch.ones_like(case.weights_TK, dtype=torch.float64)
    expected = exact(grad.double(), ones, case)
    found = dispatch_tokens.backward(grad, case.rows_TK, case.kept_TK).double()
    assert ((found - expected).abs() <= 0.502 * 2**-7 * expected.abs() + 1e-6).all()
