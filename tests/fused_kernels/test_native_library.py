"""How the native kernels are compiled, kept, refused and called, with real compilers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kernels import registry, select
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
    """What a new process would be told."""
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
    compiles = f'case "$*" in *" -o "*) echo x >> {tmp_path}/calls;; esac\n'
    body = compiles + f'exec {library._compiler()[0]} "$@"\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "recorder", body)))
    assert [unavailable(), asked_again()] == [None, None]
    assert (tmp_path / "calls").read_text() == "x\n"
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_compiler_of_several_words(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {library._compiler()[0]} -DNDEBUG")
    assert unavailable() is None
    assert len(list(cache.iterdir())) == 1


def test_what_lost_its_end_is_compiled_again(cache: Path) -> None:
    assert unavailable() is None
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    made.unlink()  # What is loaded stays as it is.
    made.write_bytes(whole[:1000])
    assert asked_again() is None
    assert made.read_bytes() == whole


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    program = "from fused_kernels.native import unavailable; print(unavailable())"
    own = {**os.environ, "MEGATRON_MOE_KERNEL_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program]
    together = [
        subprocess.Popen(command, cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [one.communicate(timeout=120)[0] for one in together] == ["None\n"] * 3
    assert all(path.suffix == ".so" for path in tmp_path.iterdir())


def test_another_source_command_or_processor_has_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ["c++", "-O3"]
    keys = {library._key(command), library._key(["c++", "-O2"])}
    with monkeypatch.context() as patch:
        patch.setattr(library, "_processor", lambda: b"another")
        keys.add(library._key(command))
    shutil.copytree(library.SOURCES, tmp_path / "src")
    monkeypatch.setattr(library, "SOURCES", tmp_path / "src")
    assert library._key(command) in keys
    (tmp_path / "src" / "native.h").write_text("// changed\n")
    keys.add(library._key(command))
    assert len(keys) == 4


def test_no_compiler_is_a_reason_in_a_few_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such")
    assert unavailable() == "CXX is 'no-such', which is no command"
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
    assert not list(cache.iterdir())


def test_what_cannot_be_loaded_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler that makes something else."""
    body = 'while [ "$1" != -o ]; do shift; done; echo text > "$2"\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "writer", body)))
    found = unavailable()
    assert found is not None
    assert re.search("file too short|invalid ELF header", found)


def test_a_cache_that_others_can_write_to_is_not_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert unavailable() == f"others may write to {cache} (set MEGATRON_MOE_KERNEL_CACHE)"
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_made_is_a_reason(cache: Path) -> None:
    cache.parent.touch()
    found = unavailable()
    assert found is not None
    assert found.startswith("no cache directory (set MEGATRON_MOE_KERNEL_CACHE): ")


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as before, in the end."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    """To the last bit, of tensors large enough for several."""
    torch.manual_seed(0)
    gate, combine = (select(n, "native").module for n in ("gated_silu", "combine_tokens"))
    z, grad, out = torch.randn(999, 602), torch.randn(999, 301), torch.randn(1200, 301)
    rows, kept = torch.randperm(1200)[:999].view(999, 1), torch.rand(999, 1) < 0.8
    choices = torch.rand(999, 1), rows, kept

    def results(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        found = [*gate.backward(grad, z, 2), combine.forward(out, *choices)]
        return [*found, *combine.backward(grad, out, *choices, rows)]

    alone = results(1)
    for count in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, results(count), strict=True))


def test_fake_tensors_get_the_shapes_of_the_results() -> None:
    kernels = {name: select(name, "native").module for name in registry.OPERATIONS}
    with FakeTensorMode():
        z, x, rows = torch.empty(6, 8), torch.empty(5, 4), torch.zeros(5, 2, dtype=torch.long)
        weights, source = torch.empty(5, 2), torch.zeros(6, dtype=torch.long)
        out, kept = torch.empty(6, 4), torch.zeros(5, 2, dtype=torch.bool)
        gate, combine = kernels["gated_silu"], kernels["combine_tokens"]
        assert gate.forward(z, 2).shape == (6, 4)
        assert [t.shape for t in gate.backward(out, z, 2)] == [(6, 8), (6, 4)]
        assert kernels["dispatch_tokens"].forward(x, source).shape == (6, 4)
        assert kernels["dispatch_tokens"].backward(out, rows, kept).shape == (5, 4)
        assert combine.forward(out, weights, rows, kept).shape == (5, 4)
        grads = combine.backward(x, out, weights, rows, kept, source)
        assert [t.shape for t in grads] == [(6, 4), (5, 2)]
        ranked = kernels["rank_in_expert"].forward(rows.t(), 3)
        assert [t.shape for t in ranked] == [(2, 5), (2, 3)]


def test_what_the_compiled_code_does_not_know_is_refused() -> None:
    z = torch.zeros(4, 6)
    with pytest.raises(TypeError, match=r"of torch\.float16, expected float32, float64, bfloat16"):
        library.operation("gated_silu_forward", torch.float16, z.half())
    for wrong in (z.t(), z.double(), z.int(), z.to("meta")):
        with pytest.raises(ValueError, match="gated_silu_forward_f32: expected contiguous"):
            library.operation("gated_silu_forward", torch.float32, wrong)
