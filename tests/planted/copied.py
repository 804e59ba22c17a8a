"""Runs tests of a copy of the repository, each time in a fresh fork of one warm process.

Importing torch and Megatron-Core takes most of a short test's time. This process imports them once;
a fork imports the project itself, and with it what is planted. Processes that tests start import
everything anew, from the copy as well.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, TIMEOUT = 0, 1, -1
"""Exit codes of pytest, and a stand-in for none."""
_OWN = ("bench", "fused_kernels", "megatron_moe", "pretrain_openmoe", "tests", "tools")
_OTHERS = (
    *("torch", "torch.distributed", "torch.utils.data", "safetensors.torch"),
    *("megatron.core", "megatron.core.optimizer", "megatron.core.distributed"),
    *("megatron.core.models.gpt", "megatron.core.datasets.gpt_dataset"),
    *("megatron.core.pipeline_parallel", "torch.utils.tensorboard", "sentencepiece", "psutil"),
)
"""Modules of others that are imported once; the more, the faster. A missing one is no error."""
_POLL = 0.05


def copy_of_tracked(root: Path, into: Path) -> None:
    """Copy the files that git tracks, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():  # not one that was deleted
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target, follow_symlinks=False)


def warm_up() -> None:
    """Import what all forks share. Tests run on the CPU, each process with one thread."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTEST_ADDOPTS="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _OTHERS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def check_imports(copy: Path) -> None:
    """Check that forks, and processes that tests start, import the project from the copy.

    Raises:
        SystemExit: another one is imported.
    """
    (copy / "tests" / "test_imported.py").write_text(
        "import subprocess, sys, megatron_moe\n"
        "SHOW = [sys.executable, '-c', 'import megatron_moe as m; print(m.__file__)']\n"
        "def test_imported():\n"
        f"    assert megatron_moe.__file__.startswith({str(copy)!r})\n"
        f"    assert subprocess.check_output(SHOW, text=True).startswith({str(copy)!r})\n"
    )
    code, output = run_tests(copy, ["tests/test_imported.py"], 300.0)
    (copy / "tests" / "test_imported.py").unlink()
    if code != PASSED:
        raise SystemExit(f"{output}\nplanted: error: the tests do not run the copy in {copy}")


def run_tests(copy: Path, tests: Sequence[str], timeout: float) -> tuple[int, str]:
    """Run tests of the copy in a fork; exit code of pytest, or `TIMEOUT`, and what it printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            _run_in_child(copy, tests, output.fileno())
        code, deadline = None, time.monotonic() + timeout
        while code is None and time.monotonic() < deadline:
            time.sleep(_POLL)
            ended, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
        with contextlib.suppress(ProcessLookupError):  # with the processes of the tests
            os.killpg(child, signal.SIGKILL)
        if code is None:
            os.waitpid(child, 0)
            return TIMEOUT, f"no end after {timeout:g} s"
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _run_in_child(copy: Path, tests: Sequence[str], output: int) -> None:
    code = 3
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        elsewhere = [path for path in sys.path if Path(path or ROOT).resolve() != ROOT]
        sys.path[:] = [str(copy), *elsewhere]
        for name in list(sys.modules):
            if name.split(".")[0] in _OWN:
                del sys.modules[name]
        importlib.invalidate_caches()
        import pytest

        code = int(pytest.main(["-p", "no:cacheprovider", "--tb=short", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)
