"""What a rank sends in a step: every collective of our implementation, its group and its size.

The size of a collective is that of the whole tensor: what an all-gather returns, a reduce-scatter
takes, an all-to-all or all-reduce holds, a send sends. Collectives of a few numbers (counts of
targets, gradient norms, batches of token ids) are left out.

Letters as in `tensor_sizes.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.model.counting import stages_of, stages_of_layers
from megatron_moe.model.logical import logical_parameters
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.memory import padded_buffer, parameter_bytes, stage_parameters
from megatron_moe.planning.tensor_sizes import TensorSizes

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send"]
GroupName = Literal["tp", "ep", "etp", "dp", "edp", "pp", "embedding"]


@dataclass(frozen=True)
class Transfer:
    """One kind of collective."""

    operation: Operation
    group: GroupName
    bytes: int
    """Of the whole tensor."""


@dataclass(frozen=True)
class UnitTraffic:
    """The collectives of one unit for one micro-batch."""

    forward: tuple[Transfer, ...]
    backward: tuple[Transfer, ...]
    """Without what recomputation repeats."""


def linear_pair(sizes: TensorSizes) -> UnitTraffic:
    """A column-parallel and a row-parallel matrix: attention, or a feed-forward layer."""
    whole = sizes.whole * sizes.bytes
    if sizes.tp == 1:
        return UnitTraffic((), ())
    if not sizes.sequence_parallel:
        both = (Transfer("all-reduce", "tp", whole),)
        return UnitTraffic(both, both)
    gather, scatter = Transfer("all-gather", "tp", whole), Transfer("reduce-scatter", "tp", whole)
    # Backward, the input of the first matrix is gathered again, as only its shard was saved.
    return UnitTraffic((gather, scatter), (gather, gather, scatter))


def expert_layer(sizes: TensorSizes) -> UnitTraffic:
    """Choices, weights and tokens over tensor-parallel ranks; rows over expert-parallel ones."""
    forward: list[Transfer] = []
    backward: list[Transfer] = []
    if sizes.tp > 1:
        whole, small = sizes.whole * sizes.bytes, 4 * sizes.tokens * sizes.topk
        gathers = [Transfer("all-gather", "tp", n) for n in (small, small, whole)]
        scatter = Transfer("reduce-scatter", "tp", whole)
        forward += [*gathers, scatter]
        # The choices, integers, have no gradient.
        backward += [
            Transfer("all-gather", "tp", whole),
            scatter,
            Transfer("reduce-scatter", "tp", small),
        ]
        if sizes.sees_context:  # fp32 logits of what precedes
            context = 4 * sizes.tokens * sizes.experts
            forward.append(Transfer("all-gather", "tp", context))
            backward.append(Transfer("reduce-scatter", "tp", context))
    if sizes.sums_loads:
        forward.append(Transfer("all-reduce", "dp", 8 * sizes.experts))
    if sizes.ep > 1:
        rows = Transfer("all-to-all", "ep", sizes.buffer_rows * sizes.hidden * sizes.bytes)
        forward += [rows, rows]
        backward += [rows, rows]
    if sizes.gathers_rows:
        held = sizes.expert_rows * sizes.hidden * sizes.bytes
        both = [Transfer("all-gather", "etp", held), Transfer("reduce-scatter", "etp", held)]
        forward += both
        backward += both
    return UnitTraffic(tuple(forward), tuple(backward))


def embedding(sizes: TensorSizes) -> UnitTraffic:
    """Each rank looks up its part of the vocabulary."""
    whole = sizes.whole * sizes.bytes
    if sizes.tp == 1:
        return UnitTraffic((), ())
    if not sizes.sequence_parallel:
        return UnitTraffic((Transfer("all-reduce", "tp", whole),), ())
    scatter, gather = Transfer("reduce-scatter", "tp", whole), Transfer("all-gather", "tp", whole)
    return UnitTraffic((scatter,), (gather,))


def head(sizes: TensorSizes) -> UnitTraffic:
    """Logits by vocabulary, and three numbers of every token for their loss."""
    whole = sizes.whole * sizes.bytes
    if sizes.tp == 1:
        return UnitTraffic((), ())
    loss = Transfer("all-gather", "tp", 12 * sizes.tokens * sizes.tp)
    if not sizes.sequence_parallel:
        return UnitTraffic((loss,), (Transfer("all-reduce", "tp", whole),))
    gather = Transfer("all-gather", "tp", whole)
    return UnitTraffic((gather, loss), (Transfer("reduce-scatter", "tp", whole),))


def sends(sizes: TensorSizes, layout: Layout, stage: int) -> tuple[int, int]:
    """Forward and backward sends of a stage in a step, each of t H b bytes."""
    if layout.pp == 1:
        return 0, 0
    chunks, passes = layout.num_chunks, layout.num_microbatches
    forward = chunks - (stage == layout.pp - 1)
    backward = chunks - (stage == 0)
    return passes * forward, passes * backward


def reductions(
    config: RunConfig, layout: Layout, vocab_size: int, stage: int
) -> Iterator[Transfer]:
    """Gradients, and with the distributed optimizer parameters, once a step."""
    expert, dense = _buffers(config, layout, vocab_size, stage)
    width = parameter_bytes(config)
    # Without overlap, the optimizers of dense and of expert parameters each gather everything
    # (Megatron-Core's `DistributedOptimizer.step_with_ready_grads`).
    separate = expert > 0 and (layout.ep > 1 or layout.etp != layout.tp)
    gathers = 1 if config.parallel.overlap_param_gather or not separate else 2
    sharded = config.parallel.use_distributed_optimizer
    parts: list[tuple[GroupName, int, int]] = [
        ("dp", layout.dp, dense),
        ("edp", layout.edp, expert),
    ]
    for group, ranks, numel in parts:
        if ranks == 1 or not numel:
            continue
        if sharded:
            yield Transfer("reduce-scatter", group, 4 * numel)
            for _ in range(gathers):
                yield Transfer("all-gather", group, width * numel)
        else:
            yield Transfer("all-reduce", group, 4 * numel)
    if layout.sequence_parallel:
        chunks = layout.chunk_layers
        shared = _replicated(config.model, config.moe, vocab_size, chunks, layout.pp)[stage]
        if shared:
            yield Transfer("all-reduce", "tp", 4 * shared)
    tied = not config.model.untie_embeddings_and_output_weights
    if tied and layout.pp > 1 and stage in (0, layout.pp - 1):
        matrix = vocab_size // layout.tp * config.model.hidden_size
        yield Transfer("all-reduce", "embedding", 4 * matrix)


def _buffers(config: RunConfig, layout: Layout, vocab_size: int, stage: int) -> tuple[int, int]:
    """Elements of the gradient buffers of experts and of everything else."""
    count = stage_parameters(config, layout, vocab_size)[stage]
    if not config.parallel.use_distributed_optimizer:
        return count.expert, count.dense
    return padded_buffer(count.expert, layout.edp), padded_buffer(count.dense, layout.dp)


@functools.lru_cache(maxsize=1024)
def _replicated(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, chunk_layers: tuple[int, ...], pp: int
) -> tuple[int, ...]:
    """Elements of norms and routers of each stage, whose gradients come from a part of the
    sequence each.
    """
    untied = model.untie_embeddings_and_output_weights
    of_layers, found = stages_of_layers(chunk_layers, pp), [0] * pp
    for name, parameter in logical_parameters(model, moe, vocab_size).items():
        if parameter.kind in ("norm", "router") and not parameter.split:
            for stage in stages_of(name, of_layers, pp, untied):
                found[stage] += parameter.numel
    return tuple(found)
