"""Capacity by a target drop rate: the smallest of a few sizes whose drops are rare enough.

What a step would drop at another capacity is known without trying it: the loads of experts before
drops do not depend on it. So every pass counts its drops at each of `SIZES` factors, and the
controller of a layer takes the smallest factor at which the mean of the last steps is at most the
target. It grows as soon as it must, and shrinks by one size at most every `HOLD` steps and only
where drops are `MARGIN` below the target: buffers keep their shapes between these changes.

Everything is decided from integers that add up to the same on every rank, so ranks agree without a
word more.

Shapes: E experts, G capacity groups, S sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from megatron_moe.config import MoEConfig
from megatron_moe.moe.plan import Capacity, slots_per_expert

SIZES = 13
"""Factors between the ends of `--moe-capacity-factor-range`, which are among them: with 0.5 and 4
each is 1.19 times the one before."""
WINDOW = 8
"""Steps of the running mean: each counts 1 / 8, after the first ones, whose plain mean it is."""
HOLD = 8
"""Steps for which a size stays at least before it shrinks."""
MARGIN = 0.1
"""Part of the target that drops must stay below it to shrink."""


def sizes_of(moe: MoEConfig) -> tuple[float, ...]:
    """The factors, ascending, in equal ratios; rounded to four digits, for the log."""
    low, high = moe.moe_capacity_factor_range
    return tuple(float(f"{low * (high / low) ** (i / (SIZES - 1)):.4g}") for i in range(SIZES))


@dataclass(frozen=True, kw_only=True)
class LayerCapacity:
    """The controller of one layer.

    Args:
        size: number of the factor in use.
        means: share of choices that would be dropped at each size, mean over steps.
        steps: that were counted.
        age: of them, since the size changed.
    """

    size: int
    means: tuple[float, ...] = (0.0,) * SIZES
    steps: int = 0
    age: int = 0

    def after(self, rates: Sequence[float], target: float) -> LayerCapacity:
        """The controller after a step that would have dropped these shares.

        Example with three sizes, target 0.1 and size 1: means of (0.2, 0.12, 0.04) need size 2, at
        once. Means of (0.095, 0.05, 0) stay at size 1, since 0.095 is not below 0.09; with
        (0.08, 0.05, 0) size 0 follows once size 1 is `HOLD` steps old.
        """
        weight = 1.0 / min(self.steps + 1, WINDOW)
        means = tuple(
            mean + weight * (rate - mean) for mean, rate in zip(self.means, rates, strict=True)
        )
        needed = next((i for i, mean in enumerate(means) if mean <= target), len(means) - 1)
        size, age = self.size, self.age + 1
        if needed > size:
            size, age = needed, 0
        elif size > 0 and age >= HOLD and means[size - 1] <= target * (1.0 - MARGIN):
            size, age = size - 1, 0
        return replace(self, size=size, means=means, steps=self.steps + 1, age=age)

    def to_json(self) -> dict[str, object]:
        """Plain values; floats are exact."""
        return {**asdict(self), "means": list(self.means)}


def first_size(moe: MoEConfig) -> int:
    """The size next to `--moe-expert-capacity-factor`, with which a run begins."""
    factor = moe.moe_expert_capacity_factor
    assert factor is not None
    sizes = sizes_of(moe)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / factor)))


class DropsBySize(nn.Module):
    """What one layer has counted in the current step, on its device; not part of a checkpoint.

    Args:
        moe: sizes and the rule that makes slots of them.
        device: where the layer is.
    """

    def __init__(self, moe: MoEConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.moe, self.sizes = moe, sizes_of(moe)
        counts = torch.zeros(SIZES + 1, dtype=torch.float64, device=device)
        self.register_buffer("counts", counts, persistent=False)
        self.counts: Tensor
        self._slots: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, load_GE: Tensor, capacity: Capacity) -> None:
        """Count a pass.

        Args:
            load_GE: choices before drops, over all ranks that share the tokens.
            capacity: of the pass; its groups matter, not its slots.
        """
        slots_S = self._slots_of(capacity.group_size, load_GE.device)
        over_GES = (load_GE.unsqueeze(2) - slots_S).clamp_(min=0)
        self.counts[:SIZES] += over_GES.sum((0, 1))
        self.counts[SIZES] += load_GE.sum()

    def _slots_of(self, tokens: int, device: torch.device) -> Tensor:
        """Slots of a group at each size."""
        if tokens not in self._slots:
            slots = [slots_per_expert(self.moe, tokens, factor) for factor in self.sizes]
            self._slots[tokens] = torch.tensor(slots, device=device)
        return self._slots[tokens]
