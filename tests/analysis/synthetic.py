"""Invented results in every kind of plot, as large as those of real models, to test drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_moe.analysis.base import Analysis, Material
from megatron_moe.analysis.model import MoEModel, Sizes
from megatron_moe.analysis.plot import (
    Axis,
    Bars,
    Figure,
    Flow,
    Heatmap,
    Lines,
    Panel,
    Radar,
    Reference,
    Scatter,
    Series,
)
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.sample import Sample

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
"""A label or token piece that must stay text."""
PIECES = ["▁the", "▁def", "</script>", HOSTILE, "$x$", "▁die", "中文", "\\n", "=", "▁{"]


@dataclass
class Dims:
    """Sizes of the invented models."""

    layers: int = 24
    experts: int = 32
    topk: int = 2


class InventedModel:
    """What a report reads of a model."""

    def __init__(self, label: str, step: int | None, dims: Dims) -> None:
        self.label, self.step, self.family, self.path = label, step, "OpenMoE", Path(label)
        self.routing = f"softmax over {dims.experts}, best {dims.topk}"
        self.sizes = Sizes(
            num_layers=dims.layers,
            moe_layers=tuple(range(dims.layers)),
            num_experts=dims.experts,
            topk=dims.topk,
            hidden_size=2048,
            expert_width=8192,
            vocab_size=256384,
            max_length=2048,
        )


@dataclass
class InventedDomain:
    """What a report reads of a domain."""

    name: str
    starts: range


@dataclass
class InventedSample:
    """What a report reads of a sample."""

    domains: tuple[InventedDomain, ...]
    seq_length: int = 2048


def per_layer(dims: Dims, make: Any) -> dict[str, Panel]:
    """A panel for each layer."""
    return {f"layer {i}": make(i, np.random.default_rng(i)) for i in range(dims.layers)}


def bars(dims: Dims, series: int = 3) -> Figure:
    names = ["code", "web text", "arXiv", "books", "Wikipedia", "reviews"][:series]

    def panel(i: int, rng: np.random.Generator) -> Panel:
        shares = rng.dirichlet(np.full(dims.experts, 8.0), series) * 100 * dims.topk
        return Bars(
            series=[
                Series(name=n, x=range(dims.experts), y=row)
                for n, row in zip(names, shares, strict=True)
            ],
            x=Axis(title="expert"),
            y=Axis(title="tokens of the domain (%)"),
            references=[Reference(value=100 * dims.topk / dims.experts, label="uniform")],
        )

    return Figure(
        key="bars",
        title="Experts by domain",
        panels=per_layer(dims, panel),
        caption="Bars above the dashed line: the expert is chosen more often than by chance.",
    )


def stacked(dims: Dims) -> Figure:
    rng = np.random.default_rng(5)
    drops = rng.random((3, dims.layers))
    series = [
        Series(name=n, x=range(dims.layers), y=row)
        for n, row in zip(["first choice", "second choice", "both"], drops, strict=True)
    ]
    panel = Bars(
        series=series, x=Axis(title="layer"), y=Axis(title="dropped choices (%)"), stacked=True
    )
    return Figure(key="stacked", title="Dropped choices by layer", panels={"all": panel})


def lines(dims: Dims, labels: Sequence[str]) -> Figure:
    x = np.arange(dims.layers)
    series = []
    for n, label in enumerate(labels):
        rng = np.random.default_rng(n)
        y = 0.5 + 0.1 * n + 0.02 * x + rng.normal(0, 0.02, x.size)
        series.append(Series(name=label, x=x, y=y, low=y - 0.04, high=y + 0.04, group=label))
        series.append(
            Series(name=f"{label}, shuffled", x=x, y=0.3 + 0 * y, dashed=True, group=label)
        )
    panel = Lines(
        series=series,
        x=Axis(title="layer"),
        y=Axis(title="saturation", range=(0, 1.3)),
        references=[Reference(value=dims.topk / dims.experts, label="k/N, chance")],
        markers=True,
    )
    return Figure(
        key="lines",
        title="Router saturation by layer",
        panels={"all": panel},
        caption="Shaded: 95% bootstrap interval.",
    )


def many_lines(dims: Dims) -> Figure:
    x = np.arange(2, 21)

    def line(i: int) -> Series:
        return Series(name=f"position {i}", x=x, y=1.0 / x + 0.01 * i)

    x_axis, y_axis = Axis(title="steps (thousands)", log=True), Axis(title="loss", log=True)
    panel = Lines(series=[line(i) for i in range(14)], x=x_axis, y=y_axis)
    return Figure(key="many-lines", title="Fourteen lines on logarithmic axes", panels={"a": panel})


def scatter(dims: Dims) -> Figure:
    def panel(i: int, rng: np.random.Generator) -> Panel:
        x = rng.normal(0, 0.1, 496)
        y = 0.6 * x + rng.normal(0, 0.05, x.size)
        pairs = [f"experts {a} and {b}" for a, b in zip(*np.triu_indices(32, 1), strict=True)]
        return Scatter(
            series=[Series(name="pairs of experts", x=x, y=y, text=pairs)],
            x=Axis(title="cosine of the router rows"),
            y=Axis(title="cosine of the mean neurons"),
            diagonal=True,
        )

    return Figure(key="scatter", title="Router against experts", panels=per_layer(dims, panel))


def heatmap(dims: Dims, label: str) -> Figure:
    def panel(i: int, rng: np.random.Generator) -> Panel:
        vectors = rng.normal(0, 1, (dims.experts, 40)) + 0.1 * i
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        values = vectors @ vectors.T
        np.fill_diagonal(values, np.nan)
        names = [str(e) for e in range(dims.experts)]
        return Heatmap(
            values=values,
            rows=names,
            columns=names,
            x=Axis(title="expert"),
            y=Axis(title="expert"),
            colour="cosine",
            centre=0.0,
        )

    title = f"Similarity of experts, {label}"
    return Figure(key=f"heat-{label}", title=title, panels=per_layer(dims, panel))


def pieces(dims: Dims) -> Figure:
    rng = np.random.default_rng(3)
    names = [str(e) for e in range(dims.experts)]
    panel = Heatmap(
        values=rng.random((len(PIECES) * 2, dims.experts)),
        rows=PIECES * 2,
        columns=names,
        x=Axis(title="expert"),
        y=Axis(title="token"),
        colour="gate score",
        text=[[f"{piece} at {e}" for e in names] for piece in PIECES * 2],
    )
    return Figure(key="pieces", title="Chosen experts along a text", panels={"text": panel})


def categories(dims: Dims) -> Figure:
    panel = Bars(
        series=[Series(name="share", x=PIECES, y=np.linspace(1, 0.1, len(PIECES)))],
        x=Axis(title="token"),
        y=Axis(title="share of the most chosen expert"),
        references=[Reference(value=0.2, label=HOSTILE)],
    )
    return Figure(key="categories", title=f"Tokens {HOSTILE}", panels={"all": panel})


def radar(dims: Dims) -> Figure:
    def panel(i: int, rng: np.random.Generator) -> Panel:
        names = ["code", "English", "German", "mathematics"]
        rows = rng.dirichlet(np.full(dims.experts, 8.0), len(names)) * 100
        return Radar(
            categories=[f"E{e}" for e in range(dims.experts)],
            series=[Series(name=n, x=(), y=row) for n, row in zip(names, rows, strict=True)],
            radius="tokens (%)",
            reference=Reference(value=100 / dims.experts, label="uniform"),
        )

    return Figure(key="radar", title="Domains around the experts", panels=per_layer(dims, panel))


def flow(dims: Dims) -> Figure:
    rng = np.random.default_rng(9)
    names = [str(e) for e in range(min(dims.experts, 16))]
    flows = [rng.random((len(names), len(names))) ** 6 for _ in range(3)]
    panel = Flow(columns=[names] * 4, titles=[f"layer {i}" for i in (0, 7, 15, 23)], flows=flows)
    return Figure(key="flow", title="From layer to layer, first choices", panels={"all": panel})


class Invented(Analysis):
    """An analysis with given figures."""

    definition = (
        "The share of tokens of a condition that choose an expert, R[c, e] = N(c, e) / N(c)."
    )
    source = "Invented, for tests"

    def __init__(self, key: str, group: str, title: str, make: Any) -> None:
        self.key, self.group, self.title, self._make = key, group, title, make  # type: ignore[misc]
        self.question = f"What does {title.lower()} look like?"  # type: ignore[misc]

    def compute(self, material: Material) -> Result:
        raise NotImplementedError

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        found: Sequence[Figure] = self._make(list(results))
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        return (
            f"As in the papers, {HOSTILE} is a text, and all is within the null for {len(results)}."
        )


def invented(dims: Dims) -> dict[str, Analysis]:
    """Analyses that show every kind of panel."""
    made = [
        Invented(
            "similarity",
            "weights",
            "Expert similarity",
            lambda labels: [heatmap(dims, n) for n in labels],
        ),
        Invented("router", "weights", "Router and experts", lambda labels: [scatter(dims)]),
        Invented(
            "text", "experts", "Experts of a text", lambda labels: [pieces(dims), categories(dims)]
        ),
        Invented(
            "domains",
            "routing",
            "Domain specialization",
            lambda labels: [bars(dims), radar(dims), stacked(dims)],
        ),
        Invented("flow", "routing", "Flow between layers", lambda labels: [flow(dims)]),
        Invented(
            "saturation",
            "training",
            "Router saturation",
            lambda labels: [lines(dims, labels), many_lines(dims)],
        ),
    ]
    return {each.key: each for each in made}


def invented_results(
    analyses: Mapping[str, Analysis], labels: Sequence[str]
) -> dict[str, dict[str, Result]]:
    """Results of each checkpoint."""

    def result(key: str) -> Result:
        columns: dict[str, list[Any]] = {
            "layer": list(range(40)),
            "token": [PIECES[i % len(PIECES)] for i in range(40)],
            "share": [0.1 * i for i in range(40)],
        }
        return Result(
            analysis=key,
            numbers={
                "chance": 0.0625,
                "largest share over chance": 3.21987,
                f"undefined {HOSTILE}": float("nan"),
            },
            tables=[Table(name="shares", about="share of tokens", columns=columns)],
            notes=[f"Few tokens of {HOSTILE}."],
        )

    return {label: {key: result(key) for key in analyses} for label in labels}


def invented_models(labels: Sequence[str], dims: Dims) -> list[MoEModel]:
    return [cast(MoEModel, InventedModel(n, 1000 * i, dims)) for i, n in enumerate(labels)]


def invented_sample() -> Sample:
    names = ("code", "web text", HOSTILE)
    domains = tuple(InventedDomain(name, range(100 * (i + 1))) for i, name in enumerate(names))
    return cast(Sample, InventedSample(domains))
