"""The bytes in the table of kernels are those that they move, counted in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from fused_kernels.triton.cases import CASES
from fused_kernels.triton.sizes import Case, Size

SIZE = Size(
    tokens=12,
    topk=2,
    experts=4,
    groups=2,
    slots=5,
    hidden=48,
    ffn=40,
    heads=3,
    head_dim=8,
    columns=70,
    chunk=6,
    dtype=torch.float32,
)
"""R = 40 rows, of which 24 are filled."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each load and store of the interpreter, masked ones left out."""
    moved: list[int] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size_of(pointer: Any, mask: Any) -> int:
        return int(np.sum(mask.data)) * pointer.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointer: Any, mask: Any, *others: Any) -> Any:
        moved.append(size_of(pointer, mask))
        return load(self, pointer, mask, *others)

    def counted_store(self: Any, pointer: Any, value: Any, mask: Any, *others: Any) -> Any:
        moved.append(size_of(pointer, mask))
        return store(self, pointer, value, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return moved


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes(counted: list[int], case: Case) -> None:
    run = case.run(SIZE, torch.device("cpu"))
    run()
    assert sum(counted) == case.moved(SIZE)
    assert case.least(SIZE) <= case.moved(SIZE)
