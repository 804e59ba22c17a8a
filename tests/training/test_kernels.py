"""Kernels that are not there end a run before it starts; ranks that take others are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.training.run import _abbreviated
from tests.support.kernels import need
from tests.training.test_pretrain import ROOT, torchrun
from tests.training.tiny import MODEL


@pytest.mark.slow
def test_native_without_a_compiler_is_one_error_for_all_ranks(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "9", "--kernel-impl", "native"]
    done = torchrun(2, [*argv, "--save", str(tmp_path / "save")])
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "--kernel-impl must be" in line]
    assert len(lines) == 1
    assert "must be auto or reference on cpu" in lines[0]
    assert "(got 'native')" in lines[0]
    assert "no native: CXX is 'no-such-compiler', which is no command" in lines[0]
    assert not (tmp_path / "save").exists()


@pytest.mark.slow
def test_a_rank_without_a_compiler_is_named(corpus: str, tmp_path: Path) -> None:
    """Two of three ranks find none; the run continues with a warning."""
    need("native")
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "if os.environ['RANK'] != '1':\n"
        "    os.environ['CXX'] = 'no-such'\n"
        "import pretrain_openmoe\n"
        "pretrain_openmoe.main()\n"
    )
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "3", "--global-batch-size", "6"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launcher, "3", str(program), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if "WARNING: MoE kernels of" in line]
    assert len(found) == 2
    assert "of 2 of 3 ranks: reference (auto: first of reference on cpu; no native: CXX" in found[0]
    assert "of 1 of 3 ranks: native (auto: first of native, reference on cpu); on" in found[1]


def test_of_many_hosts_a_few_are_named_and_each_once() -> None:
    assert _abbreviated(["a", "a", "b"]) == "a, b"
    assert _abbreviated([f"n{i // 2}" for i in range(14)]) == "n0, n1, n2, n3, 3 more"
