"""What the analyses add to a forward pass over the tokens.

    python -m bench.analysis

The model is the tiny preset in its released variant (24M parameters), the worst case: what is
counted for a token depends on its layers and choices alone, while the arithmetic of a larger model
grows with its width. The plain pass computes the loss of every token, as tools/evaluate.py does;
the other runs every collector of every analysis. Both are timed at two lengths: analyses of single
experts look at a bounded number of tokens, so that the cost of 1M tokens is extrapolated along a
line.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.record import Record
from megatron_moe.analysis.base import Analysis, all_analyses
from megatron_moe.analysis.collector import Setting, make_collector
from megatron_moe.analysis.model import MoEModel, MoERunner
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.sample import Sample, read_sample
from megatron_moe.analysis.stream import stream
from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.model import LogicalModel, of_tensor
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.model.reference import ReferenceOpenMoE

VOCAB, LENGTH, ROWS = 8192, 512, 8
SHORT, LONG, WHOLE = 1 << 15, 1 << 17, 1 << 20
"""Tokens of the two timed samples, and of the one that is asked for."""
RATIO = 1.3


def _checkpoint(folder: Path) -> Path:
    """The tiny preset with random weights."""
    config = PRESETS["openmoe-tiny-released"]
    data = DataConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB)
    run = RunConfig(model=config.model, moe=config.moe, data=data)
    model = ReferenceOpenMoE(config.model, config.moe, VOCAB, seed=1)
    source = LogicalModel(
        source="the benchmark",
        config=run,
        vocab_size=VOCAB,
        tensors={name: of_tensor(tensor) for name, tensor in model.state_dict().items()},
        step=1,
        tokenizer_hash="",
    )
    write(source, ConversionTarget(format="native", path=folder), lambda _: None)
    return folder


def _corpus(prefix: Path) -> str:
    """Documents of 1000 tokens whose ids are distributed as words are (Zipf)."""
    draw = np.random.default_rng(1)
    with IndexedWriter(str(prefix), VOCAB) as writer:
        for _ in range(LONG // 1000 + 2):
            writer.add_document((draw.zipf(1.2, 1000) % (VOCAB - 2) + 1).tolist())
    return str(prefix)


def _plain(runner: MoERunner, sample: Sample) -> None:
    for batch in sample.batches():
        runner.run(batch, predictions=True)


def _observed(model: MoEModel, runner: MoERunner, sample: Sample, analyses: list[Analysis]) -> None:
    setting = Setting(sizes=model.sizes, sample=sample, layers=model.sizes.moe_layers, seed=1)
    names = sorted({name for each in analyses for name in each.uses})
    made = {name: make_collector(name, setting) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "pass"
        stream(runner, sample, made, state=state, fingerprint="", advance=lambda _: None)


def _seconds(function: Callable[[], None]) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def records() -> list[Record]:
    """Both passes at two lengths, and their ratio at 1M tokens."""
    analyses = [each for each in all_analyses().values() if each.needs_data]
    with tempfile.TemporaryDirectory() as name:
        model = open_model(_checkpoint(Path(name) / "checkpoint"))
        prefix = _corpus(Path(name) / "text")
        runner = model.load("cpu", torch.float32)
        samples = [
            read_sample([prefix], tokens=tokens, seq_length=LENGTH, batch_size=ROWS)
            for tokens in (SHORT, LONG)
        ]
        _plain(runner, samples[0])
        times = [
            (
                [_seconds(lambda s=s: _plain(runner, s)) for s in samples],  # type: ignore[misc]
                [_seconds(lambda s=s: _observed(model, runner, s, analyses)) for s in samples],  # type: ignore[misc]
            )
            for _ in range(3)
        ]
    plain, observed = (
        [statistics.median(each[way][length] for each in times) for length in (0, 1)]
        for way in (0, 1)
    )
    ratio = _at_whole(*observed) / _at_whole(*plain)
    return [
        Record(name="analysis/plain pass", value=LONG / plain[1], unit="tokens/s"),
        Record(name="analysis/all collectors", value=LONG / observed[1], unit="tokens/s"),
        Record(
            name="analysis/1M tokens over a plain pass",
            value=ratio,
            unit="x",
            target=f"<= {RATIO}",
            met=ratio <= RATIO,
        ),
    ]


def _at_whole(short: float, long: float) -> float:
    """Seconds for `WHOLE` tokens on the line through both measurements."""
    slope = (long - short) / (LONG - SHORT)
    return long + slope * (WHOLE - LONG)


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
