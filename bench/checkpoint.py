"""Saving and loading a checkpoint, against plainly writing and reading the same bytes.

    python -m bench.checkpoint

One rank, a mixture-of-experts model of 62 million parameters with Adam's moments in fp32: 0.75 GB
in seven files, every byte of it hashed with SHA-256 when it is written and when it is loaded.
*Plain* is the least that any program does: one `write` per 16 MiB from memory and an `fsync`; one
`read` per 16 MiB into a buffer that is used again. In each round all are done in turn, and ratios
are medians over rounds. Reads are *from the disk* if the page cache was advised to drop the files
before, as when a run starts on a machine; *cached* right after that. What is written goes to the
system's temporary directory (`TMPDIR`).
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._one_rank import one_rank
from bench.record import Record
from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS

if TYPE_CHECKING:
    from megatron_moe.checkpoint.save import PendingSave

VOCAB = 8192
ROUNDS = 7
CHUNK = 16 << 20
THROUGHPUT, STALL = 0.7, 0.2


def configuration() -> RunConfig:
    """The tiny preset, with wider layers and more experts."""
    run = PRESETS["openmoe-tiny"]
    return replace(
        run,
        model=replace(run.model, hidden_size=512, ffn_hidden_size=1024, kv_channels=64),
        moe=replace(run.moe, num_experts=16, moe_shared_expert_intermediate_size=1024),
        data=replace(run.data, vocab_size=VOCAB),
        train=replace(run.train, train_iters=1000),
    )


class Subject:
    """A model with its optimizer, saved and loaded through the functions that a run uses."""

    def __init__(self, config: RunConfig, ctx: Any) -> None:
        from megatron_moe.checkpoint.tensor_files import HostMemory
        from megatron_moe.model.build import build_model
        from megatron_moe.model.sharding.optimizer_state import optimizer_shards
        from megatron_moe.training.optim.build import build_optimizer, wrap_chunks

        chunks = build_model(config, ctx.layout, ctx.pgs, VOCAB, ctx.platform.device)
        self.config, self.ctx, self.memory = config, ctx, HostMemory(pinned=False)
        self.chunks = wrap_chunks(config, chunks, ctx.pgs)
        self.optimizer = build_optimizer(config, self.chunks, ctx.pgs)
        for shard in optimizer_shards(self.optimizer).values():
            for tensor in shard.tensors.values():
                tensor.normal_()  # bytes that neither memory nor disk can make less of

    def save(self, directory: Path) -> None:
        """Synchronously."""
        from megatron_moe.checkpoint import save_checkpoint

        save_checkpoint(directory, *self._state(), optimizer=self.optimizer, **self._rest())

    def start(self, directory: Path) -> PendingSave:
        """The part of an asynchronous save that training waits for."""
        from megatron_moe.checkpoint.contents import collect_contents
        from megatron_moe.checkpoint.save import start_save
        from megatron_moe.parallel.collectives import RankGroup

        contents = collect_contents(
            *self._state(),
            optimizer=self.optimizer,
            with_rng=True,
            ranks=RankGroup(),
            **self._rest(),
        )
        return start_save(directory, 1, contents, RankGroup(), memory=self.memory)

    def load(self, directory: Path) -> None:
        """Everything, verified."""
        from megatron_moe.checkpoint import load_checkpoint

        load_checkpoint(directory, optimizer=self.optimizer, **self._rest())

    def _state(self) -> tuple[Any]:
        from megatron_moe.checkpoint import TrainState

        return (TrainState(iteration=1),)

    def _rest(self) -> dict[str, Any]:
        from megatron_moe.checkpoint import RunIdentity

        return {
            "config": self.config,
            "ctx": self.ctx,
            "chunks": self.chunks,
            "identity": RunIdentity(padded_vocab_size=VOCAB),
        }


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def timed_write(source: Path, path: Path) -> float:
    """Seconds to write the bytes of a directory's files, from memory, into one, and to sync it."""
    data = memoryview(b"".join(file.read_bytes() for file in source.iterdir()))

    def write() -> None:
        with path.open("xb", buffering=0) as file:
            for i in range(0, len(data), CHUNK):
                file.write(data[i : i + CHUNK])
            os.fsync(file.fileno())

    return timed(write)


def plain_read(directory: Path) -> None:
    """Read all files into the same memory."""
    buffer = bytearray(CHUNK)
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_from_cache(directory: Path) -> None:
    """Ask the system to forget files that are on the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_round(subject: Subject, root: Path) -> dict[str, float]:
    """Seconds of everything, once, in turn."""
    found: dict[str, float] = {}
    saved = root / "saved"
    found["save"] = timed(lambda: subject.save(saved))
    step = saved / "iter_0000001"
    found["plain write"] = timed_write(step, root / "plain")
    (root / "plain").unlink()
    for name in ("from the disk", "cached"):
        for what, action in (("plain read", plain_read), ("load", lambda _: subject.load(saved))):
            if name == "from the disk":
                drop_from_cache(step)
            found[f"{what} {name}"] = timed(lambda a=action: a(step))  # type: ignore[misc]
    started: list[PendingSave] = []
    found["stall"] = timed(lambda: started.append(subject.start(root / "async")))
    found["async"] = timed(started[0].finish)
    shutil.rmtree(saved)
    shutil.rmtree(root / "async")
    return found


def measure(rounds: int = ROUNDS) -> list[dict[str, float]]:
    """Seconds of each round; the first has memory that is touched for the first time."""
    config = configuration()
    with one_rank(config, VOCAB) as ctx, tempfile.TemporaryDirectory() as scratch:
        subject = Subject(config, ctx)
        return [one_round(subject, Path(scratch)) for _ in range(rounds)]


def records() -> list[Record]:
    """Throughput as a share of the plain one, and how long training waits."""
    first, *rounds = measure()

    def ratio(above: str, below: str) -> float:
        return statistics.median(found[above] / found[below] for found in rounds)

    def at_least(name: str, value: float) -> Record:
        met = value >= THROUGHPUT
        return Record(name=name, value=value, unit="x", target=f">= {THROUGHPUT}", met=met)

    stall = ratio("stall", "save")
    return [
        at_least("checkpoint/save over plain write and fsync", ratio("plain write", "save")),
        at_least(
            "checkpoint/load over plain read, from the disk",
            ratio("plain read from the disk", "load from the disk"),
        ),
        Record(
            name="checkpoint/load over plain read, cached",
            value=ratio("plain read cached", "load cached"),
            unit="x",
        ),
        Record(
            name="checkpoint/stall of an asynchronous save over a synchronous one",
            value=stall,
            unit="x",
            target=f"<= {STALL}",
            met=stall <= STALL,
        ),
        Record(
            name="checkpoint/the same, first save of a run",
            value=first["stall"] / first["save"],
            unit="x",
        ),
    ]


def main() -> None:
    """Print the records; with `--rounds` seconds of each round instead."""
    import sys

    from bench.run import table

    if sys.argv[1:] == ["--rounds"]:
        for found in measure():
            print("  ".join(f"{name} {seconds:.3f}" for name, seconds in found.items()))
    else:
        print(table(records()))


if __name__ == "__main__":
    main()
