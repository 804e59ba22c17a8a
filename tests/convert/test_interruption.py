"""A conversion that is interrupted or killed: no target, and older steps as they were before."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.errors import UsageError
from tests.convert.cases import model_of
from tests.convert.test_formats import same


def interrupt(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("format_name", ["native", "hf", "t5x"])
def test_an_interrupted_one_leaves_nothing(tmp_path: Path, format_name: str) -> None:
    target = ConversionTarget(format=format_name, path=tmp_path / "x", max_shard=20_000)
    with pytest.raises(KeyboardInterrupt):
        write(model_of(), target, interrupt)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def killed(target: ConversionTarget, after: int) -> None:
    """Convert in another process, which is killed when it has written a number of parts."""
    left = after

    def count(_: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            write(model_of(seed=9, step=9), target, count)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("after", [1, 20, 49])
def test_a_killed_one_is_as_if_it_had_not_begun(tmp_path: Path, after: int) -> None:
    native = ConversionTarget(format="native", path=tmp_path / "native", max_shard=20_000)
    write(model_of(seed=3, step=5), native, lambda _: None)
    killed(native, after)
    same(read("native", native.path), model_of(seed=3))
    hf = ConversionTarget(format="hf", path=tmp_path / "hf", max_shard=20_000)
    killed(hf, after)
    with pytest.raises(UsageError, match=r"config\.json"):
        read("hf", hf.path)
    # What is left under another name is in nobody's way.
    for target, again in ((native, model_of(seed=9, step=9)), (hf, model_of(seed=9))):
        write(again, target, lambda _: None)
        same(read(target.format, target.path), model_of(seed=9))


def test_the_last_part_is_the_49th() -> None:
    """So that the kill above comes at the first, in the middle, and when all is written."""
    parts: list[int] = []
    for name, tensor in model_of().tensors.items():
        list(tensor.pending(name, parts.append).parts())
    assert len(parts) == 49
