"""How the native kernels are compiled, cached, rejected and called, with real compilers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fused_kernels import select
from fused_kernels.native import library, unavailable

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def cache(compiled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, in a directory that is not there yet, for a process that has not asked."""
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv("MEGATRON_MOE_KERNEL_CACHE", str(folder))
    library._library_or_reason.cache_clear()
    yield folder
    library._library_or_reason.cache_clear()


def asked_again() -> str | None:
    """The answer in a new process."""
    library._library_or_reason.cache_clear()
    return unavailable()


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def test_it_is_compiled_once_and_found_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", counted(tmp_path))
    assert [unavailable(), asked_again()] == [None, None]
    assert (tmp_path / "calls").read_text() == "x\n"
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_compiler_of_several_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {library.compiler()[0]} -DNDEBUG")
    assert unavailable() is None
    assert len(list(cache.glob("*.so"))) == 1


def test_what_lost_its_end_is_compiled_again(cache: Path) -> None:
    assert unavailable() is None
    (made,) = cache.glob("*.so")
    whole = made.read_bytes()
    made.unlink()  # What is loaded stays as it is.
    made.write_bytes(whole[:1000])
    assert asked_again() is None
    assert made.read_bytes() == whole


def counted(folder: Path, before: str = "") -> str:
    """A compiler that leaves a line in `calls` whenever it compiles."""
    compiles = f'case "$*" in *" -o "*) echo x >> {folder}/calls; {before} ;; esac\n'
    return str(script(folder / "counted", compiles + f'exec {library.compiler()[0]} "$@"\n'))


def test_of_processes_that_need_it_at_once_one_compiles(tmp_path: Path) -> None:
    program = "from fused_kernels.native import unavailable; print(unavailable())"
    cache = tmp_path / "cache"
    own = {**os.environ, "MEGATRON_MOE_KERNEL_CACHE": str(cache)}
    own["CXX"] = counted(tmp_path, "sleep 3")
    command = [sys.executable, "-c", program]
    together = [
        subprocess.Popen(command, cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [one.communicate(timeout=120)[0] for one in together] == ["None\n"] * 3
    assert (tmp_path / "calls").read_text() == "x\n"
    assert len(list(cache.glob("*.so"))) == 1


def test_another_source_command_compiler_or_processor_has_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = script(tmp_path / "c++", "echo version 1\n")
    command = [str(path), "-O3"]
    keys = {library._key(command), library._key([str(path), "-O2"])}
    with monkeypatch.context() as patch:
        patch.setattr(library, "_processor", lambda: b"another")
        keys.add(library._key(command))
    shutil.copytree(library.SOURCES, tmp_path / "src")
    monkeypatch.setattr(library, "SOURCES", tmp_path / "src")
    assert library._key(command) in keys
    (tmp_path / "src" / "native.h").write_text("// changed\n")
    keys.add(library._key(command))
    script(path, "echo version 2\n")
    keys.add(library._key(command))
    assert len(keys) == 5


def test_no_compiler_is_a_reason_in_a_few_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such")
    assert unavailable() == "CXX is 'no-such', which is no command"
    monkeypatch.setenv("CXX", 'g++ "')
    assert asked_again() == "CXX is 'g++ \"': No closing quotation"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asked_again() == "no C++ compiler (set CXX)"


def test_a_compiler_that_fails_says_why_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "echo noise >&2\necho 'x.cpp:1: error: no OpenMP' >&2\nexit 1\n"
    broken = script(tmp_path / "broken", body)
    monkeypatch.setenv("CXX", str(broken))
    assert unavailable() == f"{broken} failed: x.cpp:1: error: no OpenMP"
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("a.cpp: In function\n a.cpp:3: error: expected ;", "a.cpp:3: error: expected ;"),
        (
            "ld: final link failed: No space left\nerror: ld returned 1",
            "ld: final link failed: No space left",
        ),
        ("error: 1\nfatal error: omp.h", "fatal error: omp.h"),
        ("\n kaputt\n", "kaputt"),
        ("", "no message"),
    ],
)
def test_the_cause_is_found_in_the_output_of_a_compiler(output: str, cause: str) -> None:
    assert library._cause(output) == cause


def test_a_compiler_that_hangs_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "slow", "exec sleep 60\n")))
    monkeypatch.setattr(library, "COMPILER_SECONDS", 0.2)
    found = unavailable()
    assert found is not None
    assert "timed out after 0.2 seconds" in found


def test_what_cannot_be_loaded_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler that makes something else."""
    body = 'while [ "$1" != -o ]; do shift; done; echo text > "$2"\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "writer", body)))
    found = unavailable()
    assert found is not None
    assert re.search("file too short|invalid ELF header", found)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_cache_that_others_can_write_to_is_not_used(cache: Path, mode: int) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert unavailable() == f"others may write to {cache} (set MEGATRON_MOE_KERNEL_CACHE)"
    assert not list(cache.iterdir())


def test_a_cache_of_another_user_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True, mode=0o700)
    if os.geteuid() == 0:  # What is root's may be used by all.
        os.chown(cache, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert unavailable() == f"others may write to {cache} (set MEGATRON_MOE_KERNEL_CACHE)"


def test_where_the_cache_is(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_MOE_KERNEL_CACHE", ".")
    assert unavailable() is None
    assert list(tmp_path.glob("*.so"))
    monkeypatch.setenv("MEGATRON_MOE_KERNEL_CACHE", "~/there")
    assert library._cache_place() == Path.home() / "there"
    monkeypatch.delenv("MEGATRON_MOE_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library._cache_place() == tmp_path / "megatron_moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library._cache_place() == Path.home() / ".cache" / "megatron_moe"


def test_a_user_without_a_home_needs_no_error(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert unavailable() is None  # The cache was named.
    for name in ("MEGATRON_MOE_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = asked_again()
    assert found is not None
    assert found.startswith("no cache directory (set MEGATRON_MOE_KERNEL_CACHE): ")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_needs_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Nor does it wait for one that hangs."""
    monkeypatch.setenv("CXX", "no-such")
    assert select("gated_silu", "reference", device).reason == "as requested"
    found = select("gated_silu", "auto", "cuda")
    assert found.reason == "auto: first of reference on cuda; no triton: no CUDA device"
    assert library._library_or_reason.cache_info().currsize == 0


def test_a_cache_that_cannot_be_made_is_a_reason(cache: Path) -> None:
    cache.parent.touch()
    found = unavailable()
    assert found is not None
    assert found.startswith("no cache directory (set MEGATRON_MOE_KERNEL_CACHE): ")
