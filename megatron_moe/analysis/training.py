"""Checkpoints of one run in the order of training, for analyses that compare them.

Each result stores its step and what makes it comparable in arrays of these names; see `identity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Material
from megatron_moe.analysis.plot import Axis
from megatron_moe.analysis.result import Result

Array = npt.NDArray[Any]
PERCENT = "training (% of the last checkpoint's steps)"


def identity(material: Material) -> dict[str, Array]:
    """Arrays of a result by which `in_order` finds the checkpoints that can be compared."""
    sizes, setting = material.setting.sizes, material.setting
    step = material.model.step
    return {
        "step": np.array(-1 if step is None else step),
        "run": np.array(material.model.run),
        "sample": np.array(setting.sample.fingerprint),
        "shape": np.array([sizes.num_experts, sizes.topk, *setting.layers]),
        "layers": np.array(setting.layers),
    }


def in_order(results: Mapping[str, Result]) -> dict[str, Result]:
    """The results that can be compared with the last one, by step.

    The last is the one with the highest step, or the last given where a step is unknown. Results
    of other tokens, or of another number of layers, experts or choices, are left out, and those of
    another run, which numbers its experts differently: without `MoEModel.declared_run` those of
    another directory, since nothing else shows that checkpoints are of one run.
    """
    steps = [int(result.arrays["step"]) for result in results.values()]
    labels = list(results)
    if min(steps) >= 0:
        labels = [label for _, label in sorted(zip(steps, labels, strict=True), key=lambda x: x[0])]
    last = results[labels[-1]].arrays
    return {
        label: results[label] for label in labels if not difference(results[label].arrays, last)
    }


def difference(arrays: Mapping[str, Array], last: Mapping[str, Array]) -> str:
    """What keeps a result from being compared with the last one, as a verb phrase; else empty."""
    if arrays["run"] != last["run"]:
        return (
            "is in another directory, so perhaps of another run, which numbers experts otherwise "
            "(--same-run says that it is not)"
        )
    if arrays["sample"] != last["sample"]:
        return "read other tokens"
    return "" if np.array_equal(arrays["shape"], last["shape"]) else "has other sizes"


def left_out(results: Mapping[str, Result], ordered: Mapping[str, Result]) -> list[str]:
    """A note for each result that `in_order` left out of ``ordered``."""
    last = list(ordered)[-1]
    return [
        f"{label} {difference(result.arrays, ordered[last].arrays)}: not compared with {last}."
        for label, result in results.items()
        if label not in ordered
    ]


def none_to_compare(results: Mapping[str, Result]) -> str:
    """Why `in_order` leaves nothing to compare, as sentences; empty if it leaves something."""
    ordered = in_order(results)
    return " ".join(left_out(results, ordered)) if len(ordered) < 2 else ""


def axis_of(results: Mapping[str, Result]) -> tuple[list[Any], str]:
    """Values of an x-axis for checkpoints in order, and its title.

    Percent of the last step where steps are known and differ, else the labels.
    """
    steps = [int(result.arrays["step"]) for result in results.values()]
    if min(steps) < 0 or len(set(steps)) < len(steps) or steps[-1] == 0:
        return list(results), "checkpoint"
    return [100 * step / steps[-1] for step in steps], PERCENT


def training_axis(title: str) -> Axis:
    """The x-axis of that title."""
    return Axis(title=title, range=(0, 100) if title == PERCENT else None)
