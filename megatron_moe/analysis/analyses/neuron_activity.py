"""How many neurons of an expert are active, and how large they are.

Shapes: L layers, E experts, F width, C columns of a heat map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.collectors.expert_passes import ACTIVE, ExpertPasses, check_rows
from megatron_moe.analysis.dense_activity import dense_activity
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table, layer_lines
from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Reference
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.reading import sentence_for_each

Array = npt.NDArray[Any]
COLUMNS = 128
"""Columns of a heat map: neurons are sorted and averaged in as many groups."""
SHOWN = 64
"""Experts of a heat map, at most."""
LARGEST = 0.1
"""Share of the neurons whose part of the intermediate state is reported."""


@register
class NeuronActivity(Analysis):
    """See the module."""

    key = "neuron-activity"
    title = "Activity of neurons"
    question = "How many neurons of an expert are active for a token?"
    definition = (
        f"The share of tokens for which |act(W_gate x)| > {ACTIVE:g}, for each neuron of each "
        "expert; every token goes through all experts. A neuron is dead if it is active for no "
        "token, and always active if for every token. Chance: if all neurons of a layer had the "
        "same activity p, the share of a neuron over n tokens would have the standard deviation "
        "sqrt(p (1-p) / n). The intermediate state is the input of the down projection; its "
        "concentration is the part of the sum of absolute values that the largest tenth of the "
        "neurons of an expert hold: 10% if all are equal."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), sections 4.1-4.2"
    group = "experts"
    uses = ("expert_passes",)
    reads_dense = True

    def check(self, setting: Setting) -> None:
        """See `Analysis.check`."""
        check_rows(setting)

    def compute(self, material: Material) -> Result:
        """Activity by layer, expert and neuron."""
        passes = cast(ExpertPasses, material.collected["expert_passes"])
        layers, tokens = material.setting.layers, int(passes.tokens[0])
        share_LEF = passes.active_LEF / tokens
        dead_LE = (passes.active_LEF == 0).mean(-1)
        always_LE = (passes.active_LEF == tokens).mean(-1)
        concentration_LE = concentration(passes.inner_LEF)
        by_expert = {
            "active": share_LEF.mean(-1),
            "dead": dead_LE,
            "always_active": always_LE,
            "largest_tenth": concentration_LE,
        }
        mean_L = share_LEF.mean((1, 2))
        spread_L = share_LEF.std((1, 2))
        chance_L = np.sqrt(mean_L * (1 - mean_L) / tokens)
        numbers = {
            "active neurons of a token": mean_L.mean(),
            "dead neurons": dead_LE.mean(),
            "always active neurons": always_LE.mean(),
            "spread of the activity of neurons": spread_L.mean(),
            "spread by chance": chance_L.mean(),
            "part of the intermediate state in a tenth of the neurons": concentration_LE.mean(),
            "tokens": tokens,
        }
        dense = _beside(material)
        return Result(
            analysis=self.key,
            numbers={name: float(value) for name, value in numbers.items()} | dict(dense.numbers),
            notes=dense.notes,
            tables=[
                grid_table(
                    "neurons",
                    "shares: active neurons of a token, neurons active for no and for every token; "
                    "part of the intermediate state in the largest tenth of the neurons",
                    {"layer": layers, "expert": range(share_LEF.shape[1])},
                    by_expert,
                ),
                *dense.tables,
            ],
            arrays={
                "layers": np.array(layers),
                "active_LEF": share_LEF.astype(np.float32),
                "inner_LEF": (passes.inner_LEF / tokens).astype(np.float32),
                "mean_L": mean_L,
                "dead_L": dead_LE.mean(1),
                "always_L": always_LE.mean(1),
                "largest_L": concentration_LE.mean(1),
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Lines by layer, and experts against sorted neurons."""
        activity = layer_lines(
            results,
            {"active for a token": "mean_L"},
            {"dead": "dead_L", "always active": "always_L"},
            Axis(title="neurons (%)"),
            factor=100,
            references=_references(results, _DENSE_ACTIVE),
        )
        largest = layer_lines(
            results,
            {"largest tenth of the neurons": "largest_L"},
            {},
            Axis(title="part of the absolute values (%)"),
            factor=100,
            references=[
                Reference(value=100 * LARGEST, label="equal neurons"),
                *_references(results, _DENSE_LARGEST),
            ],
        )
        lines = [
            Figure(
                key="neuron-activity-by-layer",
                title="Active neurons",
                panels={"all": activity},
            ),
            Figure(
                key="neuron-states-by-layer",
                title="Concentration of intermediate states",
                panels={"all": largest},
            ),
        ]
        maps = [
            figure
            for label, result in results.items()
            for figure in (
                _figure(label, result, results, "activity", "Activity of neurons", "active_LEF"),
                _figure(label, result, results, "states", "Intermediate states", "inner_LEF"),
            )
        ]
        return [*lines, *maps]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Activity, dead neurons, and whether neurons differ."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


_DENSE_ACTIVE = "active neurons of a token, dense model"
_DENSE_LARGEST = "part of the intermediate state in a tenth of the neurons, dense model"


def _beside(material: Material) -> Result:
    """The same of the layers of a dense model, if one is put beside."""
    dense, setting = material.beside, material.setting
    if dense is None:
        return Result(analysis="")
    found = dense_activity(dense, setting.sample, setting.seed)
    if found is None:
        what = (
            f"The dense model {dense.label} was not run: its vocabulary lacks some of the tokens."
        )
        return Result(analysis="", notes=[what])
    active_L = found.active_LF.mean(1) / found.tokens
    largest_L = concentration(found.inner_LF)
    table = Table(
        name="dense",
        about=f"shares in the layers of {dense.label}, as in the table of neurons",
        columns={
            "layer": list(dense.layers),
            "active": active_L.tolist(),
            "dead": (found.active_LF == 0).mean(1).tolist(),
            "always_active": (found.active_LF == found.tokens).mean(1).tolist(),
            "largest_tenth": largest_L.tolist(),
        },
    )
    numbers = {_DENSE_ACTIVE: float(active_L.mean()), _DENSE_LARGEST: float(largest_L.mean())}
    return Result(analysis="", numbers=numbers, tables=[table])


def _references(results: Mapping[str, Result], number: str) -> list[Reference]:
    """A line for the dense model, which all checkpoints share."""
    found = [result.numbers[number] for result in results.values() if number in result.numbers]
    return [Reference(value=100 * found[0], label="dense model")] if found else []


def concentration(inner_LEF: Array) -> Array:
    """Part of the sum over neurons that the largest tenth holds, [..]; NaN if all are 0."""
    largest = max(1, round(LARGEST * inner_LEF.shape[-1]))
    top = np.sort(inner_LEF, -1)[..., -largest:].sum(-1)
    total = inner_LEF.sum(-1)
    return np.divide(top, total, out=np.full(total.shape, np.nan), where=total > 0)


def in_columns(values_EF: Array, columns: int = COLUMNS) -> Array:
    """Neurons of each expert, largest first, averaged in at most ``columns`` groups: [E, C]."""
    ordered = -np.sort(-values_EF, -1)
    width = values_EF.shape[-1]
    bounds = np.arange(min(columns, width) + 1) * width // min(columns, width)
    sums = np.add.reduceat(ordered, bounds[:-1], axis=-1)
    return np.asarray(sums / np.diff(bounds))


def _figure(
    label: str, result: Result, results: Mapping[str, Result], key: str, title: str, array: str
) -> Figure:
    is_activity = key == "activity"
    panels = {}
    for layer, values in zip(result.arrays["layers"], result.arrays[array], strict=True):
        shown = in_columns(values[:SHOWN].astype(np.float64))
        width, columns = values.shape[-1], shown.shape[-1]
        panels[f"layer {layer}"] = Heatmap(
            values=100 * shown if is_activity else shown,
            rows=[str(e) for e in range(len(shown))],
            columns=[str(c * width // columns) for c in range(columns)],
            x=Axis(title="neurons, sorted"),
            y=Axis(title="expert"),
            colour="tokens (%)" if is_activity else "mean absolute value",
            range=(0.0, 100.0) if is_activity else None,
        )
    what = (
        f"Share of tokens for which |act(W_gate x)| > {ACTIVE:g}."
        if is_activity
        else "Mean absolute input of the down projection."
    )
    return Figure(
        key=figure_key(f"neuron-{key}", label, results),
        title=figure_title(title, label, results),
        panels=panels,
        caption=f"{what} Neurons are sorted within each expert.",
    )


def _reading(result: Result) -> str:
    n = result.numbers
    active, dead = n["active neurons of a token"], n["dead neurons"]
    spread, chance = n["spread of the activity of neurons"], n["spread by chance"]
    said = f"{100 * active:.0f}% of an expert's neurons are active for a token"
    said += (
        ": its projections are dense in use"
        if active > 0.9
        else ": much of an expert is idle for a token"
        if active < 0.5
        else ""
    )
    if dead > 0:
        said += f"; {100 * dead:.2g}% are active for none of the {int(n['tokens'])} tokens"
    if chance > 0 and spread > 2 * chance:
        said += f". Neurons differ ({spread / chance:.1f} times the spread of equal ones)"
    else:
        said += ". Neurons do not differ beyond chance"
    part = n["part of the intermediate state in a tenth of the neurons"]
    if not math.isnan(part):
        said += f"; a tenth of them hold {100 * part:.0f}% of the intermediate state"
    if _DENSE_ACTIVE in n:
        said += f". In the dense model {100 * n[_DENSE_ACTIVE]:.0f}% are active"
    return said + "."
