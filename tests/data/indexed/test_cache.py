"""Cache entries are whole or absent, whoever builds, dies or interferes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.data.indexed import cache as index_cache
from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.errors import UsageError

FORK = multiprocessing.get_context("fork")
VALUES = [np.arange(50_000), np.arange(6).reshape(3, 2)]


def slow_build(log: Path, seconds: float, together: int = 1) -> Callable[[], list[np.ndarray]]:
    """Notes each start and each end of a build; none ends before so many have started."""

    def build() -> list[np.ndarray]:
        with log.open("a") as stream:
            stream.write(f"start {os.getpid()}\n")
        deadline = time.monotonic() + 20
        while log.read_text().count("start") < together and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds)
        with log.open("a") as stream:
            stream.write(f"end {os.getpid()}\n")
        return VALUES

    return build


def want(cache: IndexCache, log: Path, seconds: float, out: Path, together: int = 1) -> None:
    """What a process does: ask for the entry and write down what it got."""
    arrays = cache.arrays("entry", {}, slow_build(log, seconds, together))
    equal = all(np.array_equal(a, b) for a, b in zip(arrays, VALUES, strict=True))
    (out / str(os.getpid())).write_text(str(equal))


def start(count: int, *arguments: object) -> list[multiprocessing.process.BaseProcess]:
    processes = [FORK.Process(target=want, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    return list(processes)


def finish(processes: Sequence[multiprocessing.process.BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(timeout=30)
    return [process.exitcode for process in processes]


def test_second_call_reads_the_first_ones_files(tmp_path: Path) -> None:
    cache = IndexCache(str(tmp_path))
    assert [a.tolist() for a in cache.arrays("e", {"x": 1}, lambda: VALUES)][1] == [
        [0, 1], [2, 3], [4, 5],
    ]  # fmt: skip
    again = cache.arrays("e", {}, lambda: pytest.fail("built again"))
    assert np.array_equal(again[0], VALUES[0])
    assert again[0].dtype == VALUES[0].dtype
    assert json.loads((tmp_path / "e" / "description.json").read_text()) == {"x": 1}


def test_many_arrays_keep_their_order(tmp_path: Path) -> None:
    cache = IndexCache(str(tmp_path))
    values = [np.array([i]) for i in range(12)]
    assert [int(a[0]) for a in cache.arrays("e", {}, lambda: values)] == list(range(12))


def test_one_of_several_processes_builds(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    out.mkdir()
    processes = start(4, IndexCache(str(tmp_path / "c")), log, 0.2, out)
    assert finish(processes) == [0] * 4
    assert log.read_text().count("start") == 1
    assert [path.read_text() for path in out.iterdir()] == ["True"] * 4


def test_a_killed_builder_is_replaced(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    out.mkdir()
    log.touch()
    processes = start(3, IndexCache(str(tmp_path / "c")), log, 0.5, out)
    while "start" not in log.read_text():
        time.sleep(0.005)
    os.kill(int(log.read_text().split()[1]), signal.SIGKILL)
    codes = finish(processes)
    assert sorted(map(str, codes)) == ["-9", "0", "0"]
    assert log.read_text().count("start") == 2
    assert [path.read_text() for path in out.iterdir()] == ["True"] * 2


def test_without_locks_all_build_and_all_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    log, out = tmp_path / "log", tmp_path / "out"
    out.mkdir()
    # On a busy machine a process may start after another has built, and read what is there.
    processes = start(3, IndexCache(str(tmp_path / "c")), log, 0.3, out, 3)
    assert finish(processes) == [0] * 3
    assert log.read_text().count("start") == 3
    assert [path.read_text() for path in out.iterdir()] == ["True"] * 3
    assert not list((tmp_path / "c").glob("*partial*"))


def recorded(content: bytes) -> list[int | str]:
    """What a manifest says about a file."""
    return [len(content), hashlib.sha256(content).hexdigest()]


def _another_order(entry: Path) -> None:
    np.save(entry / "0.npy", np.load(entry / "0.npy")[::-1])


def _flipped_bit(entry: Path) -> None:
    content = bytearray((entry / "1.npy").read_bytes())
    content[-1] ^= 1
    (entry / "1.npy").write_bytes(content)


def _sizes_alone(entry: Path) -> None:
    """As earlier versions wrote it."""
    sizes = {p.name: p.stat().st_size for p in entry.iterdir() if p.suffix != ".json"}
    (entry / "manifest.json").write_text(json.dumps(sizes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda e: (e / "0.npy").unlink(), "its files are not those of its manifest"),
    "too many": (lambda e: np.save(e / "2.npy", 7), "its files are not those of its manifest"),
    "short": (lambda e: os.truncate(e / "0.npy", 1000), "0.npy changed since it was built"),
    "another order": (_another_order, "0.npy changed since it was built"),
    "a flipped bit": (_flipped_bit, "1.npy changed since it was built"),
    "description": (
        lambda e: (e / "description.json").write_text("{}"),
        "description.json changed since it was built",
    ),
    "no manifest": (lambda e: (e / "manifest.json").unlink(), "it has no manifest"),
    "manifest": (lambda e: (e / "manifest.json").write_text("{"), "its manifest is not JSON"),
    "deep": (lambda e: (e / "manifest.json").write_text("[" * 99999), "its manifest is not JSON"),
    "list": (lambda e: (e / "manifest.json").write_text("[]"), "its manifest has no checksums"),
    "sizes": (_sizes_alone, "its manifest has no checksums"),
    "nothing": (
        lambda e: (e / "manifest.json").write_text("{}"),
        "its files are not those of its manifest",
    ),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_changed_entry_is_built_again(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = IndexCache(str(tmp_path))
    cache.arrays("e", {"x": 1}, lambda: VALUES)
    damage, said = DAMAGE[kind]
    damage(tmp_path / "e")
    assert not caplog.messages
    again = cache.arrays("e", {"x": 1}, lambda: VALUES)
    assert [found.tolist() for found in again] == [values.tolist() for values in VALUES]
    assert caplog.messages == [f"index cache {tmp_path / 'e'}: {said}; it is built again"]
    cache.arrays("e", {}, lambda: pytest.fail("built a third time"))


def test_a_changed_number_is_measured_again(tmp_path: Path) -> None:
    """The largest token id of a corpus, for which a vocabulary would pass that is too small."""
    cache = IndexCache(str(tmp_path))
    assert cache.record("e", lambda: {"largest": 90}) == {"largest": 90}
    (tmp_path / "e" / "record.json").write_text('{"largest": 10}\n')
    assert cache.record("e", lambda: {"largest": 90}) == {"largest": 90}


def test_one_of_several_processes_builds_a_changed_entry_again(tmp_path: Path) -> None:
    log, out, cache = tmp_path / "log", tmp_path / "out", IndexCache(str(tmp_path / "c"))
    out.mkdir()
    cache.arrays("entry", {}, lambda: VALUES)
    _another_order(tmp_path / "c" / "entry")
    assert finish(start(4, cache, log, 0.2, out)) == [0] * 4
    assert log.read_text().count("start") == 1
    assert [path.read_text() for path in out.iterdir()] == ["True"] * 4


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    cache = IndexCache(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        cache.arrays("e", {}, lambda: [np.array([1 // 0])])
    assert [path.name for path in tmp_path.iterdir()] == [".e.lock"]
    assert cache.record("e", lambda: {"a": 1}) == {"a": 1}


def test_partial_entries_of_the_dead_are_swept(tmp_path: Path) -> None:
    for name, age in (("e.partial-old", 2 * index_cache._STALE), ("e.partial-new", 0.0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    IndexCache(str(tmp_path)).record("e", lambda: {"a": 1})
    assert sorted(path.name for path in tmp_path.glob("*partial*")) == ["e.partial-new"]


@pytest.mark.parametrize("content", [b"\x93NUMPY garbage", b"\x80\x04K\x01."])
def test_files_that_are_no_arrays_are_refused(tmp_path: Path, content: bytes) -> None:
    """The second is a pickle, which Megatron-Core's own cache would run."""
    cache = IndexCache(str(tmp_path))
    cache.arrays("e", {}, lambda: VALUES)
    (tmp_path / "e" / "0.npy").write_bytes(content)
    manifest = tmp_path / "e" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"0.npy": recorded(content)}))
    with pytest.raises(UsageError, match=r"index cache must be readable \(got '.*/e'\); delete it"):
        cache.arrays("e", {}, lambda: VALUES)


@pytest.mark.parametrize("content", ["no json", '{"a": "b"}', "[1]", '{"a": null}'])
def test_records_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    cache = IndexCache(str(tmp_path))
    cache.record("e", lambda: {"a": 1})
    (tmp_path / "e" / "record.json").write_text(content)
    manifest = json.dumps({"record.json": recorded(content.encode())})
    (tmp_path / "e" / "manifest.json").write_text(manifest)
    with pytest.raises(
        UsageError, match=r"must be a JSON object of numbers \(got '.*record\.json'\); delete it"
    ):
        cache.record("e", lambda: {"a": 1})


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = IndexCache(str(tmp_path / "file" / "cache"))
    with pytest.raises(
        UsageError, match=r"--data-cache-path must be a writable .*got '.*/file/cache'"
    ):
        cache.record("e", lambda: {"a": 1})
