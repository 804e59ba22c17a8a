"""The registry takes a name literally, rejects unavailable ones, and gives its reasons."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fused_kernels import KernelUnavailable, load_kernels, native, registry, select, triton

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler (set CXX)")


@pytest.mark.parametrize("operation", registry.OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_gives_its_selection_and_reason(operation: str, device: str, compiled: None) -> None:
    kernel = select(operation, device_type=device)
    mine = "native" if device == "cpu" else "triton"
    left = (mine, operation) in registry.LEFT_TO_REFERENCE
    names = ["native", "reference"] if device == "cpu" and not left else ["reference"]
    passed = "" if device == "cpu" or left else "; no triton: no CUDA device"
    assert kernel.implementation == names[0]
    assert kernel.reason == f"auto: first of {', '.join(names)} on {device}{passed}"
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


def test_an_operation_that_an_implementation_leaves_to_the_reference_says_so(
    compiled: None,
) -> None:
    left = select("linear_cross_entropy", "native")
    assert left.implementation == "reference"
    why = "its time is in torch's GEMMs"
    assert left.reason == f"as requested: native leaves it to the reference, {why}"
    assert load_kernels("native").gated_silu.__name__ == "fused_kernels.native.gated_silu"
    with pytest.raises(KernelUnavailable, match="'native' is not available: use auto or triton"):
        select("linear_cross_entropy", "native", "cuda")


def test_an_unknown_implementation_is_rejected_with_valid_names() -> None:
    valid = "'cutlass' is not available: use auto or triton or reference on cuda"
    with pytest.raises(KernelUnavailable, match=valid):
        select("gated_silu", "cutlass", "cuda")


@pytest.mark.parametrize(
    "operation",
    [name for name in registry.OPERATIONS if ("triton", name) not in registry.LEFT_TO_REFERENCE],
)
def test_triton_is_preferred_where_it_runs(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """As on a machine with a GPU; nothing is launched."""
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    kernel = select(operation, device_type="cuda")
    assert (kernel.implementation, kernel.reason) == (
        "triton",
        "auto: first of triton, reference on cuda",
    )
    assert kernel.module.__name__ == f"fused_kernels.triton.{operation}"


def test_triton_on_a_cpu_is_rejected() -> None:
    with pytest.raises(KernelUnavailable, match="use auto or native or reference on cpu"):
        select("gated_silu", "triton", "cpu")


def test_triton_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    triton.unavailable.cache_clear()
    assert triton.unavailable() == "no CUDA device"
    with pytest.raises(KernelUnavailable, match="use auto or reference on cuda; no triton: no CUD"):
        select("gated_silu", "triton", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton.unavailable.cache_clear()
    assert triton.unavailable() == 'triton is not installed (pip install "triton==3.7.1")'
    triton.unavailable.cache_clear()


def test_triton_is_not_imported_where_it_is_not_selected() -> None:
    program = (
        "import sys; from fused_kernels import load_kernels; load_kernels('reference', 'cpu'); "
        "load_kernels('auto', 'cuda'); print('triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


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


def test_what_native_lacks_is_the_reference_and_says_so(compiled: None) -> None:
    kernels = {kernel.operation: kernel for kernel in load_kernels("native").selected}
    found = {name for name, one in kernels.items() if one.implementation == "native"}
    assert found == {"combine_tokens", "dispatch_tokens", "gated_silu", "rank_in_expert"}
    reason = "as requested: native leaves it to the reference, there is none in C++"
    assert (kernels["rms_norm"].implementation, kernels["rms_norm"].reason) == ("reference", reason)


def test_all_operations_come_together() -> None:
    """Each attribute has the module of its operation, and the log all of them."""
    kernels = load_kernels("reference")
    for operation in registry.OPERATIONS:
        module = getattr(kernels, operation)
        assert module.__name__ == f"fused_kernels.reference.{operation}"
    assert tuple(kernel.operation for kernel in kernels.selected) == registry.OPERATIONS
    assert {kernel.reason for kernel in kernels.selected} == {"as requested"}
