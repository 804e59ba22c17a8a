"""Kernels that are not there end a run before it starts, or are named by the node without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fused_kernels import native
from megatron_moe.config import MoEConfig, RunConfig
from megatron_moe.parallel.launch import Launched
from megatron_moe.training.kernels import check_kernels
from tests.training.test_pretrain import torchrun
from tests.training.tiny import MODEL


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (3, 0), (4, 1)])
def test_a_node_without_a_compiler_says_so_once(
    rank: int,
    local_rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = Launched(rank=rank, world_size=8, local_rank=local_rank)
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler (set CXX)")
    check_kernels(RunConfig(), "cpu", here)
    said = capsys.readouterr().err
    if (rank, local_rank) == (3, 0):
        assert said.startswith("rank 3 on ")
        assert said.endswith(": MoE kernels: no native: no C++ compiler (set CXX)\n")
        assert said.count("\n") == 1
    else:
        assert said == ""
    asked = replace(RunConfig(), moe=replace(MoEConfig(), moe_dispatch_impl="reference"))
    check_kernels(asked, "cpu", here)
    check_kernels(RunConfig(), "cuda", here)
    assert capsys.readouterr().err == ""


def test_native_without_a_compiler_is_refused_once_for_all_ranks(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "9", "--moe-dispatch-impl", "native"]
    done = torchrun(2, [*argv, "--save", str(tmp_path / "save")])
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "--moe-dispatch-impl is" in line]
    assert len(lines) == 1
    assert "is 'native'" in lines[0]
    assert "no native: CXX is 'no-such-compiler', which is no command" in lines[0]
    assert not (tmp_path / "save").exists()
