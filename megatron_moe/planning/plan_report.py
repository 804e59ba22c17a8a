"""The planner's results as text: a table of layouts, one layout in full, every formula."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from megatron_moe.planning.layout_plan import LayoutPlan, recomputation
from megatron_moe.planning.layout_search import SearchResult
from megatron_moe.planning.memory import CATEGORIES
from megatron_moe.planning.stage_plan import chunk_plans
from megatron_moe.planning.step_time import work_seconds
from megatron_moe.planning.tensor_sizes import TensorSizes

GIGA = 1e9


def table_lines(plans: Sequence[LayoutPlan]) -> Iterator[str]:
    """One line a layout, fastest first."""
    heads = (
        *("TP", "PP", "layers", "EP", "ETP", "DP", "micro", "recompute", "cf"),
        *("memory GB", "step s", "bubble", "tokens/s", "MFU", "done"),
    )
    rows = [heads, *(_row(plan) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for number, row in enumerate(rows):
        cells = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield f"{'' if number == 0 else number:>3}  {cells}"


def _row(plan: LayoutPlan) -> tuple[str, ...]:
    layout, time = plan.layout, plan.time
    degrees = (layout.tp, layout.pp, layers_of(plan), layout.ep, layout.etp, layout.dp)
    return (
        *map(str, (*degrees, layout.micro_batch_size)),
        recomputation(plan.config),
        str(plan.config.moe.moe_expert_capacity_factor),
        f"{plan.peak_bytes / GIGA:.1f}",
        f"{time.total:.3f}",
        f"{time.bubble:.1%}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.hfu:.1%}",
    )


def layers_of(plan: LayoutPlan) -> str:
    """Layers of a chunk, `x` chunks of a stage, and the last stage's if it has fewer."""
    counts, chunks = plan.layout.chunk_layers, plan.layout.num_chunks
    text = f"{counts[0]}x{chunks}" if chunks > 1 else str(counts[0])
    return text if counts[-1] == counts[0] else f"{text}..{counts[-1]}"


def summary_line(result: SearchResult) -> str:
    """How many layouts were tried, and what became of them."""
    return (
        f"{len(result.plans)} of {result.tried} layouts fit: {result.invalid} are not valid,"
        f" {result.too_large} need more memory"
    )


def detail_lines(plan: LayoutPlan, tokens: float | None) -> Iterator[str]:
    """Memory, traffic and time of one layout."""
    yield from _memory_lines(plan)
    yield ""
    yield from _time_lines(plan)
    yield ""
    yield from _traffic_lines(plan)
    if tokens is not None:
        yield ""
        yield (
            f"{tokens:.3g} tokens: {plan.days(tokens):.1f} days, {plan.gpu_hours(tokens):,.0f}"
            f" GPU-hours, at most {plan.megawatt_hours(tokens):,.0f} MWh"
        )


def _memory_lines(plan: LayoutPlan) -> Iterator[str]:
    names = [name.replace("_", " ") for name in CATEGORIES]
    usable = plan.cluster.usable_bytes / GIGA
    yield f"Peak memory of a rank, GB (usable: {usable:.1f})"
    width = max(map(len, names))
    stages = range(len(plan.stages))
    yield f"  {'stage':<{width}}  " + "  ".join(f"{stage:>6}" for stage in stages)
    values = zip(*(stage.peak.values for stage in plan.stages), strict=True)
    for name, row in zip([*names, "all"], [*values, None], strict=True):
        held = [s.peak.total for s in plan.stages] if row is None else row
        yield f"  {name:<{width}}  " + "  ".join(f"{n / GIGA:6.2f}" for n in held)
    worst = max(plan.stages, key=lambda stage: stage.peak.total)
    progress = sum(worst.in_progress)
    yield f"  largest at: {worst.moment.name}, with {progress} passes besides it in progress"


def _time_lines(plan: LayoutPlan) -> Iterator[str]:
    time, layout = plan.time, plan.layout
    yield f"Step of {layout.global_batch_size} sequences: {time.total:.3f} s"
    yield f"  pipeline      {time.pipeline:.3f} s, of which the mean stage works {time.busy:.3f} s"
    yield f"  bubble        {time.bubble:.1%}"
    yield f"  imbalance     {time.imbalance:.2f} x the mean stage's arithmetic on the busiest one"
    yield f"  reduction     {time.reduction:.3f} s that nothing hides"
    yield f"  optimizer     {time.optimizer:.3f} s"
    for stage, chunks in enumerate(zip(time.forward, time.backward, strict=True)):
        there, back = (sum(p.total for p in passes) for passes in chunks)
        waits = sum(p.transfers for passes in chunks for p in passes)
        yield (
            f"  stage {stage:<8}{there * 1e3:8.2f} ms forward, {back * 1e3:8.2f} backward,"
            f" of which {waits * 1e3:.2f} are collectives; {time.flops[stage]:.3g} FLOPs a step"
        )
    yield f"  tokens/s      {plan.tokens_per_second:,.0f}"
    yield f"  TFLOP/s a GPU {plan.tflops_per_gpu:.0f}"
    yield (
        f"  MFU           {plan.mfu:.1%} of arithmetic that the model asks for,"
        f" {plan.hfu:.1%} of arithmetic done"
    )


def _traffic_lines(plan: LayoutPlan) -> Iterator[str]:
    yield "GB that a rank sends in a step, inside its node / to other nodes"
    tables = [plan.sent(stage) for stage in range(plan.layout.pp)]
    kinds = list(dict.fromkeys(kind for table in tables for kind in table))
    for operation, group in kinds:
        cells = []
        for table in tables:
            links = table.get((operation, group))
            cells.append(
                "-" if links is None else f"{links.intra / GIGA:.2f} / {links.inter / GIGA:.2f}"
            )
        yield f"  {operation + ' ' + group:<22}" + "  ".join(f"{cell:>15}" for cell in cells)


def explain_lines(plan: LayoutPlan) -> Iterator[str]:
    """Every formula with its numbers: sizes, memory of each unit, time of each part."""
    sizes = TensorSizes.of(plan.config, plan.layout, plan.vocab_size)
    yield "Sizes of one micro-batch on a rank (docs/planning.md has the letters)"
    for name, value in asdict(sizes).items():
        yield f"  {name.replace('_', ' '):<20}{value}"
    for name in ("residual", "whole", "queries", "buffer_rows", "expert_rows", "logits"):
        yield f"  {name.replace('_', ' '):<20}{getattr(sizes, name):,}"
    yield from _explain_memory(plan)
    yield from _explain_time(plan, sizes)
    yield ""
    yield f"Cluster {plan.cluster.name}"
    for name, value in asdict(plan.cluster).items():
        if name != "sources":
            source = plan.cluster.sources.get(name, "")
            yield f"  {name:<22}{value!s:<18}{source}"


def _explain_memory(plan: LayoutPlan) -> Iterator[str]:
    for stage, memory in enumerate(plan.stages):
        yield ""
        parts = f"state + constant + passes in progress + {memory.moment.name}"
        yield f"Memory of stage {stage}: {parts}"
        for title, part in (("state", memory.state), ("constant", memory.constant)):
            yield f"  {title:<12}{_categories(part.to_dict())}"
        for index, (chunk, count) in enumerate(zip(memory.chunks, memory.in_progress, strict=True)):
            yield f"  chunk {index}: {count} x {chunk.saved.total:,} in progress"
        extra = memory.moment.extra.to_dict()
        yield f"  {memory.moment.name} ({memory.moment.formula}): {_categories(extra)}"
        yield f"  peak        {_categories(memory.peak.to_dict())}"
    yield ""
    yield "Saved for the backward pass, bytes"
    seen = set()
    for memory in plan.stages:
        for chunk in memory.chunks:
            for unit in chunk.units:
                if unit in seen:
                    continue
                seen.add(unit)
                yield f"  {unit.name}: {unit.memory.total:,}"
                for saved in unit.saved:
                    yield f"    {saved.name:<36}{saved.formula:<18}{saved.bytes:>16,}"
                for moment in (*unit.forward, *unit.backward):
                    needed = moment.extra.total
                    yield f"    + while it runs: {moment.name} = {moment.formula} = {needed:,}"


def _categories(values: dict[str, int]) -> str:
    shown = [f"{name.replace('_', ' ')} {n:,}" for name, n in values.items() if n]
    return ", ".join(shown)


def _explain_time(plan: LayoutPlan, sizes: TensorSizes) -> Iterator[str]:
    yield ""
    yield "Time of each part for one micro-batch: max(products + attention + bytes, launches)"
    parts = {
        part: None
        for stage in range(plan.layout.pp)
        for chunk in chunk_plans(plan.config, plan.layout, sizes, stage)
        for part in chunk
    }
    for part in parts:
        for direction, work in (("forward", part.work.forward), ("backward", part.backward)):
            seconds = work_seconds(work, plan.cluster, sizes.bytes)
            shapes = " ".join(
                f"{g.batch}x[{g.m},{g.k}][{g.k},{g.n}]{g.precision}" for g in work.gemms
            )
            yield (
                f"  {part.name} {direction}: {seconds * 1e6:.0f} us; products {shapes or '-'};"
                f" attention {work.attention_flops:.3g} FLOPs; {work.bytes:,} bytes;"
                f" {work.kernels} kernels"
            )


def to_json(result: SearchResult, plans: Sequence[LayoutPlan], tokens: float | None) -> str:
    """Everything as one object."""
    cluster = None if not plans else asdict(plans[0].cluster)
    values = {
        "tried": result.tried,
        "invalid": result.invalid,
        "too_large": result.too_large,
        "fit": len(result.plans),
        "cluster": cluster,
        "layouts": [plan.to_dict(tokens) for plan in plans],
    }
    return json.dumps(values, indent=2)
