"""One parser under atheris, in a process of its own, which the parser may end.

What was read so far is in files that the parent reads.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import atheris

from tests.fuzz.mutation import replace_anywhere
from tests.fuzz.target import Target, attempt

COUNT, FAULTS, LAST = "count", "faults.jsonl", "last"
"""Files of a worker: inputs read (8 bytes), unexpected exceptions, the input that is being read."""
_LIMITS = ("-max_len=20000", "-timeout=60", "-rss_limit_mb=3000", "-verbosity=0")
"""Of libFuzzer: bytes of an input, seconds and memory for one."""


def work(target: Target, folder: Path, flags: Sequence[str]) -> None:
    """Fuzz until libFuzzer's limits, or until the parser ends the process.

    Args:
        target: the parser.
        folder: for `COUNT`, `FAULTS`, `LAST` and scratch files; it is empty.
        flags: of libFuzzer, `-runs=N`, `-max_total_time=S`.
    """
    opened = target.make(_new(folder / "case"))
    corpus = _new(folder / "corpus")
    for number, content in enumerate((opened.file.read_bytes(), *target.seeds)):
        (corpus / str(number)).write_bytes(content)
    (folder / COUNT).write_bytes(bytes(8))
    seen: set[tuple[str, str]] = set()
    with (folder / COUNT).open("r+b") as stream:
        count = mmap.mmap(stream.fileno(), 8)

    def once(content: bytes) -> None:
        count[:] = (int.from_bytes(count[:], "little") + 1).to_bytes(8, "little")
        (folder / LAST).write_bytes(content)
        try:
            attempt(opened, content)
        except Exception as error:
            place = _place(error)
            if (type(error).__name__, place) not in seen:
                seen.add((type(error).__name__, place))
                fault = {"error": type(error).__name__, "place": place, "says": str(error)[:300]}
                with (folder / FAULTS).open("a") as faults:
                    faults.write(json.dumps({**fault, "input": content.hex()}) + "\n")

    arguments = [sys.argv[0], *_LIMITS, *flags, f"-artifact_prefix={folder}/", str(corpus)]
    atheris.Setup(arguments, once, custom_mutator=_mutate)
    atheris.Fuzz()


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _mutate(data: bytes, most: int, seed: int) -> bytes:
    """Another value in a JSON file, half of the time; else libFuzzer's mutations of bytes."""
    source = random.Random(seed)
    if source.random() < 0.5:
        try:
            value: Any = json.loads(data)
            changed = json.dumps(replace_anywhere(value, source)).encode()
        except (ValueError, RecursionError):
            pass
        else:
            if len(changed) <= most:
                return changed
    mutated: bytes = atheris.Mutate(data, most)
    return mutated


def _place(error: Exception) -> str:
    """File and line of this project in which an exception passed last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "megatron_moe" in frame.filename] or frames
    return f"{ours[-1].filename.split('megatron_moe/')[-1]}:{ours[-1].lineno}"
