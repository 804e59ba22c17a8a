"""A training step of one rank of a cluster that is not there: its memory and its collectives.

`dry_run_rank` builds the model, the gradient buffers and the optimizer as training does and runs
one step of the real schedule, on fake tensors and a fake process group (`fake_world.py`). It fails
where the real run would, and returns what the rank holds and what it sends. The device is the CPU,
so the operations are those of the reference kernels; they allocate what the kernels of a GPU
allocate, except where `docs/dry_run.md` says otherwise.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.config.precision import PrecisionConfig
from megatron_moe.config.run import flag_of
from megatron_moe.data.batch import Batch, every_stage_reads, extra_planes
from megatron_moe.errors import UsageError
from megatron_moe.model.build import build_model
from megatron_moe.moe.layer import MoELayer
from megatron_moe.parallel.context import (
    ParallelContext,
    destroy_parallel,
    initialize_parallel,
)
from megatron_moe.planning.collective_log import Collective, CollectiveLog
from megatron_moe.planning.fake_world import HostReads, fake_tensors, fake_world
from megatron_moe.planning.live_memory import LiveMemory
from megatron_moe.planning.memory import MemoryByCategory
from megatron_moe.planning.scopes import Scopes
from megatron_moe.platform import activate
from megatron_moe.training.phases import Phase
from megatron_moe.training.run import TrainingRun, prepare_run
from megatron_moe.training.step import train_step
from megatron_moe.training.timing import StepTimers


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank did in a step."""

    rank: int
    coordinates: Mapping[str, int]
    """Rank within each kind of group: tp, pp, dp, ep, etp."""
    dense_parameters: int
    """Parameters that are not experts'."""
    expert_parameters: int
    at_rest: MemoryByCategory
    """Before the first step; Adam's moments come with it."""
    peak: MemoryByCategory
    """The moment of the second step with the most bytes; the optimizer has its state by then."""
    peak_at: str
    """The operation that reached it, and where: an autograd node or a line of this project."""
    collectives: Sequence[Collective]
    """Of the second step, in order."""
    groups: Mapping[tuple[int, ...], str]
    """Names of the groups of this rank by their global ranks: `tp`, `dp`, ..."""
    left_out: Sequence[str]
    """Flags of the run that only a GPU can run, and which this one went without."""
    host_reads: Sequence[str]
    """Places at which the second step reads a value on the host, in order."""
    seconds: float
    """The dry run took so long."""


def dry_run_rank(phase: Phase, vocab_size: int, rank: int) -> RankReport:
    """Run two steps of one rank of a phase's layout.

    Args:
        phase: settings, layout and plan.
        vocab_size: V, padded.
        rank: the global rank.

    Raises:
        UsageError: what the real run raises before it trains.
    """
    config, platform = phase.config, activate()
    with ExitStack() as world:
        world.enter_context(fake_world(rank, phase.layout.world_size))
        ctx = initialize_parallel(phase.layout, config.parallel, platform, config.train.seed)
        world.callback(destroy_parallel)
        world.enter_context(fake_tensors())
        reads = world.enter_context(HostReads())
        return measure_rank(phase, vocab_size, ctx, reads.places)


def measure_rank(
    phase: Phase, vocab_size: int, ctx: ParallelContext, host_reads: list[str]
) -> RankReport:
    """Two steps of this rank, on fake tensors or real ones.

    Args:
        phase: settings, layout and plan.
        vocab_size: V, padded.
        ctx: this rank's place in the layout.
        host_reads: places of reads are added to it while this runs.
    """
    begun, (config, left_out) = time.monotonic(), without_gpu(phase.config)
    scopes = Scopes()
    with LiveMemory(scopes.category) as memory, _Log(memory) as log:
        run = _build(config, phase, ctx, vocab_size, memory, scopes)
        at_rest = memory.now
        _step(run, 1)
        host_reads.clear()
        log.calls.clear()
        memory.reset_peak()
        _step(run, 2)
    dense, expert = _parameters(run)
    return RankReport(
        rank=ctx.rank,
        coordinates=_coordinates(ctx),
        dense_parameters=dense,
        expert_parameters=expert,
        at_rest=at_rest,
        peak=memory.peak,
        peak_at=f"{memory.peak_operation} in {memory.peak_place}",
        collectives=tuple(log.calls),
        groups=_group_names(ctx),
        left_out=left_out,
        host_reads=tuple(host_reads),
        seconds=time.monotonic() - begun,
    )


def without_gpu(config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """What can run here in a GPU's place, and the flags that cannot.

    Kernels read no memory, of which fake tensors have none, and experts have fixed shapes, as on a
    GPU: slots, or with `--moe-expert-impl grouped` packed rows. Layers are Megatron-Core's local
    ones: those of Transformer Engine have the same parameters and collectives, and need a GPU, as
    FP8 and fused gradient accumulation do.

    Raises:
        UsageError: `--moe-expert-impl grouped` without bf16.
    """
    parallel, precision = config.parallel, config.precision
    left_out = []
    if parallel.transformer_impl == "transformer_engine":
        left_out.append(f"{flag_of('transformer_impl')} transformer_engine")
    if parallel.gradient_accumulation_fusion:
        left_out.append(flag_of("gradient_accumulation_fusion"))
    if precision.fp8_format is not None and not precision.fp8_emulate:
        left_out.append(f"{flag_of('fp8_format')} {precision.fp8_format}")
        precision = PrecisionConfig()
    grouped = config.moe.moe_expert_impl == "grouped"
    if grouped and not config.train.bf16:
        fix = "grouped GEMMs of GPUs are bf16"
        raise UsageError("--moe-expert-impl", "grouped", "used with --bf16 in a dry run", fix)
    local: dict[str, Any] = {"transformer_impl": "local", "gradient_accumulation_fusion": False}
    changed = dataclasses.replace(
        config,
        moe=dataclasses.replace(
            config.moe,
            moe_dispatch_impl="reference",
            moe_expert_impl="grouped" if grouped else "batched",
        ),
        parallel=dataclasses.replace(parallel, **local),
        precision=precision,
    )
    return changed, tuple(left_out)


class _Log(CollectiveLog):
    """Also gives the outputs of collectives their category."""

    def __init__(self, memory: LiveMemory) -> None:
        super().__init__()
        self._memory = memory

    def written(self, call: Collective, args: tuple[Any, ...]) -> None:
        """Outputs that belong to nothing else are communication buffers."""
        fresh = [
            t for t in self.outputs(call, args) if self._memory.category_of(t) == "activations"
        ]
        self._memory.mark(fresh, "communication_buffers")


def _build(
    config: RunConfig,
    phase: Phase,
    ctx: ParallelContext,
    vocab_size: int,
    memory: LiveMemory,
    scopes: Scopes,
) -> TrainingRun:
    """The rank's model, gradient buffers and optimizer, each in its category."""
    with scopes.enter("parameters"):
        chunks = build_model(config, phase.layout, ctx.pgs, vocab_size, ctx.platform.device)
    with scopes.enter("optimizer"):
        run = prepare_run(config, phase.plan, ctx, chunks, vocab_size)
    buffers = [b for chunk in run.wrapped for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    memory.mark([b.grad_data for b in buffers], "gradients")
    # The distributed optimizer moves parameters into buffers of its own.
    memory.mark([b.param_data for b in buffers if b.param_data is not None], "parameters")
    memory.mark([p.data for chunk in chunks for p in chunk.parameters()], "parameters")
    for chunk in chunks:
        _label(chunk, scopes)
    return dataclasses.replace(run, timers=_UpdateTimers(scopes))


class _UpdateTimers(StepTimers):
    """A step names its parts to its timers: here, to give the update its category."""

    def __init__(self, scopes: Scopes) -> None:
        super().__init__(0)
        self._scopes = scopes

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """The update's allocations are the optimizer's."""
        if name != "optimizer":
            yield
            return
        with self._scopes.enter("optimizer"):
            yield


def _label(chunk: Any, scopes: Scopes) -> None:
    """Give what the forward pass allocates for dispatch and for logits its category."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            dispatcher = module.dispatcher
            for name in ("dispatch", "combine"):
                whole = _scoped(getattr(dispatcher, name), scopes, "dispatch_buffers")
                setattr(dispatcher, name, whole)
    if chunk.post_process:
        end = ExitStack()

        def logits_begin(*_: Any) -> None:
            end.enter_context(scopes.enter("logits"))

        chunk.decoder.register_forward_hook(logits_begin)
        chunk.register_forward_hook(lambda *_: end.close())


def _scoped(call: Callable[..., Tensor], scopes: Scopes, category: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        with scopes.enter(category):
            return call(*args)

    return run


def _step(run: TrainingRun, iteration: int) -> None:
    layout = run.ctx.layout
    reads = run.ctx.needs_data or every_stage_reads(run.config)
    batches = [_batch(run) if reads else None for _ in range(layout.num_microbatches)]
    train_step(run, batches, learning_rate=1e-4, iteration=iteration)


def _batch(run: TrainingRun) -> Batch:
    """A micro-batch of the right shapes."""
    layout, extra = run.ctx.layout, extra_planes(run.config)
    shape = (layout.micro_batch_size, layout.seq_length)
    ids = torch.zeros(shape, dtype=torch.int64)
    planes = {f"{name}_BS": ids if name in extra else None for name in ("positions", "documents")}
    return Batch(
        tokens_BS=ids,
        labels_BS=ids,
        loss_mask_BS=torch.ones(shape),
        padding_BS=ids if "padding" in extra else None,
        **planes,
    )


def _parameters(run: TrainingRun) -> tuple[int, int]:
    """Dense and expert parameters of this rank."""
    counts = [0, 0]
    for chunk in run.chunks:
        experts = {
            id(p)
            for module in chunk.modules()
            if isinstance(module, MoELayer)
            for p in module.experts.parameters()
        }
        for parameter in chunk.parameters():
            counts[id(parameter) in experts] += parameter.numel()
    return counts[0], counts[1]


def _coordinates(ctx: ParallelContext) -> dict[str, int]:
    names = ("tp", "pp", "dp", "ep", "etp")
    return {name: getattr(ctx, f"{name}_rank") for name in names}


def _group_names(ctx: ParallelContext) -> dict[tuple[int, ...], str]:
    """The first name of each group: with one rank of context parallelism `dp_cp` is `dp`."""
    names: dict[tuple[int, ...], str] = {}
    for name in ("tp", "pp", "dp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_ep_pp", "mp", "embd"):
        group = getattr(ctx.pgs, name, None)
        if group is not None and torch.distributed.get_rank(group) >= 0:
            names.setdefault(tuple(torch.distributed.get_process_group_ranks(group)), name)
    return names
