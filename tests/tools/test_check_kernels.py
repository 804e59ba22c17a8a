"""Ahead-of-time compilation of Triton kernels: what is checked, and that each check can fail."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_kernels.triton.ahead_of_time import Resources
from fused_kernels.triton.cases import CASES
from tools import check_kernels
from tools.check_kernels import BEGIN, END, Job

ROOT = Path(__file__).resolve().parents[2]
GOOD = Resources(
    registers=32,
    stack=0,
    local=0,
    spills=0,
    shared=1024,
    wide_loads=2,
    wide_stores=1,
    tensor_core=0,
    to_fp8=1,
    warps=4,
    capability=90,
)
JOB = Job(case=0, launch=0, kernel="copy_rows_kernel", capability=90)


def found(**changes: int) -> list[str]:
    return check_kernels.problems({JOB: dataclasses.replace(GOOD, **changes)})


def test_good_code_has_no_problem() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 16}, "16 bytes of stack, at most 0"),
        ({"local": 8}, "8 bytes of local memory, at most 0"),
        ({"spills": 3}, "3 loads and stores of local memory, at most 0"),
        ({"registers": 129}, "129 registers, at most 128"),
        ({"shared": 232_449}, "232449 bytes of shared memory, at most 232448"),
        ({"wide_loads": 0}, "no loads of 128 bits"),
        ({"wide_stores": 0}, "no stores of 128 bits"),
    ],
)
def test_each_excess_is_named(changes: dict[str, int], words: str) -> None:
    assert found(**changes) == [f"dispatch_tokens.forward, copy_rows_kernel for sm_90: {words}"]


def test_an_operation_in_fp8_converts_and_is_not_compiled_for_devices_without() -> None:
    (place,) = (
        c for c, case in enumerate(CASES) if case.name == "dispatch_tokens.forward_fp8, mxfp8"
    )
    job = dataclasses.replace(JOB, case=place, kernel="copy_rows_fp8_kernel")
    (line,) = check_kernels.problems({job: dataclasses.replace(GOOD, to_fp8=0)})
    assert line.endswith("copy_rows_fp8_kernel for sm_90: no conversions to FP8")
    assert check_kernels.problems({job: GOOD}) == []
    with_fp8 = {job.capability for job in check_kernels.jobs() if job.case == place}
    assert with_fp8 == {90, 100}
    cells = check_kernels.table({job: GOOD}).splitlines()[-1].split(" | ")
    assert cells[-3] == "- / 32 / -"


def test_what_does_not_compile_is_named() -> None:
    (line,) = check_kernels.problems({JOB: "did not end within 120 s"})
    assert line.endswith("for sm_90: did not end within 120 s")


def test_occupancy_by_hand() -> None:
    """40 registers are 1280 a warp, so 12 blocks of 4 warps; 100 KB let two be resident."""
    assert GOOD.occupancy == 1.0
    assert dataclasses.replace(GOOD, registers=40).occupancy == 48 / 64
    assert dataclasses.replace(GOOD, registers=255, warps=8).occupancy == 8 / 64
    assert dataclasses.replace(GOOD, shared=100_000).occupancy == 8 / 64
    # At most 32 blocks, of one warp each.
    assert dataclasses.replace(GOOD, warps=1, shared=0).occupancy == 32 / 64


PROGRAM = """
import triton, triton.language as tl
import torch
from fused_kernels.triton.ahead_of_time import compiled
from fused_kernels.triton.launch import Launch

@triton.jit
def sum_kernel(x, y, n, SPREAD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at * SPREAD, mask=at < n)
    for shift in tl.static_range(BLOCK // 1024):
        value += tl.load(x + at * SPREAD + shift * n, mask=at < n)
    tl.store(y + at * SPREAD, value, mask=at < n)

def made(spread, block, warps):
    x = torch.empty(9, dtype=torch.float32, device="meta")
    launch = Launch(kernel=sum_kernel, programs=1, arguments={"x": x, "y": x, "n": 1024},
                    constants={"SPREAD": spread, "BLOCK": block}, warps=warps)
    return compiled(launch, 90)

if __name__ == "__main__":
    plain, strided, large = made(1, 1024, 4), made(2, 1024, 4), made(1, 1 << 13, 1)
    print(plain.wide_loads > 0, plain.spills, plain.stack)
    print(strided.wide_loads, strided.wide_stores)
    print(large.spills > 0, large.stack > 0)
"""


@pytest.mark.slow
def test_the_compiler_tells_wide_from_narrow_and_finds_spills(tmp_path: Path) -> None:
    """One real kernel, contiguous, strided, and with far more values than registers."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True 0 0", "0 0", "True True"]


def test_a_compilation_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch alone takes longer than this limit."""
    monkeypatch.setattr(check_kernels, "STARTING", 0)
    outcomes = check_kernels.compile_all([JOB, dataclasses.replace(JOB, capability=80)], 1, 0.05)
    assert set(outcomes.values()) == {"did not end within 0.05 s"}
    assert len(outcomes) == 2


def test_the_page_has_a_row_of_every_kernel() -> None:
    """Numbers are compared by `make check-kernels`; here that none is missing."""
    page = (ROOT / "docs" / "kernels.md").read_text()
    rows = page.split(BEGIN)[1].split(END)[0]
    for case in CASES:
        assert f"| `{case.name}` |" in rows


def test_a_page_that_is_out_of_date_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(check_kernels, "PAGE", page)
    assert not check_kernels.check_page("new", write=False)
    assert check_kernels.check_page("new", write=True)
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert check_kernels.check_page("new", write=False)
