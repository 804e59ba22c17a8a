"""Interfaces of what a pass over the tokens collects, and the registry of the collectors.

A collector adds up integers, or sums in fp64, over any number of batches; its state is a few
arrays, so that an interrupted pass continues. Several analyses share one: it is made once for a
checkpoint.

Shapes: L MoE layers, E experts, K choices, D domains.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.model import MoERunner, Sizes
from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.analysis.sample import Sample

State = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a collector is made for.

    Args:
        sizes: of the model.
        sample: the tokens; without domains if only weights are analysed.
        layers: the MoE layers that are analysed, ascending.
        seed: of everything that is drawn.
    """

    sizes: Sizes
    sample: Sample
    layers: tuple[int, ...]
    seed: int

    def places(self) -> list[int]:
        """Index in `Observation.layers` of each analysed layer."""
        return [self.sizes.moe_layers.index(layer) for layer in self.layers]


@dataclass(frozen=True)
class Inputs:
    """Inputs of experts that a collector reads.

    Args:
        layers: indices in the network.
        places_N: tokens of the batch, row by row, ascending.
    """

    layers: tuple[int, ...]
    places_N: npt.NDArray[np.int64]


class Collector(ABC):
    """Adds up what analyses need.

    Attributes:
        needs_predictions: whether it reads `predicted_T` or `loss_T`.
    """

    needs_predictions: bool = False

    def inputs_for(self, batch: TokenBatch) -> Inputs | None:
        """What it reads of the inputs of a batch; `None` for nothing.

        Recorded inputs stay in memory for the whole pass of the batch, of all layers at once.
        """
        return None

    @abstractmethod
    def add(self, seen: Observation, runner: MoERunner) -> None:
        """Count one batch.

        Args:
            seen: its forward pass; inputs are recorded at the tokens that `inputs_for` asks for.
            runner: the model, for outputs of single experts.
        """

    def state(self) -> State:
        """All sums, by name; by default every attribute that is an array."""
        return {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from the sums of `state`."""
        for name, value in state.items():
            setattr(self, name, value)


class Tallies(Collector):
    """A collector whose sums are tensors on the model's device.

    Analyses read them with `state`, as arrays.

    Args:
        sums: by name; what each counts is documented by the subclass.
    """

    def __init__(self, sums: dict[str, Tensor]) -> None:
        self._sums = sums

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The sums, to be changed in place, on ``device``."""
        for name, value in self._sums.items():
            self._sums[name] = value.to(device)
        return self._sums

    def state(self) -> State:
        """All sums, by name."""
        return {name: value.cpu().numpy() for name, value in self._sums.items()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Continue from the sums of `state`."""
        self._sums = {name: torch.from_numpy(value.copy()) for name, value in state.items()}


def tally(sums: Tensor, index: Tensor, amount: Tensor | None = None) -> None:
    """`sums[i] += 1`, or the amount, for each i in ``index``.

    Args:
        sums: contiguous, of any shape; it is addressed as if it were flat.
        index: int64, of any shape.
        amount: of the shape of ``index``.
    """
    flat = index.reshape(-1)
    if amount is None:
        added = torch.ones(1, dtype=sums.dtype, device=sums.device).expand(len(flat))
    else:
        added = amount.reshape(-1).to(sums.dtype)
    sums.view(-1).scatter_add_(0, flat, added)


_MADE: dict[str, Callable[[Setting], Collector]] = {}


def collector(name: str) -> Callable[[type[Collector]], type[Collector]]:
    """A class decorator that enters a collector under the name of its file.

    The class is called with the `Setting`.
    """

    def enter(made: type[Collector]) -> type[Collector]:
        _MADE[name] = made
        return made

    return enter


def make_collector(name: str, setting: Setting) -> Collector:
    """The collector in `collectors/<name>.py`."""
    importlib.import_module(f"megatron_moe.analysis.collectors.{name}")
    return _MADE[name](setting)
