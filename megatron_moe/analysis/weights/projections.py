"""Matrices of experts with a neuron in each row, and the other networks they are compared with.

Shapes: E experts, F neurons (the width) of an expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.analysis.model import ExpertWeights, LayerWeights

PROJECTIONS = ("up", "gate", "down", "linear")
"""In the order of plots. `gate` is what the activation function is applied to; only released
OpenMoE has `linear`, see `ExpertWeights`."""


def projections_of(layer: LayerWeights) -> tuple[str, ...]:
    """The projections that the experts of a layer have."""
    return tuple(name for name in PROJECTIONS if getattr(layer.experts[0], name) is not None)


def neurons_of(expert: ExpertWeights, projection: str) -> Tensor:
    """One projection as [F, H], a row per neuron: what it reads, or for `down` what it writes."""
    matrix: Tensor = getattr(expert, projection).whole()
    if matrix.untyped_storage().nbytes() > matrix.numel() * matrix.element_size():
        # Part of a wider matrix in the files, which would stay in memory as long as the part.
        matrix = matrix.clone()
    return matrix.t() if projection == "down" else matrix


@dataclass(frozen=True)
class Other:
    """A network without router beside the experts of a layer.

    Args:
        name: `shared`, or `dense` and its layer.
        weights: its matrices.
        comparable: whether they have the shape of an expert's. Those of another width still have
            an average neuron.
    """

    name: str
    weights: ExpertWeights
    comparable: bool


def others_of(layer: LayerWeights, dense: Mapping[int, ExpertWeights]) -> tuple[Other, ...]:
    """The shared expert and the nearest dense layer, as far as there are any.

    Args:
        layer: an MoE layer.
        dense: feed-forward networks of the layers without experts.
    """
    candidates = {} if layer.shared is None else {"shared": layer.shared}
    if dense:
        nearest = min(dense, key=lambda index: (abs(index - layer.layer), index))
        candidates[f"dense {nearest}"] = dense[nearest]
    shape = layer.experts[0].up.shape
    return tuple(Other(name, each, each.up.shape == shape) for name, each in candidates.items())
