"""Whole runs under real torchrun, for tests that send signals to their processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.training.tiny import MODEL

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240


def start(corpus: str, directory: Path, *flags: str) -> subprocess.Popen[bytes]:
    """A run of two ranks that would take hours, under `tools/torchrun.py`."""
    argv = [*MODEL, "--expert-model-parallel-size", "2", "--data-path", corpus]
    argv += ["--train-iters", "1000000", "--save", str(directory / "ckpt")]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--log-interval", "1", *flags]
    launcher = [str(ROOT / "tools" / "torchrun.py"), "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", "2", str(ROOT / "pretrain_openmoe.py")]
    return subprocess.Popen(
        [sys.executable, *launcher, *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=(directory / "log").open("wb"),
        stderr=subprocess.STDOUT,
    )


def wait_for_steps(run: subprocess.Popen[bytes], metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + SECONDS
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert run.poll() is None and time.monotonic() < deadline, "the run never took a step"
        time.sleep(0.2)
