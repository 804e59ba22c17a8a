"""What the analyses add to a forward pass over the tokens.

    python -m bench.analysis

The model is the tiny preset in its released variant (24M parameters), the worst case: what is
counted for a token depends on its layers and choices alone, while the arithmetic of a larger model
grows with its width. The plain pass computes the loss of every token, as tools/evaluate.py does;
the observed one runs every collector of every analysis, and the analyses follow it, those with
passes of their own included. All are timed at two lengths: analyses of single experts look at a
bounded number of tokens, so that the cost of 1M tokens is extrapolated along a line.
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
from megatron_moe.analysis.base import Material, all_analyses
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
ROUNDS, DRAWS = 3, 200
SLOWEST = ("expert-ablation", "misrouting", "super-experts")
"""Analyses with passes of their own."""


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


class _Observed:
    """The observed pass over a sample, and the analyses after it."""

    def __init__(self, model: MoEModel, runner: MoERunner, sample: Sample) -> None:
        setting = Setting(sizes=model.sizes, sample=sample, layers=model.sizes.moe_layers, seed=1)
        self.analyses = [each for each in all_analyses().values() if each.needs_data]
        self.runner, self.sample = runner, sample
        names = sorted({name for each in self.analyses for name in each.uses})
        self.made = {name: make_collector(name, setting) for name in names}
        self.material = Material(
            model=model, setting=setting, collected=self.made, runner=runner, draws=DRAWS
        )

    def collect(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "pass"
            stream(
                self.runner,
                self.sample,
                self.made,
                state=state,
                fingerprint="",
                advance=lambda _: None,
            )

    def compute(self) -> dict[str, float]:
        """Seconds of each analysis."""
        return {
            each.key: _seconds(lambda a=each: a.compute(self.material))  # type: ignore[misc]
            for each in self.analyses
        }


def _seconds(function: Callable[[], None]) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def records() -> list[Record]:
    """The passes and the analyses at two lengths, and their ratios at 1M tokens."""
    with tempfile.TemporaryDirectory() as name:
        model = open_model(_checkpoint(Path(name) / "checkpoint"))
        prefix = _corpus(Path(name) / "text")
        runner = model.load("cpu", torch.float32)
        samples = [
            read_sample([prefix], tokens=tokens, seq_length=LENGTH, batch_size=ROWS)
            for tokens in (SHORT, LONG)
        ]
        _plain(runner, samples[0])
        rounds = [[_timed(model, runner, sample) for sample in samples] for _ in range(ROUNDS)]
    plain, collect, compute = (
        [statistics.median(each[length][part] for each in rounds) for length in (0, 1)]
        for part in ("plain", "collect", "compute")
    )
    whole = _at_whole(*plain)
    collectors = _at_whole(*collect) / whole
    ratio = collectors + _at_whole(*compute) / whole
    slowest = sorted(SLOWEST, key=lambda key: -rounds[0][1][key])
    return [
        Record(name="analysis/plain pass", value=LONG / plain[1], unit="tokens/s"),
        Record(name="analysis/all collectors", value=LONG / collect[1], unit="tokens/s"),
        Record(name="analysis/collectors, 1M tokens over a plain pass", value=collectors, unit="x"),
        Record(
            name="analysis/1M tokens over a plain pass",
            value=ratio,
            unit="x",
            target=f"<= {RATIO}",
            met=ratio <= RATIO,
        ),
        *(
            Record(
                name=f"analysis/{key} after the pass",
                value=statistics.median(each[1][key] for each in rounds),
                unit="s",
            )
            for key in slowest
        ),
    ]


def _timed(model: MoEModel, runner: MoERunner, sample: Sample) -> dict[str, float]:
    """Seconds of the passes, of all analyses and of each."""
    observed = _Observed(model, runner, sample)
    plain = _seconds(lambda: _plain(runner, sample))
    collect = _seconds(observed.collect)
    each = observed.compute()
    return {"plain": plain, "collect": collect, "compute": sum(each.values()), **each}


def _at_whole(short: float, long: float) -> float:
    """Seconds for `WHOLE` tokens on the line through both measurements."""
    slope = (long - short) / (LONG - SHORT)
    return long + slope * (WHOLE - LONG)


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
