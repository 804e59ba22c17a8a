"""The registry takes a name literally, rejects unavailable ones, and gives its reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_kernels import KernelUnavailable, load_kernels, native, registry, select


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler (set CXX)")


@pytest.mark.parametrize("operation", registry.OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_gives_its_selection_and_reason(operation: str, device: str, compiled: None) -> None:
    kernel = select(operation, device_type=device)
    names = ["native", "reference"] if device == "cpu" else ["reference"]
    assert kernel.implementation == names[0]
    assert kernel.reason == f"auto: first of {', '.join(names)} on {device}"
    assert callable(kernel.module.forward)
    assert kernel.module.__name__ == f"fused_kernels.{names[0]}.{operation}"


def test_auto_gives_the_reason_of_what_it_passed_over(without_native: None) -> None:
    kernel = select("gated_silu")
    assert kernel.implementation == "reference"
    why_not = "no native: no C++ compiler (set CXX)"
    assert kernel.reason == f"auto: first of reference on cpu; {why_not}"
    with pytest.raises(
        KernelUnavailable, match=r"use auto or reference on cpu; no native: no C\+\+"
    ):
        select("gated_silu", "native")


def test_an_implementation_is_taken_by_name(compiled: None) -> None:
    for name in ("native", "reference"):
        chosen = select("gated_silu", name)
        assert (chosen.implementation, chosen.reason) == (name, "as requested")


def test_an_unknown_implementation_is_rejected_with_valid_names() -> None:
    with pytest.raises(KernelUnavailable, match="'triton' is not available: use auto or reference"):
        select("gated_silu", "triton", "cuda")


def test_an_implementation_for_other_devices_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "reference", frozenset({"cuda"}))
    assert select("gated_silu", "reference", "cuda").reason == "as requested"
    with pytest.raises(KernelUnavailable):
        select("gated_silu", "reference", "cpu")


def test_a_folder_that_lacks_an_operation_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_native: None
) -> None:
    import fused_kernels

    (tmp_path / "faster").mkdir()
    (tmp_path / "faster" / "__init__.py").touch()
    (tmp_path / "faster" / "combine_tokens.py").write_text("def forward(): ...\n")
    monkeypatch.setattr(fused_kernels, "__path__", [*fused_kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", {"faster": None, **registry.IMPLEMENTATIONS})
    assert select("combine_tokens").implementation == "faster"
    assert select("gated_silu").implementation == "reference"


def test_an_unknown_operation_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="expected one of combine_tokens"):
        select("transpose")


def test_all_operations_come_together() -> None:
    """Each attribute has the module of its operation, and the log all four."""
    kernels = load_kernels("reference")
    for operation in registry.OPERATIONS:
        module = getattr(kernels, operation)
        assert module.__name__ == f"fused_kernels.reference.{operation}"
    assert tuple(kernel.operation for kernel in kernels.selected) == registry.OPERATIONS
    assert {kernel.reason for kernel in kernels.selected} == {"as requested"}
