"""The registry takes a name literally, refuses what is not there, and says what it chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_kernels import KernelUnavailable, registry, select, select_all


@pytest.mark.parametrize("operation", registry.OPERATIONS)
def test_auto_says_what_it_took_and_why(operation: str) -> None:
    kernel = select(operation)
    assert kernel.implementation == "reference"
    assert kernel.reason == "auto: first of reference on cpu"
    assert callable(kernel.module.forward)


def test_an_unknown_implementation_is_refused_by_name_with_what_there_is() -> None:
    with pytest.raises(KernelUnavailable, match="'triton' is not available: use auto or reference"):
        select("gated_silu", "triton", "cuda")


def test_an_implementation_for_other_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "reference", frozenset({"cuda"}))
    assert select("gated_silu", "reference", "cuda").reason == "as asked"
    with pytest.raises(KernelUnavailable):
        select("gated_silu", "reference", "cpu")


def test_a_folder_that_lacks_an_operation_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import fused_kernels

    (tmp_path / "faster").mkdir()
    (tmp_path / "faster" / "__init__.py").touch()
    (tmp_path / "faster" / "combine_tokens.py").write_text("def forward(): ...\n")
    monkeypatch.setattr(fused_kernels, "__path__", [*fused_kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", {"faster": None, **registry.IMPLEMENTATIONS})
    assert select("combine_tokens").implementation == "faster"
    assert select("gated_silu").implementation == "reference"


def test_an_unknown_operation_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="expected one of combine_tokens"):
        select("transpose")


def test_all_operations_come_together() -> None:
    assert set(select_all("reference")) == set(registry.OPERATIONS)
