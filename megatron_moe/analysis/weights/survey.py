"""One reading of the weights of a layer, reduced to what the analyses need.

Inner products of whole matrices are added up over blocks of neurons: in fp32 within a block, in
fp64 between blocks. Beside that, memory holds one projection of all experts in the dtype of the
files: E F H elements, for 34B/32E in bf16 32 x 12288 x 3072 x 2 = 2.4 GB.

Shapes: E experts, R rows of a comparison (experts, then other networks), F neurons of an expert, H
hidden, G sampled neurons of an expert, C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_moe.analysis.dense import DenseModel
from megatron_moe.analysis.model import ExpertWeights, LayerWeights, MoEModel
from megatron_moe.analysis.weights.projections import (
    Other,
    neurons_of,
    others_of,
    projections_of,
)
from megatron_moe.analysis.weights.statistics import Array, components

COMPONENTS = 2
"""C, the axes of a scatter plot."""
POINTS = 1024
"""Most neurons of a layer whose components are computed."""
_BLOCK_BYTES = 64 << 20
"""Bytes of the fp32 copy of a block of neurons of all experts."""


@dataclass(frozen=True, kw_only=True)
class ProjectionSurvey:
    """What is kept of one projection of a layer.

    Args:
        gram_RR: inner products of whole matrices; NaN for networks of another width.
        mean_gram_RR: inner products of average neurons.
        matrices_EC: coordinates of the experts' matrices along their first principal components.
        matrices_share: share of the variance of each component.
        neurons_EGC: coordinates of sampled neurons along theirs.
        neurons_share: share of the variance of each component.
    """

    gram_RR: Array
    mean_gram_RR: Array
    matrices_EC: Array
    matrices_share: Array
    neurons_EGC: Array
    neurons_share: Array


@dataclass(frozen=True, kw_only=True)
class LayerSurvey:
    """What is kept of the weights of a layer.

    Args:
        layer: index in the network.
        names: of the rows: numbers of the experts, then names of the others, see `Other`.
        kinds: of the others.
        widths: neurons of each row.
        router_gram_EE: inner products of the router's rows.
        projections: by name, in the order of `PROJECTIONS`.
    """

    layer: int
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    widths: tuple[int, ...]
    router_gram_EE: Array
    projections: dict[str, ProjectionSurvey]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.router_gram_EE)


@dataclass(frozen=True, kw_only=True)
class WeightSurvey:
    """The layers of a model.

    Args:
        layers: in order.
        width: F.
        hidden: H.
    """

    layers: tuple[LayerSurvey, ...]
    width: int
    hidden: int

    @property
    def size(self) -> int:
        """Elements of an expert's matrix, F H."""
        return self.width * self.hidden

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections, the same in all layers."""
        return tuple(self.layers[0].projections)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layers[0].num_experts

    def notes(self) -> list[str]:
        """Networks that could not be compared, a sentence each."""
        different = {
            (kind, width)
            for layer in self.layers
            for kind, width in zip(layer.kinds, layer.widths[layer.num_experts :], strict=True)
            if width != self.width
        }
        subjects = {
            "shared": "The shared expert is",
            "dense": "Dense layers are",
            "beside": "Layers of the dense model are",
        }
        return [
            f"{subjects[kind]} {width} neurons wide and experts {self.width}: only their average "
            "neurons are compared."
            for kind, width in sorted(different)
        ]


def survey(
    model: MoEModel, layers: Sequence[int], seed: int, beside: DenseModel | None = None
) -> WeightSurvey:
    """Read the weights of some MoE layers.

    Args:
        model: the checkpoint.
        layers: indices of MoE layers.
        seed: of the sample of neurons.
        beside: a dense model whose layers are compared with the experts.

    Raises:
        UsageError: the dense model has another hidden size.
    """
    dense = model.dense_weights()
    found = []
    for index in layers:
        layer = model.weights(index)
        found.append(_survey_layer(layer, others_of(layer, dense, beside), seed))
    return WeightSurvey(
        layers=tuple(found), width=model.sizes.expert_width, hidden=model.sizes.hidden_size
    )


def sampled_neurons(width: int, count: int, seed: int) -> Tensor:
    """Ascending indices of ``count`` of ``width`` neurons, of all if there are fewer."""
    drawn = np.random.default_rng(seed).permutation(width)[:count]
    return torch.from_numpy(np.sort(drawn))


def _survey_layer(layer: LayerWeights, others: Sequence[Other], seed: int) -> LayerSurvey:
    experts = len(layer.experts)
    width = layer.experts[0].up.shape[0]
    router_EH = layer.router.whole().double()
    points = sampled_neurons(width, max(1, POINTS // experts), seed)
    return LayerSurvey(
        layer=layer.layer,
        names=(*(str(e) for e in range(experts)), *(other.name for other in others)),
        kinds=tuple(other.kind for other in others),
        widths=(width,) * experts + tuple(other.weights.up.shape[0] for other in others),
        router_gram_EE=(router_EH @ router_EH.T).numpy(),
        projections={
            name: _survey_projection(name, layer.experts, others, points)
            for name in projections_of(layer)
        },
    )


def _survey_projection(
    name: str, experts: Sequence[ExpertWeights], others: Sequence[Other], points: Tensor
) -> ProjectionSurvey:
    means, matrices, sampled = [], [], []
    for expert in experts:
        matrix_FH = neurons_of(expert, name)
        means.append(matrix_FH.sum(0, dtype=torch.float32).double() / len(matrix_FH))
        sampled.append(matrix_FH[points].float())
        matrices.append(matrix_FH)
    compared = [True] * len(experts)
    for other in others:
        # Released OpenMoE's dense layers have the same projections as its experts.
        matrix_FH = neurons_of(other.weights, name)
        means.append(matrix_FH.sum(0, dtype=torch.float32).double() / len(matrix_FH))
        compared.append(other.comparable)
        if other.comparable:
            matrices.append(matrix_FH)
    gram = _gram(matrices)
    size, place = len(compared), np.flatnonzero(compared)
    gram_RR = np.full((size, size), np.nan)
    gram_RR[np.ix_(place, place)] = gram
    mean_RH = torch.stack(means)
    matrices_EC, matrices_share = components(gram[: len(experts), : len(experts)], COMPONENTS)
    neurons_NC, neurons_share = _neuron_components(torch.stack(sampled).flatten(0, 1))
    return ProjectionSurvey(
        gram_RR=gram_RR,
        mean_gram_RR=(mean_RH @ mean_RH.T).numpy(),
        matrices_EC=matrices_EC,
        matrices_share=matrices_share,
        neurons_EGC=neurons_NC.reshape(len(experts), len(points), COMPONENTS),
        neurons_share=neurons_share,
    )


def _gram(matrices: Sequence[Tensor]) -> Array:
    """Inner products of matrices [F, H] of one shape."""
    width, hidden = matrices[0].shape
    step = max(1, _BLOCK_BYTES // (4 * hidden * len(matrices)))
    block_RFH = torch.empty(len(matrices), min(step, width), hidden)
    total_RR = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
    for start in range(0, width, step):
        count = min(step, width - start)
        for row, matrix_FH in enumerate(matrices):
            block_RFH[row, :count] = matrix_FH[start : start + count]
        flat = block_RFH[:, :count].flatten(1)
        total_RR += flat @ flat.T
    total_RR = (total_RR + total_RR.T) / 2
    return total_RR.numpy()


def _neuron_components(neurons_NH: Tensor) -> tuple[Array, Array]:
    """See `components`, for neurons."""
    # fp64: the inner products of centred vectors are differences of large numbers.
    neurons_NH = neurons_NH.double()
    neurons_NH = neurons_NH - neurons_NH.mean(0)
    return components((neurons_NH @ neurons_NH.T).numpy(), COMPONENTS)
