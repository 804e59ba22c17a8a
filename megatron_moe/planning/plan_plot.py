"""A figure of layouts: memory by category of the fullest stage, and the parts of a step's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.errors import UsageError
from megatron_moe.planning.layout_plan import LayoutPlan
from megatron_moe.planning.memory import CATEGORIES


def draw(plans: Sequence[LayoutPlan], path: str) -> None:
    """Write the figure; the suffix decides its format.

    Raises:
        UsageError: matplotlib is not installed, or does not know the suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install megatron-moe[analysis]"
        raise UsageError("--plot", path, "used with matplotlib installed", fix) from None
    figure = Figure(figsize=(10, 1.5 + 0.8 * len(plans)), layout="constrained")
    if Path(path).suffix[1:] not in figure.canvas.get_supported_filetypes():
        known = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise UsageError("--plot", path, f"a file that ends in one of {known}")
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [_name(plan) for plan in plans]
    left = [0.0] * len(plans)
    for index, category in enumerate(CATEGORIES):
        fullest = [max(plan.stages, key=lambda stage: stage.peak.total) for plan in plans]
        values = [stage.peak.values[index] / 1e9 for stage in fullest]
        memory.barh(names, values, left=left, label=category.replace("_", " "))
        left = [a + b for a, b in zip(left, values, strict=True)]
    memory.axvline(plans[0].cluster.usable_bytes / 1e9, color="black", linestyle="--")
    memory.set_xlabel("GB on the fullest stage (line: usable)")
    left = [0.0] * len(plans)
    parts = {
        "stages work": [plan.time.busy for plan in plans],
        "bubble": [plan.time.pipeline - plan.time.busy for plan in plans],
        "reduction": [plan.time.reduction for plan in plans],
        "optimizer": [plan.time.optimizer for plan in plans],
    }
    for name, values in parts.items():
        time.barh(names, values, left=left, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    time.set_xlabel("seconds of a step")
    time.invert_yaxis()
    for axes in (memory, time):
        axes.legend(fontsize="x-small", loc="lower right")
    figure.savefig(path)


def _name(plan: LayoutPlan) -> str:
    layout = plan.layout
    chunks = f"x{layout.num_chunks}" if layout.num_chunks > 1 else ""
    if layout.chunk_layers[-1] != layout.chunk_layers[0]:
        chunks += f" (last stage {layout.chunk_layers[-1]} layers)"
    return (
        f"TP{layout.tp} PP{layout.pp}{chunks} EP{layout.ep} ETP{layout.etp}"
        f" DP{layout.dp} B{layout.micro_batch_size}"
        + (" recompute" if plan.config.parallel.recompute_granularity else "")
    )
