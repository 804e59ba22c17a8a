"""Rotary core attention against the definition written out in fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kernels.autograd import rotary
from fused_kernels.reference import rotary as reference
from megatron_moe.platform import activate
from tests.support.saved import saved_bytes

activate()

from megatron_moe.model.attention import (  # noqa: E402
    RotaryCoreAttention,
    documents_of,
    rotary_table,
)


def core(scale: float | None, dim: int = 6, **changes: Any) -> RotaryCoreAttention:
    config = SimpleNamespace(
        kv_channels=dim,
        sequence_parallel=False,
        attention_dropout=0.0,
        rotary_base=100.0,
        **changes,
    )
    return RotaryCoreAttention(config, softmax_scale=scale)  # type: ignore[arg-type]


def by_hand(q: Tensor, k: Tensor, v: Tensor, base: float, scale: float) -> Tensor:
    """[S, D] each, one head: every pair turned as a complex number, every sum written out."""
    length, dim = q.shape
    half = dim // 2

    def turn(x: Tensor) -> Tensor:
        pairs = torch.complex(x[:, :half], x[:, half:])
        angle = torch.tensor(
            [[p * base ** (-2 * i / dim) for i in range(half)] for p in range(length)],
            dtype=torch.float64,
        )
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), dim=1)

    q, k = turn(q), turn(k)
    rows = []
    for s in range(length):
        weight = torch.tensor([math.exp(scale * float(q[s] @ k[t])) for t in range(s + 1)])
        weight = weight.double() / weight.double().sum()
        rows.append(sum(weight[t] * v[t] for t in range(s + 1)))
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, None])
def test_equals_the_definition(scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 3, 6, dtype=torch.float64) for _ in range(3))
    found = core(scale)(q, k, v).view(5, 2, 3, 6)
    used = 1.0 if scale is not None else 1 / math.sqrt(6)
    for b in range(2):
        for n in range(3):
            expected = by_hand(q[:, b, n], k[:, b, n], v[:, b, n], 100.0, used)
            torch.testing.assert_close(found[:, b, n], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("mask", [False, True])
def test_consecutive_queries_share_a_key_head(groups: int, mask: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    k, v = (torch.randn(5, 2, groups, 6, dtype=torch.float64) for _ in range(2))
    documents = documents_of(None, torch.zeros(2, 5, dtype=torch.int64)) if mask else None
    found = core(None)(q, k, v, packed_seq_params=documents).view(5, 2, 6, 6)
    for b in range(2):
        for n in range(6):
            shared = n * groups // 6
            keys, values = k[:, b, shared], v[:, b, shared]
            expected = by_hand(q[:, b, n], keys, values, 100.0, 1 / math.sqrt(6))
            torch.testing.assert_close(found[:, b, n], expected, rtol=1e-6, atol=1e-6)


def test_rotation_of_bf16_uses_fp32_angles() -> None:
    """bf16 sines at position 1000 would be off by more than the rounding of the result."""
    x = torch.ones(1001, 1, 1, 64, dtype=torch.bfloat16)
    cos, sin = rotary_table(1001, 64, 1e4, torch.device("cpu"), torch.float32)
    exact_cos, exact_sin = rotary_table(1001, 64, 1e4, torch.device("cpu"), torch.float64)
    found = rotary(x, cos, sin, reference).double()
    exact = rotary(x.double(), exact_cos, exact_sin, reference)
    assert (found - exact).abs().max() < 2**-7
    assert rotary(x, cos, sin, reference).dtype == torch.bfloat16


def test_depends_on_relative_position_only() -> None:
    cos, sin = rotary_table(9, 8, 1e4, torch.device("cpu"), torch.float64)
    torch.manual_seed(1)
    q = torch.randn(8, dtype=torch.float64).expand(9, 1, 1, 8)
    k = torch.randn(8, dtype=torch.float64).expand(9, 1, 1, 8)
    scores = rotary(q, cos, sin, reference)[:, 0, 0] @ rotary(k, cos, sin, reference)[:, 0, 0].t()
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_documents_by_hand() -> None:
    """Each document as if it were alone; the last row is one document."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 1, 6, dtype=torch.float64) for _ in range(3))
    lengths = ((3, 1, 3), (7,))
    numbers = [[i for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    places = [[p for n in row for p in range(n)] for row in lengths]
    documents = documents_of(torch.tensor(places), torch.tensor(numbers))
    found = core(1.0)(q, k, v, packed_seq_params=documents)
    for b, row in enumerate(lengths):
        start = 0
        for length in row:
            part = slice(start, start + length)
            expected = by_hand(q[part, b, 0], k[part, b, 0], v[part, b, 0], 100.0, 1.0)
            torch.testing.assert_close(found[part, b], expected, rtol=1e-6, atol=1e-6)
            start += length


def test_rows_that_are_one_take_the_plain_path() -> None:
    assert documents_of(None, None) is None
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 1, 6) for _ in range(3))
    one = documents_of(torch.arange(7).expand(2, 7), torch.zeros(2, 7, dtype=torch.int64))
    plain = core(1.0)(q, k, v)
    torch.testing.assert_close(core(1.0)(q, k, v, packed_seq_params=one), plain)


def test_layers_share_one_mask() -> None:
    documents = documents_of(None, torch.tensor([[0, 0, 1]]))
    assert documents is not None
    mask = documents.bias(torch.bfloat16)
    assert mask is not None
    assert documents.bias(torch.bfloat16) is mask
    assert (mask.dtype, mask.shape) == (torch.bfloat16, (1, 1, 3, 3))
    inf = torch.inf
    assert mask[0, 0].tolist() == [[0, -inf, -inf], [0, 0, -inf], [-inf, -inf, 0]]


def test_rejects_what_it_would_ignore() -> None:
    x = torch.randn(3, 1, 1, 6)
    with pytest.raises(ValueError, match="causal"):
        core(1.0)(x, x, x, attention_mask=torch.ones(3, 3))


def test_gradient_of_the_rotation_turns_back() -> None:
    cos, sin = rotary_table(5, 6, 1e4, torch.device("cpu"), torch.float64)
    x = torch.randn(5, 2, 3, 18, dtype=torch.float64, requires_grad=True)
    # A part of a wider tensor, as Megatron-Core passes queries and keys.
    assert torch.autograd.gradcheck(lambda y: rotary(y[..., 6:12], cos, sin, reference), (x,))


@pytest.mark.parametrize("groups", [4, 2])
def test_the_backward_pass_does_not_keep_the_fused_projection(groups: int) -> None:
    """Rotated queries and keys, values, the result and its logarithms: 4 N D + N numbers a token.

    As a view the values would keep queries and keys that have not been rotated as well.
    """
    length, batch, heads, dim = 32, 2, 4, 16
    attend = core(None, dim)
    fused = torch.randn(length, batch, groups, (heads // groups + 2) * dim, requires_grad=True)

    def run() -> Tensor:
        query, key, value = fused.split([heads // groups * dim, dim, dim], dim=-1)
        return attend(query.reshape(length, batch, heads, dim), key, value)

    run()  # The table of angles.
    angles = 2 * length * dim // 2
    assert saved_bytes(run) == 4 * (length * batch * heads * (4 * dim + 1) + angles)


def test_values_of_a_view_give_the_results_of_a_copy_bit_for_bit() -> None:
    """So that what is kept is all that has changed."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 2, 4, 16)
    fused = torch.randn(50, 2, 4, 48)
    view = [x.permute(1, 2, 0, 3) for x in (q, k, fused[..., 16:32])]
    copy = [*view[:2], fused[..., 16:32].contiguous().permute(1, 2, 0, 3)]
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(*view, is_causal=True), attend(*copy, is_causal=True))
