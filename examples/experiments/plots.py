"""The plots of docs/experiments.md, drawn with matplotlib from the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from examples.experiments.tables import comparisons


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    # The same file for the same numbers.
    matplotlib.rcParams.update({"svg.hashsalt": "experiments", "font.size": 8})
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height))


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def losses(path: Path) -> None:
    """Differences at equal compute with their intervals, both sizes."""
    found = comparisons()
    variants = list(dict.fromkeys(each.variant for each in found))
    figure, axes = _axes(6.5, 0.22 * len(variants) + 0.9)
    for shift, (size, color) in zip((-0.15, 0.15), (("S", "C0"), ("M", "C1")), strict=True):
        own = [each for each in found if each.size == size]
        y = [variants.index(each.variant) + shift for each in own]
        x = [each.compute.mean for each in own]
        error = [each.compute.high - each.compute.mean for each in own]
        axes.errorbar(x, y, xerr=error, fmt="o", color=color, markersize=3, label=f"size {size}")
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(variants)), variants)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss against OpenMoE's recipe at equal compute (nats)")
    axes.legend(loc="best")
    _save(figure, path)


FIGURES: Mapping[str, Callable[[Path], None]] = {"losses": losses}
