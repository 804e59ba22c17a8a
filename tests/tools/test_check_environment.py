"""The command on two real ranks, under torchrun; what counts as a problem: tests/planning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.platform.release import installed_release
from tools import check_environment

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = """
name = "two CPUs"
gpu = "CPU"
gpus_per_node = 2
intra_bandwidth = 1e6
inter_bandwidth = 1e6
intra_microseconds = 1.0
inter_microseconds = 1.0
memory_gb = 8.0
reserved_gb = 1.0
bf16_tflops = 0.1
fp32_tflops = 0.1
fp8_tflops = 0.0
gemm_efficiency = 0.8
attention_efficiency = 0.3
memory_bandwidth = 10.0
memory_efficiency = 0.8
multiprocessors = 1
kernel_microseconds = 5.0
node_kilowatts = 0.2
"""
"""A machine whose ranks exchange a million GB a second."""


def run(tmp_path: Path, *flags: str) -> tuple[int, str, dict]:
    """Exit status of the launcher, what is printed, and the JSON file."""
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    out = tmp_path / "found.json"
    launcher = ["tools/torchrun.py", "--standalone", "--local-addr", "127.0.0.1"]
    own = ["--megabytes", "1", "--slowest", "0", "--json", str(out)]
    own += ["--cluster", str(tmp_path / "cluster.toml")]
    command = [sys.executable, *launcher, "--nproc-per-node", "2", "tools/check_environment.py"]
    done = subprocess.run(
        [*command, *own, "--preset", "openmoe-tiny", "--vocab-size", "1000", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())


def test_two_ranks_without_a_problem(tmp_path: Path) -> None:
    save = tmp_path / "save"
    code, printed, values = run(tmp_path, "--tolerance", "0", "--save", str(save))
    assert code == 0, printed
    assert printed.count("no problem found") == 1, "rank 0 prints"
    assert values["problems"] is False
    found = {finding["what"]: finding["found"] for finding in values["findings"]}
    assert found[str(save)] == "written and seen by 2 ranks"
    assert found["megatron-core"] == installed_release()
    assert not save.exists()
    measured = [(s["backend"], s["operation"], s["place"]["size"]) for s in values["bandwidths"]]
    assert measured == [("gloo", "all-reduce", 2), ("gloo", "all-to-all", 2)]
    assert all(speed["gigabytes_per_second"] > 0 for speed in values["bandwidths"])


def test_problems_end_every_rank_with_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, printed, values = run(tmp_path, "--save", str(tmp_path / "file" / "save"))
    assert code == 1, printed
    bad = [finding["what"] for finding in values["findings"] if finding["fix"]]
    assert bad == [
        "gloo all-reduce, a node",
        "gloo all-to-all, a node",
        str(tmp_path / "file" / "save"),
    ]
    assert "found cannot write: Not a directory); mount it on every node" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tolerance", "-1"], "--tolerance must be >= 0 (got -1.0)"),
        (["--megabytes", "0"], "--megabytes must be >= 1 and <= 4096 (got 0)"),
        (["--cluster", "h1000"], "--cluster must be one of a100-80, b200, h100, h200"),
        (["--sav", "x"], "flag must be"),
    ],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        check_environment.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
