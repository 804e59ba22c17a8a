"""`make soak`: a tiny run disturbed at random must be, to the bit, one that was not.

    python -m tests.soak [--steps 2000] [--interval 40] [--seed 1] [--out soak.json]

Two ranks with experts over both, a data-loader worker each, a save every 5 steps, synchronous or
not by start. Ranks, workers and the launcher are killed, terminated and stopped, and the disk is
filled; the run is started again until it ends. Then: every step once in the metrics file, equal to
the undisturbed run's, but for those of which a start says on a full disk that it leaves the file
out; the last checkpoint equal byte for byte; exactly the checkpoints to keep, all
valid; no process left behind, no start that hangs, no checkpoint lost. The undisturbed run's memory
and descriptors do not grow. Exits with 1 at a violation; the record is written in any case, and the
logs of all starts beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

from tests.soak.disk import small_disk
from tests.soak.supervised import DISK, FAULTS, Record, Sample, Supervised, metrics_of
from tests.training.tiny import MODEL, write_corpus

SAVE_INTERVAL, KEEP = 5, 3
DISK_MEBIBYTES = 64
HANG_SECONDS = 30
"""A start whose rank or worker is stopped ends after this."""


def arguments(corpus: str, directory: Path, steps: int) -> Callable[[random.Random], list[str]]:
    """The command line of each start."""
    fixed = [*MODEL, "--data-path", corpus, "--train-iters", str(steps), "--save", str(directory)]
    fixed += ["--load", str(directory), "--allow-missing-load", "--exit-signal-handler"]
    fixed += ["--save-interval", str(SAVE_INTERVAL), "--keep-last", str(KEEP)]
    fixed += ["--metrics-file", str(directory / "metrics.jsonl"), "--log-interval", "1"]
    fixed += ["--expert-model-parallel-size", "2", "--hidden-dropout", "0.1", "--num-workers", "1"]
    fixed += ["--hang-timeout", str(HANG_SECONDS)]
    return lambda draw: [*fixed, *(["--async-save"] if draw.random() < 0.5 else [])]


def differences(
    disturbed: Path, plain: Path, steps: int, without_metrics: Collection[int]
) -> list[str]:
    """What the disturbed run's directory lacks of the plain run's, and what it has besides.

    Args:
        disturbed: its directory.
        plain: that of the run without faults.
        steps: of both.
        without_metrics: steps whose metrics may be missing.
    """
    from megatron_moe.checkpoint import verify
    from megatron_moe.checkpoint.directory import revisions

    found = []
    kept = revisions(disturbed)
    if len(kept) != KEEP or max(kept) != steps:
        return [f"checkpoints of steps {sorted(kept)} are kept"]
    ours = metrics_of(disturbed)
    theirs = {line["iteration"]: line for line in metrics_of(plain)}
    present = [line["iteration"] for line in ours]
    missing = sorted(set(range(1, steps + 1)) - set(present) - set(without_metrics))
    if missing or present != sorted(set(present)):
        found.append(f"the metrics file does not have every step once, it lacks {missing[:5]}")
    different = [line["iteration"] for line in ours if line != theirs.get(line["iteration"])]
    if different:
        found.append(f"{len(different)} steps differ, the first is {different[0]}")
    last = f"iter_{steps:07d}"
    for path in sorted((plain / last).glob("*.safetensors")):
        if path.read_bytes() != (disturbed / last / path.name).read_bytes():
            found.append(f"{last}/{path.name} differs")
    for step in kept:
        try:
            verify(disturbed, step)
        except Exception as error:
            found.append(f"step {step}: {error}")
    hidden = [path.name for path in disturbed.iterdir() if path.name.startswith(".")]
    if hidden:
        found.append(f"left in the directory: {', '.join(hidden)}")
    return found


def growth(samples: list[Sample]) -> tuple[float, float]:
    """Memory and descriptors of the last quarter of a run, relative to its second quarter."""
    quarter = max(len(samples) // 4, 1)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]

    def ratio(name: str) -> float:
        medians = [statistics.median(getattr(s, name) for s in part) for part in (early, late)]
        return medians[1] / medians[0]

    return ratio("memory"), ratio("descriptors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--interval", type=float, default=40.0, help="mean steps between faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    logs = options.out.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        plain, disturbed, mounted = run_both(Path(name), logs, options)
        record = {
            "steps": options.steps,
            "seed": options.seed,
            "seconds": round(time.monotonic() - began),
            "full disk": mounted,
            "starts": disturbed.starts,
            "faults": dict(sorted(disturbed.faults.items())),
            "repeated steps": disturbed.repeated_steps,
            "slowest end after a fault, seconds": round(disturbed.slowest_end, 1),
            "steps without metrics, as announced": len(disturbed.without_metrics),
            "violations": disturbed.violations,
        }
        if plain.samples:
            memory, descriptors = growth(plain.samples)
            record["memory, last quarter to second"] = round(memory, 3)
            record["descriptors, last quarter to second"] = round(descriptors, 3)
            if memory > 1.05 or descriptors > 1.05:
                disturbed.violations.append("memory or descriptors grow")
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 1 if disturbed.violations else 0


def run_both(folder: Path, logs: Path, options: argparse.Namespace) -> tuple[Record, Record, bool]:
    """The plain run and the disturbed one, with what differs among its violations."""
    corpus, steps = write_corpus(folder / "corpus"), options.steps
    log = lambda line: print(line, flush=True)  # noqa: E731
    plain = folder / "plain"
    log(f"{steps} steps without a fault")
    draw = random.Random(options.seed)
    first = Supervised(plain, arguments(corpus, plain, steps), (), options.interval, draw, logs)
    calm = first.run(steps, log)
    with small_disk(folder / "disk", DISK_MEBIBYTES) as mounted:
        directory = folder / "disk" / "disturbed"
        faults = FAULTS if mounted else tuple(fault for fault in FAULTS if fault is not DISK)
        log(f"{steps} steps with a fault about every {options.interval:g}")
        argv = arguments(corpus, directory, steps)
        second = Supervised(directory, argv, faults, options.interval, draw, logs)
        record = second.run(steps, log)
        record.violations += calm.violations + differences(
            directory, plain, steps, record.without_metrics
        )
    return calm, record, mounted


if __name__ == "__main__":
    sys.exit(main())
