"""A whole training step of the tiny preset: our MoE layer against Megatron-Core's, same model.

    python -m bench.train_step

Both have the same attention, norms, dense layers, loss, optimizer and platform module; only the MoE
layer differs: ours with the preset's own capacity rule and, since that rule drops more, with the
number of slots of Megatron-Core as well. One process; forward, backward and update; interleaved.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench._moe_layer_cases import CAPACITY_FACTOR, Shape, stock_layer
from bench._one_rank import one_rank
from bench.moe_layer import interleaved_seconds, median_ratio
from bench.record import Record
from megatron_moe.config import RunConfig
from megatron_moe.config.moe import CapacityRule
from megatron_moe.config.presets import PRESETS

PRESET = "openmoe-tiny"
VOCAB = 4096
"""The quickstart's vocabulary."""
SECONDS, ROUNDS = 120.0, (7, 60)
SPEEDUP = 1.3


class EngineMoE(nn.Module):
    """Megatron-Core's MoE layer under the interface of ours."""

    def __init__(self, config: RunConfig, factor: float | None, pgs: Any) -> None:
        super().__init__()
        train, model = config.train, config.model
        tokens = train.micro_batch_size * config.data.seq_length
        topk = config.moe.moe_router_topk
        width = config.moe.moe_ffn_hidden_size or model.ffn_hidden_size
        shape = Shape(config.moe.num_experts, topk, tokens, model.hidden_size, width)
        self.layer = stock_layer(shape, factor, pgs)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S, B, H] -> [S, B, H]."""
        return self.layer(x_SBH)[0]


def configuration(rule: CapacityRule) -> RunConfig:
    """The tiny preset with a capacity rule, one process, a few steps."""
    run = PRESETS[PRESET]
    return replace(
        run,
        moe=replace(run.moe, moe_capacity_rule=rule),
        data=replace(run.data, vocab_size=VOCAB),
        train=replace(run.train, train_iters=1000),
    )


def _run(config: RunConfig, ctx: Any, chunks: list[Any]) -> Any:
    """As `prepare_run`, without the logical names, which Megatron-Core's layer does not have."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_moe.training.optim.build import build_optimizer
    from megatron_moe.training.optim.freezing import Freezing
    from megatron_moe.training.plan import resolve_plan
    from megatron_moe.training.run import TrainingRun

    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunks[0].config, ddp, chunks[0], pg_collection=ctx.pgs)]
    optimizer = build_optimizer(config, wrapped, ctx.pgs)
    return TrainingRun(
        config=config,
        plan=resolve_plan(config, ctx.layout.global_batch_size),
        ctx=ctx,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        freezing=Freezing(config.optimizer, [], optimizer),
        vocab_size=VOCAB,
    )


def training_step(
    config: RunConfig, ctx: Any, moe: Callable[[], nn.Module] | None
) -> Callable[[], Any]:
    """One optimizer step over one global batch of random tokens.

    Args:
        config: of the run.
        ctx: its parallel context.
        moe: makes the MoE layer to put in the place of ours; ``None`` for ours.
    """
    from megatron_moe.data.batch import Batch
    from megatron_moe.model.build import build_model
    from megatron_moe.training.step import train_step

    chunks = build_model(config, ctx.layout, ctx.pgs, VOCAB, ctx.platform.device)
    for layer in chunks[0].decoder.layers:
        if layer.is_moe and moe is not None:
            layer.moe = moe()
    run = _run(config, ctx, chunks)
    rows, length = config.train.micro_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(0)
    # Token frequencies of text, roughly: experts fill unevenly, as they do in training.
    weights = torch.arange(1, VOCAB + 1, dtype=torch.float32).reciprocal()
    batches = []
    for _ in range(ctx.layout.num_microbatches):
        ids = torch.multinomial(weights.expand(rows, -1), length + 1, True, generator=generator)
        mask = torch.ones(rows, length)
        batches.append(Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask))
    return lambda: train_step(run, batches, 1e-4, 1)


def _candidates(ctx: Any) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what makes each training step."""
    t5x, port = configuration("t5x"), configuration("port")
    return {
        "ours": lambda: training_step(t5x, ctx, None),
        "ours, engine's capacity": lambda: training_step(port, ctx, None),
        "stock capacity": lambda: training_step(
            t5x, ctx, lambda: EngineMoE(t5x, CAPACITY_FACTOR, ctx.pgs)
        ),
        "stock dropless": lambda: training_step(t5x, ctx, lambda: EngineMoE(t5x, None, ctx.pgs)),
    }


def peak_memory(name: str) -> float:
    """Peak resident memory that one candidate adds to a process with Megatron-Core, in MiB."""
    command = [sys.executable, "-m", "bench.train_step", "--peak", name]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1])


def _print_peak(name: str) -> None:
    """In a process of its own: build one candidate, take three steps, print what that took."""
    with one_rank(configuration("t5x"), VOCAB) as ctx:
        # Linux: resets the peak, so that it does not include the imports.
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_kib()
        step = _candidates(ctx)[name]()
        for _ in range(3):
            step()
        print((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def records() -> list[Record]:
    """Ratios, tokens/s and peak memory of each."""
    with one_rank(configuration("t5x"), VOCAB) as ctx:
        candidates = {name: make() for name, make in _candidates(ctx).items()}
        times = interleaved_seconds(candidates, SECONDS, ROUNDS)
        tokens = ctx.layout.global_batch_size * ctx.layout.seq_length
    found = []
    for stock in ("stock capacity", "stock dropless"):
        for ours in ("ours", "ours, engine's capacity"):
            held = stock == "stock capacity" and ours == "ours"
            ratio = median_ratio(times[stock], times[ours])
            target, met = (f">= {SPEEDUP}", ratio >= SPEEDUP) if held else ("", None)
            name = f"train_step/{ours} over {stock}"
            found.append(Record(name=name, value=ratio, unit="x", target=target, met=met))
    for name, seconds in times.items():
        speed = tokens / statistics.median(seconds)
        found.append(Record(name=f"train_step/{name}", value=speed, unit="tokens/s"))
        memory = Record(name=f"train_step/{name}/peak", value=peak_memory(name), unit="MiB")
        found.append(memory)
    return found


def _main(arguments: list[str]) -> None:
    from bench.run import table

    if arguments[:1] == ["--peak"]:
        _print_peak(arguments[1])
    else:
        print(table(records()))


if __name__ == "__main__":
    _main(sys.argv[1:])
