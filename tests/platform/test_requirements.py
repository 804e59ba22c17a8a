"""Packages that must be installed, and one that must not, recognised without running its code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.errors import UsageError
from megatron_moe.platform import release
from megatron_moe.platform.activation import check_requirements
from megatron_moe.platform.release import (
    NEW,
    OLD,
    check_norm_recomputation,
    installed_release,
    pinned_release,
)

ROOT = Path(__file__).resolve().parents[2]


def activate_with(path: Path) -> subprocess.CompletedProcess[str]:
    """Activate in a fresh interpreter that finds packages in `path` first."""
    code = (
        "from megatron_moe.errors import UsageError\n"
        "from megatron_moe.platform import activate\n"
        "try:\n    activate()\n    print('active')\n"
        "except UsageError as error:\n    print(error)"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(path), str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )


def test_the_package_index_s_apex_is_rejected_by_name_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\n")
    shown = activate_with(tmp_path).stdout
    assert shown.strip() == (
        f"package apex must be NVIDIA's Apex built from source, or none (got '{package}'); "
        "the apex on the package index is another project: pip uninstall apex"
    )
    assert not marker.exists()


def test_a_module_called_apex_is_rejected_too(tmp_path: Path) -> None:
    (tmp_path / "apex.py").write_text("raise SystemExit('ran')\n")
    assert activate_with(tmp_path).stdout.startswith("package apex must be NVIDIA's Apex")


def test_nvidia_s_apex_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "apex" / "multi_tensor_apply"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("apex") is not None
    check_requirements()


def test_a_missing_psutil_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "psutil" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(UsageError) as caught:
        check_requirements()
    assert str(caught.value) == (
        "package psutil must be installed (got 'missing'); pip install psutil"
    )


_SAVE = """
import multiprocessing, sys
{hide}
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
print("saving", flush=True)
results = multiprocessing.get_context("fork").Queue()
bucket = (sys.argv[1], sys.argv[1], ([], []))
FileSystemWriterAsync.write_preloaded_data_multiproc([], False, 0, [bucket], results)
print("saved", flush=True)
"""
"""Megatron-Core's own writer with one file to write and nothing to put into it."""


def _save(path: Path, hide: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", _SAVE.format(hide=hide), str(path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_without_psutil_megatron_core_s_writer_waits_forever(tmp_path: Path) -> None:
    """Why it is required: the writing process fails, and the waiting one is not notified.

    If this test fails, `psutil` may no longer be needed. Release 0.19 says it in its own words.
    """
    if installed_release() != OLD:
        code = (
            "import sys; sys.modules['psutil'] = None\n"
            "from megatron.core.dist_checkpointing.strategies import filesystem_async as writer\n"
            "writer._process_memory()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1 and "psutil is not installed" in done.stderr
        return
    healthy = _save(tmp_path / "healthy", "")
    stuck = _save(tmp_path / "stuck", "sys.modules['psutil'] = None")
    try:
        assert healthy.communicate(timeout=120)[0].split() == ["saving", "saved"]
        assert stuck.stdout is not None
        assert stuck.stdout.readline() == "saving\n"
        with pytest.raises(subprocess.TimeoutExpired):
            stuck.wait(timeout=3)
    finally:
        os.killpg(stuck.pid, signal.SIGKILL)
        stuck.communicate()


@pytest.mark.parametrize("found", ["0.17.0", None])
def test_another_version_is_rejected(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UsageError) as caught:
        check_requirements()
    assert str(caught.value) == (
        f"package megatron-core must be {OLD} or {NEW} (got {found or 'missing'!r}); "
        f"pip install megatron-core=={pinned_release()}"
    )


def test_what_the_package_declares_is_what_is_checked() -> None:
    """The pins of the installation agree with the releases that the patches are for."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split(";")[0] for line in lines]
    declared = [
        f'megatron-core=={OLD}; python_version < "3.12"',
        f'megatron-core=={NEW}; python_version >= "3.12"',
    ]
    setup = (ROOT / "setup.py").read_text()
    assert all(pin in lines and f"'{pin}'" in setup for pin in declared)
    assert installed_release() == pinned_release() == (OLD if sys.version_info < (3, 12) else NEW)
    assert any(pin.startswith("psutil==") for pin in pins)
    assert "psutil" in (ROOT / "setup.py").read_text()
    assert "apex" not in [pin.partition("==")[0].lower() for pin in pins]


def test_recomputed_norms_need_ninja_on_a_gpu_with_the_later_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(release, "installed_release", lambda: NEW)
    monkeypatch.setenv("PATH", "/nowhere")
    check_norm_recomputation(("moe", "mlp"))
    with pytest.raises(UsageError, match=r"^program ninja must be in PATH .*got 'missing'"):
        check_norm_recomputation(("moe", "layernorm"))
    monkeypatch.setattr(release, "installed_release", lambda: OLD)
    check_norm_recomputation(("layernorm",))
