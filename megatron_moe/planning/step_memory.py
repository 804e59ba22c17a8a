"""The peak memory of a rank of each pipeline stage in a step, by category.

State (`memory.py`) exists throughout. On top, a stage has the tensors that are saved for every
micro-batch in progress, which its schedule decides, and the temporaries of the pass that runs: the
peak is the largest sum over all moments of all passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_moe.config import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.activation_memory import UnitMaker
from megatron_moe.planning.linear_inputs import LinearInputs, weight_copies
from megatron_moe.planning.memory import MemoryByCategory, state_memory
from megatron_moe.planning.memory_units import Moment, Unit, total_of
from megatron_moe.planning.stage_schedule import passes_of
from megatron_moe.planning.tensor_sizes import Device, TensorSizes, layers_of_stage

STEADY_ROUNDS = 4
"""Micro-batches that are followed, in multiples of the pipeline size. A stage has at most two of
them in progress: its warm-up passes are fewer than (chunks + 1) P, each through one chunk."""


class _LayerKind(NamedTuple):
    """What decides the memory of a layer."""

    is_moe: bool
    inputs: LinearInputs


class _Kind(NamedTuple):
    """What decides the memory of a chunk; most stages have chunks of the same kinds."""

    layers: tuple[_LayerKind, ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class ChunkMemory:
    """What one micro-batch of one model chunk needs."""

    units: tuple[Unit, ...]
    """In order."""
    saved: MemoryByCategory
    """From its forward to its backward pass."""
    forward: Moment
    """The point of its forward pass with the most, on top of everything else in progress."""
    backward: Moment
    """The same of its backward pass: its own saved tensors are part of it."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of a rank of one pipeline stage."""

    state: MemoryByCategory
    constant: MemoryByCategory
    """Batches, tables, buffers and FP8 copies of weights that exist throughout a step."""
    chunks: tuple[ChunkMemory, ...]
    in_progress: tuple[int, ...]
    """Micro-batches in progress at the peak, of each chunk, besides the one that runs."""
    moment: Moment
    """Where the peak is: all of the micro-batch that runs."""
    peak: MemoryByCategory


def step_memory(
    config: RunConfig,
    layout: Layout,
    vocab_size: int,
    device: Device = "cuda",
    threads: int = 0,
    overwrites_gradient: bool = False,
) -> tuple[StageMemory, ...]:
    """The peak of every pipeline stage, from the second step on (the first makes Adam's moments).

    Args:
        config: the run.
        layout: its layout.
        vocab_size: V, padded.
        device: whose implementations run.
        threads: of a CPU that computes experts; 0 computes them in one batched GEMM, as GPUs do.
        overwrites_gradient: whether the gate's kernel writes into its gradient, which is then
            copied (the reference does, the native and the Triton kernel do not).

    Raises:
        UsageError: norms are recomputed, which is not planned yet.
    """
    parallel = config.parallel
    if parallel.recompute_granularity == "selective" and "layernorm" in parallel.recompute_modules:
        fix = "plan without it: a run with it needs less memory"
        raise UsageError("--recompute-modules", "layernorm", "modules that can be planned", fix)
    sizes = TensorSizes.of(config, layout, vocab_size)
    maker = UnitMaker(
        sizes=sizes, device=device, threads=threads, overwrites_gradient=overwrites_gradient
    )
    states = state_memory(config, layout, vocab_size)
    copies = weight_copies(config, layout, vocab_size)
    known: dict[_Kind, ChunkMemory] = {}
    return tuple(
        _stage_memory(config, layout, maker, stage, state, copies[stage], known)
        for stage, state in enumerate(states)
    )


def _stage_memory(
    config: RunConfig,
    layout: Layout,
    maker: UnitMaker,
    stage: int,
    state: MemoryByCategory,
    copies: int,
    known: dict[_Kind, ChunkMemory],
) -> StageMemory:
    kinds = []
    for index, pattern in enumerate(layers_of_stage(config, layout, stage)):
        first = stage == 0 and index == 0
        last = stage == layout.pp - 1 and index == layout.num_chunks - 1
        numbers = layout.layers_of_chunk(stage, index)
        layers = tuple(
            _LayerKind(is_moe, LinearInputs.of(config, layer))
            for layer, is_moe in zip(numbers, pattern, strict=True)
        )
        kinds.append(_Kind(layers, first, last))
    for kind in kinds:
        if kind not in known:
            known[kind] = _chunk_memory(config, layout, maker, kind)
    chunks = tuple(known[kind] for kind in kinds)
    constant = _constant(config, layout, maker, stage) + MemoryByCategory(parameters=copies)
    moment, counts = _largest(chunks, stage, layout)
    others = total_of(chunk.saved.times(count) for chunk, count in zip(chunks, counts, strict=True))
    return StageMemory(
        state=state,
        constant=constant,
        chunks=chunks,
        in_progress=counts,
        moment=moment,
        peak=state + constant + others + moment.extra,
    )


def _largest(
    chunks: tuple[ChunkMemory, ...], stage: int, layout: Layout
) -> tuple[Moment, tuple[int, ...]]:
    """The moment with the most, and how many micro-batches each chunk has in progress besides."""
    saved = [chunk.saved.total for chunk in chunks]
    most = [(chunk.forward.extra.total, chunk.backward.extra.total) for chunk in chunks]
    counts, largest, found = [0] * len(chunks), -1, (chunks[0].forward, (0,) * len(chunks))
    # The steady state is reached after as many rounds as a stage can have in progress.
    rounds = min(layout.num_microbatches, STEADY_ROUNDS * layout.pp)
    held = 0
    for step in passes_of(stage, layout.pp, len(chunks), rounds):
        if step.backward:
            counts[step.chunk] -= 1
            held -= saved[step.chunk]
        total = held + most[step.chunk][step.backward]
        if total > largest:
            chunk = chunks[step.chunk]
            largest = total
            found = (chunk.backward if step.backward else chunk.forward, tuple(counts))
        if not step.backward:
            counts[step.chunk] += 1
            held += saved[step.chunk]
    return found


def _constant(config: RunConfig, layout: Layout, maker: UnitMaker, stage: int) -> MemoryByCategory:
    """What exists throughout a step besides state: batches, rotary tables, gathered activations."""
    sizes = maker.sizes
    layers = sum(map(len, layers_of_stage(config, layout, stage)))
    tables = layers * 4 * sizes.row_tokens * sizes.head_dim
    reads = stage in (0, layout.pp - 1)
    batches = layout.num_microbatches * 20 * sizes.tokens if reads else 0
    gathered = maker.whole if sizes.sequence_parallel else 0
    # The schedule holds the gradient that it sent last until the next one replaces it; with
    # overlapped transfers, also an input and a gradient that arrive early.
    sent = maker.residual if layout.pp > 1 and stage > 0 else 0
    sent += 2 * maker.residual if layout.vp else 0
    return MemoryByCategory(activations=tables + batches + sent, communication_buffers=gathered)


def _chunk_memory(config: RunConfig, layout: Layout, maker: UnitMaker, kind: _Kind) -> ChunkMemory:
    pattern, first, last = kind
    kinds = {layer: tuple(_layer_units(config, maker, layer)) for layer in set(pattern)}
    layers = [kinds[layer] for layer in pattern]
    groups = [(list(units), recompute) for units, recompute in _groups(config, layers)]
    if first:
        groups.insert(0, ([maker.embedding()], False))
    if last:
        groups.append(([maker.head()], False))
    received = 0 if last or layout.pp == 1 else maker.residual
    return _walk(groups, maker, received, keeps_output=maker.device == "cpu" and not last)


def _groups(
    config: RunConfig, layers: list[tuple[Unit, ...]]
) -> Iterator[tuple[tuple[Unit, ...], bool]]:
    """Units that are run together, and whether they are recomputed as a whole."""
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        yield from ((units, False) for units in layers)
        return
    size = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        yield from ((units, number < size) for number, units in enumerate(layers))
        return
    for first in range(0, len(layers), size):
        yield tuple(unit for units in layers[first : first + size] for unit in units), True


def _layer_units(config: RunConfig, maker: UnitMaker, layer: _LayerKind) -> Iterator[Unit]:
    parallel, sizes, inputs = config.parallel, maker.sizes, layer.inputs
    modules: tuple[str, ...] = ()
    if parallel.recompute_granularity == "selective":
        modules = parallel.recompute_modules
    yield maker.attention(inputs, recompute="core_attn" in modules)
    if not layer.is_moe:
        yield maker.feed_forward("feed-forward", sizes.ffn, inputs, recompute="mlp" in modules)
        return
    yield maker.experts(inputs, recompute="moe" in modules)
    if sizes.shared:
        yield maker.feed_forward(
            "shared expert",
            sizes.shared,
            inputs,
            normed=config.moe.moe_shared_expert_placement == "sequential",
            recompute=bool({"mlp", "shared_experts"} & {*modules}),
        )


def _walk(
    groups: list[tuple[list[Unit], bool]], maker: UnitMaker, received: int, keeps_output: bool
) -> ChunkMemory:
    """Walk forward through all units, then back."""
    saved, nothing = MemoryByCategory(), Moment("start", "", MemoryByCategory())
    forward = backward = nothing
    gradient = MemoryByCategory(activations=received)
    checkpoint = MemoryByCategory(activations=maker.residual)
    for units, recompute in groups:
        # Recomputation ends with the group's output, which the next group holds as its input.
        inside = saved + checkpoint if recompute else saved
        for unit in units:
            inside = inside + unit.memory
            forward = _larger(forward, inside, unit.forward)
            # Backward, everything before this unit exists, and nothing after it.
            backward = _larger(backward, inside + gradient, unit.backward)
        saved = saved + checkpoint if recompute else inside
    if keeps_output:
        saved = saved + MemoryByCategory(activations=maker.residual)
    every = tuple(unit for group, _ in groups for unit in group)
    return ChunkMemory(every, saved, forward, backward)


def _larger(best: Moment, saved: MemoryByCategory, moments: tuple[Moment, ...]) -> Moment:
    """The larger of a moment and the largest of others on top of what is saved."""
    largest = max(moments, key=lambda moment: moment.extra.total, default=None)
    if largest is None or saved.total + largest.extra.total <= best.extra.total:
        return best
    return Moment(largest.name, largest.formula, saved + largest.extra)
