"""Neurons of two experts assigned to each other, so that matched ones are as similar as possible.

An expert computes the same function if its neurons are put in another order, in all projections at
once. Two experts may therefore agree although their matrices do not; the assignment of Lo et al.
(arXiv 2406.18219, section 3.2) finds that order. It is solved exactly (`linear_sum_assignment`).

Shapes: F neurons of an expert, S sampled ones, H hidden, Q ways to match: each projection alone,
and all `JOINT`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.weights.statistics import kendall
from megatron_moe.errors import UsageError

JOINT = "joint"
"""Name of the match of all projections with one order of neurons."""


def assignment_solver() -> Any:
    """SciPy's `linear_sum_assignment`.

    Raises:
        UsageError: SciPy is not installed.
    """
    try:
        return importlib.import_module("scipy.optimize").linear_sum_assignment
    except ImportError:
        expected = "installed to match neurons"
        fix = "pip install 'megatron-moe[analysis]'"
        raise UsageError("package scipy", "missing", expected, fix) from None


@dataclass(frozen=True, kw_only=True)
class Match:
    """How the neurons of two experts correspond.

    Args:
        before: mean cosine of neurons at the same place.
        after: mean cosine of matched neurons.
        tau: Kendall's tau between the places of matched neurons; 1 if none moved.
    """

    before: float
    after: float
    tau: float


def match(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], places_S: Tensor
) -> dict[str, Match]:
    """Assign each sampled neuron of one expert to a neuron of another, each at most once.

    Args:
        first: sampled neurons by projection, [S, H], fp32.
        second: all neurons by projection, [F, H], fp32.
        places_S: index of the sampled neurons in the first expert, ascending.

    Returns:
        By projection, and `JOINT` for the vectors that have all projections of a neuron side by
        side.
    """
    found = {}
    dots = torch.zeros(len(places_S), len(next(iter(second.values()))))
    first_square, second_square = torch.zeros(dots.shape[0]), torch.zeros(dots.shape[1])
    for name, sample_SH in first.items():
        neurons_FH = second[name]
        dots_SF = sample_SH @ neurons_FH.T
        squares = sample_SH.square().sum(1), neurons_FH.square().sum(1)
        dots += dots_SF
        first_square += squares[0]
        second_square += squares[1]
        found[name] = _assign(_cosines(dots_SF, *squares), places_S.numpy())
    found[JOINT] = _assign(_cosines(dots, first_square, second_square), places_S.numpy())
    return found


def _cosines(dots_SF: Tensor, first_S: Tensor, second_F: Tensor) -> npt.NDArray[np.float32]:
    """In place; neurons of zeros are similar to none."""
    scale_S, scale_F = first_S.clamp_min(1e-30).rsqrt(), second_F.clamp_min(1e-30).rsqrt()
    found: npt.NDArray[np.float32] = dots_SF.mul_(scale_S[:, None]).mul_(scale_F).numpy()
    return found


def _assign(cosine_SF: npt.NDArray[np.float32], places_S: npt.NDArray[np.int64]) -> Match:
    rows_S, columns_S = assignment_solver()(cosine_SF, maximize=True)
    return Match(
        before=float(cosine_SF[np.arange(len(places_S)), places_S].mean(dtype=np.float64)),
        after=float(cosine_SF[rows_S, columns_S].mean(dtype=np.float64)),
        tau=kendall(columns_S.astype(np.int64)),
    )


def random_match(
    projections: Sequence[str], places_S: Tensor, width: int, hidden: int, seed: int
) -> dict[str, Match]:
    """The match of two experts of white noise: the chance level of the sizes alone.

    Even random neurons find partners with a cosine above 0, since the best of many is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = {}, {}
    for name in projections:
        first[name] = torch.randn(len(places_S), hidden, generator=generator)
        second[name] = torch.randn(width, hidden, generator=generator)
    return match(first, second, places_S)


def mixed_neurons(
    neurons: Mapping[str, Tensor], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random mixtures of an expert's neurons, which have the same second moments but no identity.

    Matching them shows how similar neurons get that share no more than the directions in which an
    expert's weights are large, as neurons of all experts of a layer do.

    Args:
        neurons: all neurons by projection, [F, H], fp32.
        count: S.
        generator: of the mixing weights, which are normal and the same for all projections.
    """
    width = len(next(iter(neurons.values())))
    mix_SF = torch.randn(count, width, generator=generator) / width**0.5
    return {name: mix_SF @ matrix_FH for name, matrix_FH in neurons.items()}
