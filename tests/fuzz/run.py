"""Fuzz every parser, coverage-guided (`make fuzz`), and write a table and a record.

    python -m tests.fuzz.run                          # 100,000 inputs for each, on one core
    python -m tests.fuzz.run --only t5x-tree --inputs 1000000

A crash is an exception that is no `UsageError`, a message with control characters or without an
end, an input that takes over a minute or 3 GB, or one that ends the process. The input is kept in
the folder of `--crashes`; add it to the seeds of its target together with the fix.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

import atheris

from megatron_moe.command_line import Parser
from megatron_moe.errors import UsageError, exit_on_usage_error
from tests.fuzz import worker
from tests.fuzz.target import Target

_SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None
_RESTARTS = 5
"""Times that a parser which ends its process is started again."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of the inputs of one parser."""

    parser: str
    inputs: int
    crashes: int
    """Distinct exceptions, and processes that ended."""
    seconds: float


def fuzz(target: Target, inputs: int, seconds: float, seed: int, crashes: Path) -> Result:
    """Fuzz one parser until a number of inputs or a time is reached."""
    start, done, faults, ended = time.monotonic(), 0, set(), 0
    while ended <= _RESTARTS and done < inputs and time.monotonic() - start < seconds:
        left = max(1, int(seconds - (time.monotonic() - start)))
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_SCRATCH) as scratch:
            folder = Path(scratch)
            limits = [f"-runs={inputs - done}", f"-max_total_time={left}", f"-seed={seed + ended}"]
            code = _in_child(target, folder, limits)
            done += int.from_bytes((folder / worker.COUNT).read_bytes(), "little")
            for line in _lines(folder / worker.FAULTS):
                fault = json.loads(line)
                if (key := (fault["error"], fault["place"])) not in faults:
                    faults.add(key)
                    what = f"{key[0]} at {key[1]}: {fault['says']}"
                    _keep(crashes, target.name, what, bytes.fromhex(fault["input"]))
            if code:
                ended += 1
                last = (folder / worker.LAST).read_bytes()
                _keep(crashes, target.name, f"the process ended with {code}", last)
    spent = round(time.monotonic() - start, 1)
    return Result(parser=target.name, inputs=done, crashes=len(faults) + ended, seconds=spent)


def _in_child(target: Target, folder: Path, flags: Sequence[str]) -> int:
    """Run a worker in a fork, which has the imports; return its exit code, or minus its signal."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    quiet = os.open(os.devnull, os.O_WRONLY)  # libFuzzer prints, and so do libraries
    for stream in (1, 2):
        os.dup2(quiet, stream)
    try:
        worker.work(target, folder, flags)
    finally:
        os._exit(0)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _keep(crashes: Path, name: str, what: str, content: bytes) -> None:
    crashes.mkdir(parents=True, exist_ok=True)
    file = crashes / f"{name}-{len(list(crashes.iterdir()))}"
    file.write_bytes(content)
    print(f"{name}: {what}; the input is {file}", file=sys.stderr, flush=True)


def table(results: Sequence[Result]) -> str:
    """A line per parser, and the sums."""
    rows = [(r.parser, f"{r.inputs:,}", str(r.crashes), f"{r.seconds:.0f}") for r in results]
    sums = (sum(r.inputs for r in results), sum(r.crashes for r in results))
    seconds = sum(r.seconds for r in results)
    rows = [("parser", "inputs", "crashes", "seconds"), *rows]
    rows += [(f"{len(results)} parsers", f"{sums[0]:,}", str(sums[1]), f"{seconds:.0f}")]
    return "\n".join(f"{a:<24}{b:>12}{c:>9}{d:>9}" for a, b, c, d in rows)


def write_record(path: Path, results: Sequence[Result]) -> None:
    """Write the results and the versions that they depend on."""
    names = ("atheris", "torch", "safetensors", "sentencepiece", "tokenizers", "tensorstore")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {"python": platform.python_version(), "versions": versions}
    path.write_text(
        json.dumps({**record, "parsers": [asdict(r) for r in results]}, indent=1) + "\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 1 after a crash."""
    parser = Parser("fuzz", __doc__)
    add = parser.add_argument
    add("--inputs", type=int, default=100_000, help="inputs for each parser (100000)")
    add("--seconds", type=float, default=1e9, help="for each parser at most (no limit)")
    add("--seed", type=int, default=1, help="another one reads other inputs (1)")
    add("--only", nargs="+", metavar="PARSER", help="of those in the table (all)")
    add("--record", type=Path, default=Path("fuzz.json"), help="(fuzz.json)")
    add("--crashes", type=Path, default=Path("fuzz-crashes"), help="(fuzz-crashes)")
    options = parser.parse_args(argv)
    with exit_on_usage_error("fuzz"):
        # Both report every module that is imported.
        with redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["megatron_moe"]):
            from tests.fuzz.targets import TARGETS
        names = options.only or list(TARGETS)
        if unknown := set(names) - set(TARGETS):
            raise UsageError("--only", " ".join(unknown), f"of {', '.join(TARGETS)}")
        results = []
        limits = (options.inputs, options.seconds, options.seed)
        for name in names:
            results.append(fuzz(TARGETS[name], *limits, options.crashes))
            print(table(results[-1:]).splitlines()[1], flush=True)
            write_record(options.record, results)
        print(f"\n{table(results)}")
    if any(result.crashes for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
