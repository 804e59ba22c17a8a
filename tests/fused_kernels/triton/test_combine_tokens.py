"""Combine in Triton against automatic differentiation in fp64."""

from __future__ import annotations

import pytest
import torch

from fused_kernels.reference import combine_tokens as reference
from fused_kernels.triton import combine_tokens
from tests.fused_kernels.triton.cases import CASES, exact, routed

Case = tuple[int, int, int, float]


@pytest.mark.parametrize("hidden", [1, 33, 2100])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_both_passes(device: torch.device, sizes: Case, hidden: int) -> None:
    case = routed(*sizes, device)
    torch.manual_seed(hidden)
    out, grad = torch.randn(sizes[2], hidden), torch.randn(hidden, sizes[0]).t()
    out, grad = out.to(device), grad.to(device)
    choices = (out, case.weights_TK, case.rows_TK, case.kept_TK)
    exact_out, exact_weights = (x.double().requires_grad_() for x in choices[:2])
    y = exact(exact_out, exact_weights, case)
    expected = (y, *torch.autograd.grad(y, (exact_out, exact_weights), grad.double()))
    backward = combine_tokens.backward(grad, *choices, case.source_R)
    found = (combine_tokens.forward(*choices), *backward)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted.detach(), atol=2e-5, rtol=2e-5)
    plain = (reference.forward(*choices), *reference.backward(grad, *choices, case.source_R))
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=2e-5)
    assert not found[1][~case.filled_R].any()
    assert not found[0][~case.kept_TK.any(1)].any()


def test_no_token(device: torch.device) -> None:
    """The gradient of a buffer that no token has a row of is zero."""
    none = torch.zeros(0, 2, dtype=torch.long, device=device)
    out, weights = torch.ones(4, 8, device=device), torch.zeros(0, 2, device=device)
    source = torch.zeros(4, dtype=torch.long, device=device)
    grad = torch.zeros(0, 8, device=device)
    assert combine_tokens.forward(out, weights, none, none.bool()).shape == (0, 8)
    found = combine_tokens.backward(grad, out, weights, none, none.bool(), source)
    assert not found[0].any()
    assert found[1].shape == (0, 2)


def test_what_is_dropped_adds_nothing_even_if_it_is_no_number(device: torch.device) -> None:
    """Neither its row nor its weight counts; the gradient of its weight is zero."""
    out = torch.full((3, 5), torch.inf, device=device)
    out[2] = 1.0
    rows, kept = torch.tensor([[0, 2]], device=device), torch.tensor([[False, True]], device=device)
    weights = torch.tensor([[torch.nan, 2.0]], device=device)
    source = torch.zeros(3, dtype=torch.long, device=device)
    assert torch.equal(combine_tokens.forward(out, weights, rows, kept), 2 * out[2:])
    grads = combine_tokens.backward(out[2:], out, weights, rows, kept, source)
    assert grads[0].tolist() == [[0.0] * 5, [0.0] * 5, [2.0] * 5]
    assert grads[1].tolist() == [[0.0, 5.0]]


def test_a_row_that_names_another_token_than_its_own_is_not_written_twice(
    device: torch.device,
) -> None:
    """Row 1 is of token 1; rows 0 and 2 are empty and name token 1 as well."""
    rows, kept = torch.tensor([[0], [1]], device=device), torch.tensor([[0], [1]], device=device)
    source = torch.tensor([1, 1, 1], device=device)
    out, weights = torch.ones(3, 4, device=device), torch.ones(2, 1, device=device)
    grad = torch.ones(2, 4, device=device)
    found, _ = combine_tokens.backward(grad, out, weights, rows, kept.bool(), source)
    assert found.sum(1).tolist() == [0.0, 4.0, 0.0]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_bfloat16_is_rounded_once_and_weights_get_gradients_in_fp32(sizes: Case) -> None:
    device = torch.device("cuda")
    case = routed(*sizes, device)
    out = torch.randn(sizes[2], 520, device=device).bfloat16()
    grad = torch.randn(sizes[0], 520, device=device).bfloat16()
    choices = (out, case.weights_TK, case.rows_TK, case.kept_TK)
    exact_out, exact_weights = (x.double().requires_grad_() for x in choices[:2])
    y = exact(exact_out, exact_weights, case)
    expected = (y, *torch.autograd.grad(y, (exact_out, exact_weights), grad.double()))
    backward = combine_tokens.backward(grad, *choices, case.source_R)
    for value, wanted in zip((combine_tokens.forward(*choices), *backward), expected, strict=True):
        unit = 2**-7 if value.dtype == torch.bfloat16 else 1e-5
        allowed = 0.502 * unit * wanted.abs() + 1e-5 * wanted.abs().max()
        assert ((value.double() - wanted).abs() <= allowed).all()
    assert backward[1].dtype == torch.float32
