"""The comparison of FP8 recipes: what it counts, its intervals and its tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.experiments import fp8_recipes
from examples.experiments.bf16_products import Bf16Products
from examples.experiments.fp8_recipes import Interval, agreement


def test_agreement_by_hand() -> None:
    """Of six choices four are the other's as well, whatever their order."""
    one = np.array([[0, 1], [2, 3], [4, 5]])
    other = np.array([[1, 0], [2, 4], [5, 6]])
    assert agreement(one, other) == pytest.approx(4 / 6)


def test_interval_by_hand() -> None:
    """Mean 2, standard error 1 / sqrt(3), t = 4.30265 with two degrees of freedom."""
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert found.text(2) == "+2.00 ± 2.48"
    assert Interval.of([1.9, 2.0, 2.1]).text(1) == "**+2.0 ± 0.2**"


def test_rows_need_three_seeds_with_their_noise() -> None:
    def run(loss: float, agreed: float) -> dict[str, float]:
        return {"loss": loss, "dropped": 0.25, "agreement": agreed}

    noise, arm = fp8_recipes.NOISE["evaluated"], "mxfp8, e4m3"
    seeds = {str(n): {noise: run(5.0, 0.99), arm: run(5.0 + n, 0.9)} for n in (1, 2, 3)}
    trained = {seed: {"bf16": run(5.0, 1.0)} for seed in seeds}
    content = {"trained": trained, "evaluated": seeds}
    (row,) = (
        line for line in fp8_recipes.table(content).splitlines() if line.startswith("| mxfp8")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["3", "7.0000", "+2.0000 ± 2.4841"]
    assert cells[4:] == ["25.00", "+0.00 ± 0.00", "90.00", "**-9.00 ± 0.00**"]
    del seeds["3"][noise]
    assert "| mxfp8" not in fp8_recipes.table(content)


def test_products_of_bf16_are_rounded_once() -> None:
    a, b = torch.randn(3, 5, 700).bfloat16(), torch.randn(3, 700, 4).bfloat16()
    exact = (a.float() @ b.float()).bfloat16()
    out = torch.empty_like(exact)
    with Bf16Products():
        assert torch.equal(a @ b, exact)
        torch.bmm(a, b, out=out)
        assert torch.equal((a[0] @ b[0]).float(), (a[0].float() @ b[0].float()).bfloat16().float())
        assert (a.float() @ b.float()).dtype == torch.float32
    assert torch.equal(out, exact)
