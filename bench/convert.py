"""What a conversion takes: memory, and time as a ratio of copying the same bytes.

    python -m bench.convert

The checkpoint has the widths of 34B/32E in bf16, so that its tensors are as large as they get (one
expert is 226 MB), but two layers and four experts: 1.9 GB.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.record import Record
from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.model import LazyTensor, LogicalModel
from megatron_moe.model.logical import logical_parameters
from megatron_moe.platform.device import release_freed_memory

VOCAB = 4096
MEMORY = 8.0
"""GB: the bound for converting 34B/32E, stated for the whole model; parts do not grow with it."""


class Peak:
    """The most anonymous memory that this process had while it was open, above that at the start.

    Mapped files are the page cache's business: they are given back when somebody needs the memory.
    """

    def __enter__(self) -> Peak:
        release_freed_memory()
        self.start = self.most = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def gb(self) -> float:
        """In 10^9 bytes."""
        return (self.most - self.start) * 1024 / 1e9

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])


def _model() -> LogicalModel:
    """Weights that take no memory until they are read."""
    run = PRESETS["openmoe-34b-32e-released"]
    moe = replace(run.moe, num_experts=4, moe_layer_freq="[0,1]")
    config = replace(RunConfig(), model=replace(run.model, num_layers=2), moe=moe)
    return synthetic_model(config, VOCAB, torch.randn(1 << 20).bfloat16())


def synthetic_model(config: RunConfig, vocab: int, values: torch.Tensor) -> LogicalModel:
    """A model whose tensors are made of ``values``, each from a place of its own, over and over."""
    parameters = logical_parameters(config.model, config.moe, vocab)
    tensors = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        tensors[name] = _repeating(parameter.shape, values, number * 7919)
    return LogicalModel(source="synthetic", config=config, vocab_size=vocab, tensors=tensors)


def _repeating(shape: tuple[int, ...], values: torch.Tensor, offset: int) -> LazyTensor:
    width = torch.Size(shape[1:]).numel()

    def rows(start: int, stop: int) -> torch.Tensor:
        first, count = (offset + start * width) % len(values), (stop - start) * width
        found = values.repeat((first + count) // len(values) + 1)[first : first + count]
        return found.view(stop - start, *shape[1:])

    return LazyTensor(shape, values.dtype, rows)


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and GB of memory."""
    with Peak() as peak:
        before = time.perf_counter()
        action()
        seconds = time.perf_counter() - before
    return seconds, peak.gb


def _copy(source: Path, target: Path) -> None:
    """Plainly, file by file, and synced as conversions are."""
    import os

    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())


def records() -> list[Record]:
    """Native to both Hugging Face layouts and back."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        native = ConversionTarget(format="native", path=root / "native")
        step = write(_model(), native, lambda _: None)
        plain, _ = _timed(lambda: _copy(step, root / "copy"))
        shutil.rmtree(root / "copy")
        source = native
        for layout in ("stacked", "unstacked"):
            hf = ConversionTarget(format="hf", path=root / layout, layout=layout)  # type: ignore[arg-type]
            back = ConversionTarget(format="native", path=root / f"back-{layout}")
            for origin, target in ((source, hf), (hf, back)):
                seconds, gb = _timed(
                    lambda o=origin, t=target: write(  # type: ignore[misc]
                        read(o.format, o.path), t, lambda _: None
                    )
                )
                name = f"convert/{origin.format} to {target.format}, {layout}"
                met = gb <= MEMORY
                memory = f"{name}/peak memory"
                target_text = f"<= {MEMORY}"
                found.append(Record(name=memory, value=gb, unit="GB", target=target_text, met=met))
                ratio = seconds / plain
                found.append(Record(name=f"{name}/time over a copy", value=ratio, unit="x"))
            shutil.rmtree(hf.path)
            shutil.rmtree(back.path)
    return found


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
