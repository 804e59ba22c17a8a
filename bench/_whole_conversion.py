"""The whole of 34B/32E through the converter: every tensor, every file, peak memory of the process.

    python -m bench._whole_conversion DIRECTORY [--layers N] [--layout unstacked]

Not part of `make bench`: it writes 93 GB three times, and takes as long as that takes. The values
are mostly zeros, with others strewn in, so that a file system that compresses needs little:

    truncate -s 400G disk.img && mkfs.btrfs disk.img
    mount -o loop,compress-force=zstd:1 disk.img DIRECTORY

Each conversion is `tools/convert_checkpoint.py` in a process of its own. What comes back must be
the files that it started from: the same SHA-256 in the manifest. Exit code 1 if not, or if more
memory was needed than the target.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.convert import MEMORY, synthetic_model
from megatron_moe.command_line import Parser
from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.formats import ConversionTarget, write

VOCAB = 256384
"""Of the released models."""
NON_ZERO = 1 / 512
"""Share of the values that are not zero."""
ROOT = Path(__file__).resolve().parent.parent


def make_source(directory: Path, layers: int | None) -> tuple[int, int]:
    """Write the checkpoint that is converted; returns its parameters and bytes."""
    run = PRESETS["openmoe-34b-32e-released"]
    model, moe = run.model, run.moe
    if layers is not None:
        model = replace(model, num_layers=layers)
        moe = replace(moe, moe_layer_freq=f"([0]*3+[1])*{layers // 4}")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 << 20, generator=generator)
    values *= torch.rand(1 << 20, generator=generator) < NON_ZERO
    config = replace(RunConfig(), model=model, moe=moe)
    source = synthetic_model(config, VOCAB, values.bfloat16())
    write(source, ConversionTarget(format="native", path=directory), lambda _: None)
    return source.bytes // 2, source.bytes


def convert(*flags: str) -> tuple[float, float]:
    """Run the command; returns seconds, and the most GB that it held, mapped files included."""
    command = [sys.executable, "tools/convert_checkpoint.py", *flags]
    before = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(flags)}: exit code {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - before, usage.ru_maxrss * 1024 / 1e9


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every tensor file, from the manifest that was written with them."""
    (manifest,) = directory.glob("iter_*/manifest.json")
    files = json.loads(manifest.read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if "safetensors" in name}


def main(argv: Sequence[str] | None = None) -> int:
    """Make, convert, convert back, compare."""
    parser = Parser("_whole_conversion.py", (__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="empty, with room for three checkpoints")
    parser.add_argument("--layers", type=int, help="a multiple of 4, by default all 32")
    parser.add_argument("--layout", choices=("stacked", "unstacked"), default="stacked")
    options = parser.parse_args(argv)
    native, hf, back = (options.directory.resolve() / name for name in ("native", "hf", "back"))
    parameters, size = make_source(native, options.layers)
    print(f"{parameters / 1e9:.2f}B parameters, {size / 1e9:.1f} GB", flush=True)
    expected, most = hashes(native), 0.0
    layout = ("--expert-layout", options.layout)
    steps = (("native", native, "hf", hf, *layout), ("hf", hf, "native", back))
    for source, load, target, save, *more in steps:
        paths = ("--from", source, "--load", str(load), "--to", target, "--save", str(save))
        seconds, gb = convert(*paths, *map(str, more))
        most = max(most, gb)
        rate = size / seconds / 1e9
        print(f"{source} to {target}: {seconds:.0f} s, {rate:.2f} GB/s, {gb:.2f} GB", flush=True)
        shutil.rmtree(load)
    same = hashes(back) == expected
    print(f"{len(expected)} files: {'the same' if same else 'OTHER'} as at the start")
    return 0 if same and most <= MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
