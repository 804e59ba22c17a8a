"""A part of a layer as the planner sees it: what it saves, and what it needs while it runs.

A `Unit` has the tensors that it saves for its backward pass, and `Moment`s, points of its passes
with temporaries on top of everything that is saved up to it. Freed tensors count negative there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_moe.planning.memory import MemoryByCategory


@dataclass(frozen=True)
class Saved:
    """A tensor that a unit keeps for its backward pass."""

    name: str
    formula: str
    bytes: int
    category: str = "activations"

    @property
    def memory(self) -> MemoryByCategory:
        """The bytes in their category."""
        return MemoryByCategory(**{self.category: self.bytes})


@dataclass(frozen=True)
class Moment:
    """A point of a pass: what exists on top of all that is saved."""

    name: str
    formula: str
    extra: MemoryByCategory


@dataclass(frozen=True)
class Unit:
    """One part of a layer, in the order of the forward pass."""

    name: str
    saved: tuple[Saved, ...]
    forward: tuple[Moment, ...] = ()
    backward: tuple[Moment, ...] = ()

    @functools.cached_property
    def memory(self) -> MemoryByCategory:
        """All that is saved."""
        return total_of(saved.memory for saved in self.saved)

    def recomputed(self, keeps: int, output: int) -> Unit:
        """The unit if only its first ``keeps`` tensors are saved, and the others, and its output,
        again just before its backward pass.

        Args:
            keeps: tensors.
            output: bytes.
        """
        again = total_of(saved.memory for saved in self.saved[keeps:])
        again = again + MemoryByCategory(activations=output)
        backward = tuple(
            Moment(m.name, f"{m.formula} + what is recomputed", m.extra + again)
            for m in self.backward
        )
        # The forward pass without gradients frees what it does not save as it goes.
        forward = tuple(Moment(m.name, m.formula, m.extra + again) for m in self.forward)
        return Unit(self.name, self.saved[:keeps], forward, backward)


def total_of(parts: Iterable[MemoryByCategory]) -> MemoryByCategory:
    """The sum of some memories."""
    total = MemoryByCategory()
    for part in parts:
        total = total + part
    return total
