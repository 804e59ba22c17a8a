"""Newton-Schulz iterations against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_moe.training.optim.orthogonalize import COEFFICIENTS, coefficients, orthogonalize


def with_values(values: list[float], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and the nearest orthogonal one; fp64."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator).double())
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator).double())
    return left @ torch.tensor(values).double().diag() @ right.T, left @ right.T


VALUES = [0.02, 0.1, 0.3, 0.6, 1.0]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (5, 5), (5, 40)])
def test_enough_steps_give_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    """U V^T of the decomposition, in products of fp32, whatever the norm."""
    matrix, nearest = with_values(VALUES, *shape)
    for norm in (1e-6, 1.0, 1e6):
        found = orthogonalize(
            (norm * matrix).float().unsqueeze(0), coefficients("polar_express", 10)
        )
        torch.testing.assert_close(found[0].double(), nearest, rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("simple", 0.68, 1.14), ("quintic", 0.97, 1.04), ("polar_express", 0.87, 1.13)],
)
def test_five_steps_bring_all_values_near_one(kind: str, low: float, high: float) -> None:
    """Values from 0.01 of the norm on, in the stated range, with the singular vectors kept."""
    matrix, _ = with_values(VALUES, 30, 40)
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    found = orthogonalize(matrix.float().unsqueeze(0), coefficients(kind, 5))[0].double()
    inside = left.T @ found @ right.T
    assert values[4] > 0.01
    moved = inside.diagonal()[:5]
    assert low < moved.min()
    assert moved.max() < high
    torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(COEFFICIENTS))
def test_a_step_is_its_polynomial_of_each_singular_value(kind: str) -> None:
    matrix, _ = with_values(VALUES, 9, 5)
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for steps in (1, 3, 7):
        expected = values.clone()
        for a, b, c in coefficients(kind, steps):
            expected = a * expected + b * expected**3 + c * expected**5
        found = orthogonalize(matrix.float().unsqueeze(0), coefficients(kind, steps))[0]
        torch.testing.assert_close(
            found.double(), left @ expected.diag() @ right, rtol=1e-4, atol=1e-5
        )


def test_sets_repeat_as_a_whole_or_by_their_last_step() -> None:
    sets = COEFFICIENTS["quintic"]
    assert list(coefficients("quintic", 7)) == [*sets, *sets[:2]]
    assert list(coefficients("polar_express", 9)) == [
        *COEFFICIENTS["polar_express"],
        COEFFICIENTS["polar_express"][-1],
    ]


def test_matrices_of_a_stack_do_not_see_each_other() -> None:
    """One of zeros, as that of an expert without tokens, stays one."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 6, 4, generator=generator)
    stack[1] = 0
    stack[2] *= 1e4
    found = orthogonalize(stack, coefficients("quintic", 5))
    assert found[1].count_nonzero() == 0
    for number in (0, 2):
        alone = orthogonalize(stack[number : number + 1], coefficients("quintic", 5))
        torch.testing.assert_close(found[number], alone[0], rtol=1e-5, atol=1e-6)


def test_half_precision_is_near() -> None:
    matrix, nearest = with_values(VALUES, 5, 40)
    found = orthogonalize(
        matrix.float().unsqueeze(0), coefficients("polar_express", 8), dtype=torch.bfloat16
    )
    assert found.dtype == torch.float32
    assert (found[0].double() - nearest).norm() / nearest.norm() < 0.02


def test_either_side_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(2, 6, 4, generator=generator)
    sides = [orthogonalize(stack, coefficients("simple", 5), along=along) for along in (1, 2)]
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-4, atol=1e-5)
