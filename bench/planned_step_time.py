"""The planner's step time against steps that are measured here.

    python -m bench.planned_step_time

A profile of this machine is measured on two ranks at once, as they share its memory: GEMMs,
attention, copies, small kernels, gloo's collectives. With it, `step_time` predicts a step of each
layout, and the steps are taken. Every rank has one thread.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.record import Record
from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.planning.cluster import Cluster, load_cluster

VOCAB = 4096
LAYOUTS = {
    "1 rank": (1, ""),
    "1 rank, full recomputation": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "DP 2": (2, ""),
    "EP 2": (2, "--expert-model-parallel-size 2"),
    "TP 2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP 2": (2, "--pipeline-model-parallel-size 2"),
}
_LINE = (
    "--preset openmoe-tiny --num-layers 4 --moe-layer-freq [0,1]*2 --hidden-size 512 "
    "--ffn-hidden-size 2048 --num-attention-heads 8 --kv-channels 64 --num-experts 8 "
    "--vocab-size 4096 --seq-length 256 --micro-batch-size 4 --global-batch-size 16 --lr 1e-4 "
    "--train-iters 100"
)
STEPS = 5
REPEATS = 7
WITHIN = 1.3
"""Measured over predicted, or the reverse, of every layout."""


def configuration(flags: str) -> RunConfig:
    """The model in one layout."""
    return parse_args([*_LINE.split(), *flags.split()]).config


def _best(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _compute_figures() -> dict[str, float]:
    """Of this rank, while the others measure the same."""
    from torch.nn.functional import scaled_dot_product_attention

    rows, width = 1024, 2048
    a, b = torch.randn(rows, width), torch.randn(width, width)
    product = torch.empty(rows, width)
    peak = 2 * rows * width * width / _best(lambda: torch.mm(a, b, out=product))
    heads = torch.randn(4, 8, 256, 64)
    # Half of the two products, the causal part, as the planner counts it.
    arithmetic = 4 * 8 * 256 * 256 * 64 * 2
    attention = _best(lambda: scaled_dot_product_attention(heads, heads, heads, is_causal=True))
    x = torch.randn(1 << 24)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / _best(lambda: y.copy_(x))
    layer = torch.randn(1024, 512)
    other = torch.randn(1024, 512)
    streamed = 3 * layer.nbytes / _best(lambda: torch.mul(layer, other))
    small = torch.ones(8)
    kernel = _best(lambda: [torch.add(small, small) for _ in range(1000)]) / 1000
    return {
        "peak": peak,
        "attention": arithmetic / attention / peak,
        "bandwidth": bandwidth,
        "streamed": min(1.0, streamed / bandwidth),
        "kernel": kernel,
    }


def _profile() -> Cluster:
    """Of this machine, the same on all ranks."""
    from megatron_moe.planning.link_speed import link_speed

    mine = _compute_figures()
    found = torch.tensor([*mine.values()], dtype=torch.float64)
    dist.all_reduce(found)
    figures = dict(zip(mine, (found / dist.get_world_size()).tolist(), strict=True))
    world, cpu = dist.group.WORLD, torch.device("cpu")
    assert world is not None
    speeds = [
        link_speed("gloo", operation, world, 2, 16, cpu).gigabytes_per_second
        for operation in ("all-to-all", "all-reduce")
    ]
    tiny = torch.ones(1)
    latency = _best(lambda: [dist.all_reduce(tiny) for _ in range(100)]) / 100
    changes = {
        "name": "this machine",
        "gpu": "CPU core",
        "fp32_tflops": figures["peak"] / 1e12,
        "bf16_tflops": figures["peak"] / 1e12,
        "gemm_efficiency": 1.0,
        "attention_efficiency": figures["attention"],
        "memory_bandwidth": figures["bandwidth"] / 1e9,
        "memory_efficiency": figures["streamed"],
        "multiprocessors": 1,
        "kernel_microseconds": figures["kernel"] * 1e6,
        "gpus_per_node": 2,
        "intra_bandwidth": statistics.mean(speeds),
        "intra_microseconds": latency * 1e6,
    }
    return load_cluster("h100", changes)


def _measured_step(world_size: int, flags: str) -> float:
    """Seconds of a step on this rank."""
    from megatron_moe.data.batch import Batch
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.context import destroy_parallel, initialize_parallel
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.platform import activate
    from megatron_moe.training.plan import resolve_plan
    from megatron_moe.training.run import prepare_run
    from megatron_moe.training.step import train_step

    config = configuration(flags)
    platform = activate()
    layout = resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, 1)
    try:
        chunks = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
        plan = resolve_plan(config, layout.global_batch_size)
        run = prepare_run(config, plan, ctx, chunks, VOCAB)
        shape = layout.micro_batch_size, layout.seq_length + 1
        generator = torch.Generator().manual_seed(ctx.dp_rank)
        batches: list[Batch | None] = []
        for _ in range(layout.num_microbatches):
            ids = torch.randint(0, VOCAB, shape, generator=generator)
            mask = torch.ones(shape[0], shape[1] - 1)
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)
            batches.append(batch if ctx.needs_data else None)
        times = []
        for number in range(2 + STEPS):
            dist.barrier()
            before = time.perf_counter()
            train_step(run, batches, 1e-4, number + 1)
            dist.barrier()
            times.append(time.perf_counter() - before)
        return statistics.median(times[2:])
    finally:
        destroy_parallel()


def _rank(rank: int, world_size: int, store: str, results: Any) -> None:
    """One rank: the profile if there are two, and every layout of so many ranks."""
    torch.set_num_threads(1)
    for layout, (size, flags) in LAYOUTS.items():
        if size != world_size:
            continue
        # Each layout makes its groups in a world of its own.
        file = dist.FileStore(f"{store}-{layout.replace(' ', '-')}", world_size)
        dist.init_process_group(
            "gloo", store=file, rank=rank, world_size=size, timeout=timedelta(minutes=5)
        )
        if world_size == 2 and layout == "DP 2":
            profile = _profile()
            if rank == 0:
                results.put(("profile", dataclasses.asdict(profile)))
        seconds = _measured_step(size, flags)
        if rank == 0:
            results.put((layout, seconds))
        if dist.is_initialized():
            dist.destroy_process_group()


def measured() -> dict[str, Any]:
    """The profile, and seconds of a step by layout."""
    context, found = get_context("spawn"), {}
    for world_size in (2, 1):
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            store = str(Path(folder) / "store")
            ranks = [
                context.Process(target=_rank, args=(rank, world_size, store, results))
                for rank in range(world_size)
            ]
            for process in ranks:
                process.start()
            expected = sum(size == world_size for size, _ in LAYOUTS.values()) + (world_size == 2)
            found.update(dict(results.get(timeout=600) for _ in range(expected)))
            for process in ranks:
                process.join()
    return found


def records() -> list[Record]:
    """The profile, and measured over predicted seconds of every layout."""
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.planning.layout_plan import evaluate

    found = measured()
    profile = Cluster(**found.pop("profile"))
    rows = [
        Record(name="planner/GEMM of a core", value=profile.fp32_tflops * 1e3, unit="GFLOP/s"),
        Record(name="planner/memory of a core", value=profile.memory_bandwidth, unit="GB/s"),
        Record(name="planner/gloo", value=profile.intra_bandwidth, unit="GB/s"),
    ]
    for name, (size, flags) in LAYOUTS.items():
        config = configuration(flags)
        layout = resolve_layout(config, size, VOCAB)
        predicted = evaluate(config, layout, VOCAB, profile).time.total
        ratio = found[name] / predicted
        rows += [
            Record(name=f"planner/{name}/measured step", value=found[name], unit="s"),
            Record(
                name=f"planner/{name}/measured over predicted",
                value=ratio,
                unit="x",
                target=f"within {WITHIN}x",
                met=1 / WITHIN <= ratio <= WITHIN,
            ),
        ]
    return rows


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))
