"""Analyses of weights that lie on disk: memory and time for one MoE layer of 34B/32E.

    python -m bench.weights_from_files

A native checkpoint with the widths of released 34B/32E in bf16, all 32 experts, in safetensors: 10
GB in `TMPDIR`, which are written first, and read as a user's are. The peak of anonymous memory is
what the analyses take; that of resident memory has the pages of files as well, which the system
takes back when somebody needs them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bench.record import Record
from bench.weights import MEMORY, layer_of_34b, measured
from megatron_moe.analysis.opening import open_model
from megatron_moe.convert.formats import ConversionTarget, write

NAME = "weights from files"
ROOM = 14.0
"""GB of disk that must be free: the file, and what others write meanwhile."""


def records() -> list[Record]:
    """Size of the file, then memory and time."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < ROOM:
        raise RuntimeError(f"{tempfile.gettempdir()} has {free:.1f} GB free, of {ROOM:g} needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        write(layer_of_34b(), ConversionTarget(format="native", path=folder), lambda _: None)
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e9
        found = measured(open_model(folder), NAME)
    most = _resident()
    target, met = f"<= {MEMORY:g}", most <= MEMORY
    return [
        Record(name=f"{NAME}/size of the files", value=size, unit="GB"),
        *found,
        Record(name=f"{NAME}/peak resident memory", value=most, unit="GB", target=target, met=met),
    ]


def _resident() -> float:
    """The most memory of this process, mapped files included, in 10^9 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
