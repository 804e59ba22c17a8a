"""The time of a step on a cluster: a roofline for each kernel, and the schedule of the stages.

- A matrix product takes the longer of its arithmetic, at the share of the peak that the largest
  products reach and with whole waves of tiles, and its bytes.
- Everything else takes its bytes at a share of the memory's bandwidth.
- No kernel starts before the host has launched it.
- Collectives of tensor and expert parallelism wait for what they send and are waited for, but for
  exchanges of experts in chunks, which hide behind products.
- Stages exchange micro-batches in the order of their schedule (`stage_schedule.py`), passes of
  different stages at the same time: the bubble follows.
- Gradient reduction and parameter gathering are hidden behind the last backward and the first
  forward passes as far as these are long enough, if they are overlapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_moe.config import RunConfig
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.memory import MemoryByCategory
from megatron_moe.planning.muon import MATRIX_BYTES, MuonShare, muon_shares
from megatron_moe.planning.placement import place_of, seconds_of
from megatron_moe.planning.stage_plan import ChunkPlan, Part, chunk_plans
from megatron_moe.planning.stage_schedule import Pass, passes_of
from megatron_moe.planning.tensor_sizes import TensorSizes
from megatron_moe.planning.traffic import Transfer, reductions
from megatron_moe.planning.work import Gemm, Work

TILE = (128, 256)
"""Rows and columns of the result that one multiprocessor computes at once in large products
(NVIDIA's matrix multiplication background guide)."""
SIMULATED_ROUNDS = 4
"""Micro-batches that are simulated, in multiples of the pipeline size; the steady state repeats."""
UPDATE_BYTES = {"adam": 30, "sgd": 14, "adafactor": 50}
"""Moved for each parameter of an optimizer's share. Adam: gradient 4, master and moments 12 read
and 12 written, parameter 2. SGD: gradient 4, master 8, parameter 2; a momentum takes
`MOMENTUM_BYTES` more. Adafactor (`training/optim/adafactor.py`) reads the gradient along rows and
columns, 8, and the master, 4; scales the gradient in place by both statistics, 16; reads it for the
clipping, 4, and for the update, 4 with 8 of the master; and copies the master, 6."""
MOMENTUM_BYTES = 8
GRADIENT_BYTES = 12
"""Moved for each parameter of a rank: set to zero, read for the norm, scaled."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass of one micro-batch through one chunk."""

    compute: float
    transfers: float

    @property
    def total(self) -> float:
        """Both, one after the other."""
        return self.compute + self.transfers


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step."""

    pipeline: float
    """All micro-batches through all stages."""
    busy: float
    """Of that, passes of the mean stage."""
    reduction: float
    """Gradients and parameters over data-parallel ranks, as far as nothing hides it."""
    optimizer: float
    forward: tuple[tuple[PassTime, ...], ...]
    """Of each stage and chunk."""
    backward: tuple[tuple[PassTime, ...], ...]
    flops: tuple[int, ...]
    """Arithmetic that a rank of each stage does, padding and recomputation included."""

    @property
    def total(self) -> float:
        """Of the step."""
        return self.pipeline + self.reduction + self.optimizer

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which the mean stage waits: fill, drain, imbalance."""
        return 1.0 - self.busy / self.pipeline

    @property
    def imbalance(self) -> float:
        """Arithmetic of the busiest stage over that of the mean stage."""
        return max(self.flops) * len(self.flops) / sum(self.flops)


def gemm_seconds(gemm: Gemm, cluster: Cluster, width: int) -> float:
    """Time of a matrix product.

    Args:
        gemm: its shape.
        cluster: the GPU.
        width: bytes of an element.
    """
    tiles = -(-gemm.m // TILE[0]) * -(-gemm.n // TILE[1]) * gemm.batch
    waves = -(-tiles // cluster.multiprocessors)
    computed = waves * cluster.multiprocessors * TILE[0] * TILE[1] * 2 * gemm.k
    if waves == 1:
        # Libraries split small products along k, so that no multiprocessor is idle.
        computed = max(gemm.flops, tiles * TILE[0] * TILE[1] * 2 * gemm.k)
    peak = cluster.peak_flops(gemm.precision) * cluster.gemm_efficiency
    size = {"fp32": 4, "bf16": 2, "fp8": 1}[gemm.precision]
    read = gemm.batch * (gemm.m * gemm.k + gemm.k * gemm.n) * size
    written = gemm.batch * gemm.m * gemm.n * max(size, width)
    return max(computed / peak, (read + written) / _bandwidth(cluster))


def work_seconds(work: Work, cluster: Cluster, width: int) -> float:
    """Time of the kernels of a pass, or of launching them."""
    products = sum(gemm_seconds(gemm, cluster, width) for gemm in work.gemms)
    peak = cluster.peak_flops("bf16" if width < 4 else "fp32")
    attention = work.attention_flops / (peak * cluster.attention_efficiency)
    rest = work.bytes / _bandwidth(cluster)
    launches = (work.kernels + len(work.gemms)) * cluster.kernel_microseconds / 1e6
    return max(products + attention + rest, launches)


def hidden_seconds(exchanges: float, work: Work, cluster: Cluster, sizes: TensorSizes) -> float:
    """Time of all-to-alls that chunks of slots hide behind products (`moe/overlap.py`).

    Of N chunks, nothing is computed while the first arrives, nor while the last returns: of the
    exchanges, and of the products that run meanwhile, (1 - 1/N) can overlap.

    Args:
        exchanges: seconds of all of them.
        work: of the layer of experts, whose products are nearly all of experts.
        cluster: the GPU.
        sizes: with the number N of chunks.
    """
    products = sum(gemm_seconds(gemm, cluster, sizes.bytes) for gemm in work.gemms)
    return min(exchanges, products) * (1 - 1 / sizes.chunks)


def _bandwidth(cluster: Cluster) -> float:
    return cluster.memory_bandwidth * 1e9 * cluster.memory_efficiency


def step_time(
    config: RunConfig,
    layout: Layout,
    vocab_size: int,
    cluster: Cluster,
    states: tuple[MemoryByCategory, ...],
) -> StepTime:
    """Predict the time of a step.

    Args:
        config: the run.
        layout: its layout.
        vocab_size: V, padded.
        cluster: where it runs.
        states: parameters, gradients and optimizer state of each stage.
    """
    sizes = TensorSizes.of(config, layout, vocab_size)
    chunks = [chunk_plans(config, layout, sizes, stage) for stage in range(layout.pp)]

    def moving(transfers: Iterable[Transfer]) -> float:
        return sum(seconds_of(t, place_of(layout, cluster, t.group), cluster) for t in transfers)

    def seconds(work: Work, transfers: tuple[Transfer, ...]) -> PassTime:
        exchanges = moving(t for t in transfers if t.operation == "all-to-all")
        hidden = hidden_seconds(exchanges, work, cluster, sizes)
        return PassTime(work_seconds(work, cluster, sizes.bytes), moving(transfers) - hidden)

    times = {
        part: (
            seconds(part.work.forward, part.traffic.forward),
            seconds(part.backward, part.backward_transfers),
        )
        for part in {part for stage in chunks for chunk in stage for part in chunk}
    }
    forward, backward = (
        tuple(tuple(_sum(chunk, times, back) for chunk in stage) for stage in chunks)
        for back in (False, True)
    )
    send = Transfer("send", "pp", sizes.residual * sizes.bytes)
    sent = seconds_of(send, place_of(layout, cluster, "pp"), cluster)
    pipeline, busy = _pipeline(layout, forward, backward, sent)
    exposed = 0.0
    for stage in range(layout.pp):
        moved = {"reduce": 0.0, "gather": 0.0}
        for t in reductions(config, layout, vocab_size, stage):
            kind = "gather" if t.operation == "all-gather" else "reduce"
            moved[kind] += seconds_of(t, place_of(layout, cluster, t.group), cluster)
        hides_reduce = sum(p.compute for p in backward[stage])
        hides_gather = sum(p.compute for p in forward[stage])
        parallel = config.parallel
        reduce = moved["reduce"] - parallel.overlap_grad_reduce * hides_reduce
        gather = moved["gather"] - parallel.overlap_param_gather * hides_gather
        exposed = max(exposed, max(reduce, 0.0) + max(gather, 0.0))
    return StepTime(
        pipeline=pipeline,
        busy=busy,
        reduction=exposed,
        optimizer=max(
            _optimizer_seconds(config, state, cluster, share)
            for state, share in zip(states, _shares(config, layout, vocab_size), strict=True)
        ),
        forward=forward,
        backward=backward,
        flops=tuple(_flops(stage, layout.num_microbatches) for stage in chunks),
    )


def _sum(chunk: ChunkPlan, times: Mapping[Part, tuple[PassTime, PassTime]], back: bool) -> PassTime:
    """Of all parts of a chunk."""
    both = [(times[part][back], count) for part, count in chunk.items()]
    return PassTime(sum(n * t.compute for t, n in both), sum(n * t.transfers for t, n in both))


def _flops(chunks: tuple[ChunkPlan, ...], micro_batches: int) -> int:
    return micro_batches * sum(n * part.flops for chunk in chunks for part, n in chunk.items())


def _shares(config: RunConfig, layout: Layout, vocab_size: int) -> tuple[MuonShare | None, ...]:
    """What Muon does on each stage; without it nothing."""
    if config.optimizer.optimizer != "muon":
        return (None,) * layout.pp
    return muon_shares(config, layout, vocab_size)


def _optimizer_seconds(
    config: RunConfig, state: MemoryByCategory, cluster: Cluster, muon: MuonShare | None
) -> float:
    share = numel = state.gradients / 4
    if muon is not None:
        moved = MATRIX_BYTES * muon.matrices + UPDATE_BYTES["adam"] * muon.others
        half = config.optimizer.muon_fp32_matmul_prec == "medium"
        products = sum(
            gemm_seconds(Gemm(*product, "bf16" if half else "fp32"), cluster, 2 if half else 4)
            for product in muon.products
        )
        return (moved + GRADIENT_BYTES * numel) / _bandwidth(cluster) + products
    if config.parallel.use_distributed_optimizer:
        share = state.optimizer / (12 if config.train.bf16 else 8)
    update = UPDATE_BYTES[config.optimizer.optimizer]
    if config.optimizer.optimizer == "sgd" and config.optimizer.sgd_momentum:
        update += MOMENTUM_BYTES
    return (update * share + GRADIENT_BYTES * numel) / _bandwidth(cluster)


def _pipeline(
    layout: Layout,
    forward: tuple[tuple[PassTime, ...], ...],
    backward: tuple[tuple[PassTime, ...], ...],
    sent: float,
) -> tuple[float, float]:
    """Seconds from the first pass to the last, and of the passes of the mean stage."""
    stages, chunks, count = layout.pp, layout.num_chunks, layout.num_microbatches
    of_stage = [
        sum(p.total for p in (*there, *back)) for there, back in zip(forward, backward, strict=True)
    ]
    busy = count * sum(of_stage) / stages
    if stages == 1:
        return count * of_stage[0], busy
    simulated = min(count, SIMULATED_ROUNDS * stages)
    passes = [list(passes_of(stage, stages, chunks, simulated)) for stage in range(stages)]
    end = _simulate(passes, forward, backward, sent)
    return end + (count - simulated) * max(of_stage), busy


def _simulate(
    passes: list[list[Pass]],
    forward: tuple[tuple[PassTime, ...], ...],
    backward: tuple[tuple[PassTime, ...], ...],
    sent: float,
) -> float:
    """Run every pass as soon as its stage is free and its input has arrived."""
    stages, chunks = len(passes), len(forward[0])
    done: dict[tuple[bool, int, int], float] = {}
    clock, following = [0.0] * stages, [0] * stages
    waiting = set(range(stages))
    while waiting:
        advanced = False
        for stage in sorted(waiting):
            while following[stage] < len(passes[stage]):
                step = passes[stage][following[stage]]
                place = step.chunk * stages + stage
                need = _needed(step, place, stages * chunks)
                if need is not None and need not in done:
                    break
                arrived = 0.0 if need is None else done[need]
                # The last part of the model goes back without a transfer.
                crosses = need is not None and need[2] != place
                start = max(clock[stage], arrived + sent * crosses)
                times = backward if step.backward else forward
                clock[stage] = start + times[stage][step.chunk].total
                done[step.backward, step.micro_batch, place] = clock[stage]
                following[stage] += 1
                advanced = True
            if following[stage] == len(passes[stage]):
                waiting.discard(stage)
        if waiting and not advanced:
            raise ValueError("the schedule waits for itself")
    return max(clock)


def _needed(step: Pass, place: int, places: int) -> tuple[bool, int, int] | None:
    """The pass whose output a pass starts from, by direction, micro-batch and part of the model."""
    if not step.backward:
        return None if place == 0 else (False, step.micro_batch, place - 1)
    if place == places - 1:
        return False, step.micro_batch, place
    return True, step.micro_batch, place + 1
