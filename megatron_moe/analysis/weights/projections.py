"""Matrices of experts with a neuron in each row, and the other networks they are compared with.

Shapes: E experts, F neurons (the width) of an expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.model import ExpertWeights, LayerWeights
from megatron_moe.errors import UsageError

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
        name: `shared`, or the name and the layer of a dense network.
        kind: `shared`, `dense` or `beside`, for a layer of another model.
        weights: its matrices.
        comparable: whether they have the shape of an expert's. Those of another width still have
            an average neuron.
    """

    name: str
    kind: str
    weights: ExpertWeights
    comparable: bool


def others_of(
    layer: LayerWeights, dense: Mapping[int, ExpertWeights], beside: DenseModel | None
) -> tuple[Other, ...]:
    """The shared expert, the nearest dense layer and that of a dense model, if any.

    Args:
        layer: an MoE layer.
        dense: feed-forward networks of the layers without experts.
        beside: another model.

    Raises:
        UsageError: the other model has another hidden size.
    """
    found: list[tuple[str, str, ExpertWeights]] = []
    if layer.shared is not None:
        found.append(("shared", "shared", layer.shared))
    if dense:
        nearest = _nearest(dense, layer.layer)
        found.append((f"dense {nearest}", "dense", dense[nearest]))
    hidden = layer.router.shape[1]
    if beside is not None and beside.hidden_size != hidden:
        what = f"hidden size of {beside.path}"
        raise UsageError(what, beside.hidden_size, f"that of the MoE model ({hidden})")
    if beside is not None:
        nearest = _nearest(beside.layers, layer.layer)
        found.append((f"{beside.label} {nearest}", "beside", beside.layers[nearest]))
    shape, linear = layer.experts[0].up.shape, layer.experts[0].linear
    return tuple(
        Other(
            name, kind, each, each.up.shape == shape and (each.linear is None) == (linear is None)
        )
        for name, kind, each in found
    )


def _nearest(layers: Mapping[int, ExpertWeights], layer: int) -> int:
    """The same layer if it is there, else the nearest; of two the earlier."""
    return min(layers, key=lambda index: (abs(index - layer), index))
