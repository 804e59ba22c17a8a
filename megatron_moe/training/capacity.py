"""`--moe-target-drop-rate` in a run: counts of a step are summed, and decide about a later one.

    step n      passes count what each size would drop
    after it    one all-reduce of (S + 1) numbers per layer and a copy to the host, not waited for
    step n + 1  runs with the sizes that it had; the norm of its gradient is read by the host
    after it    the counts of step n have long arrived: they decide the sizes of step n + 2

So no step waits for its counts. The counts that have not decided yet are saved, like the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe.config import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe.adaptive_capacity import SIZES, LayerCapacity, first_size, sizes_of
from megatron_moe.moe.exchange import size_of
from megatron_moe.moe.observing import moe_layers

CAPACITY = "moe_capacity"
"""Key of the state in a checkpoint's `TrainState.extra`."""


class CapacityControl:
    """The capacity of all MoE layers of the model, the same on every rank.

    Args:
        config: of the run, with a target.
        saved: from `to_json`, of the checkpoint that the run resumes from. One of another range of
            factors is ignored: the run begins anew with `--moe-expert-capacity-factor`.

    Raises:
        UsageError: ``saved`` is something else.
    """

    def __init__(self, config: RunConfig, saved: Any = None) -> None:
        self.sizes, self.numbers = sizes_of(config.moe), config.moe_layers
        target = config.moe.moe_target_drop_rate
        assert target is not None
        self.target = target
        start = LayerCapacity(size=first_size(config.moe))
        self.layers = dict.fromkeys(self.numbers, start)
        self._waiting: Tensor | None = None
        """Counts of the last step, [L, S + 1] fp64, maybe still on their way."""
        if saved is not None:
            self._restore(saved)

    def _restore(self, saved: Any) -> None:
        try:
            if tuple(saved["sizes"]) != self.sizes or len(saved["layers"]) != len(self.numbers):
                return
            layers = [LayerCapacity(**{**s, "means": tuple(s["means"])}) for s in saved["layers"]]
            self.layers = dict(zip(self.numbers, layers, strict=True))
            if saved["waiting"] is not None:
                self._waiting = torch.tensor(saved["waiting"], dtype=torch.float64)
        except (TypeError, KeyError, ValueError) as error:
            expected = "an object with sizes, layers and waiting"
            raise UsageError(f"'{CAPACITY}' of the checkpoint", repr(error), expected) from None

    def to_json(self) -> dict[str, Any]:
        """State for a checkpoint; its floats are exact. Waits for the counts of the last step."""
        waiting = None if self._waiting is None else self._waiting.tolist()
        layers = [self.layers[number].to_json() for number in self.numbers]
        return {"sizes": list(self.sizes), "layers": layers, "waiting": waiting}

    def apply(self, chunks: Iterable[nn.Module]) -> None:
        """Give the MoE layers of this rank their factors."""
        for number, layer in moe_layers(chunks).items():
            layer.set_capacity_factor(self.sizes[self.layers[number].size])

    def after_step(self, chunks: Iterable[nn.Module], pgs: Any) -> list[str]:
        """Decide by the counts of the step before the last one, and send off those of the last.

        A collective call over data-parallel ranks and pipeline stages.

        Args:
            chunks: this rank's model chunks.
            pgs: the `ProcessGroupCollection`.

        Returns:
            A line for the log for each layer whose size changed.
        """
        changes = [] if self._waiting is None else self._decide(self._waiting.tolist())
        layers = moe_layers(chunks)
        device = next((p.device for chunk in chunks for p in chunk.parameters()), None)
        table = torch.zeros(len(self.numbers), SIZES + 1, dtype=torch.float64, device=device)
        for row, number in enumerate(self.numbers):
            if number in layers:
                counter = layers[number].drops_by_size
                assert counter is not None
                table[row] = counter.counts
                counter.counts.zero_()
        for group in (getattr(pgs, name, None) for name in ("dp", "pp")):
            if size_of(group) > 1:
                dist.all_reduce(table, group=group)
        self._waiting = _sent_to_host(table)
        self.apply(chunks)
        return changes

    def _decide(self, table: list[list[float]]) -> list[str]:
        lines = []
        for number, (*dropped, choices) in zip(self.numbers, table, strict=True):
            if choices == 0:
                continue
            before = self.layers[number]
            after = before.after([count / choices for count in dropped], self.target)
            self.layers[number] = after
            if after.size != before.size:
                old, new = self.sizes[before.size], self.sizes[after.size]
                mean = after.means[before.size]
                lines.append(
                    f"MoE layer {number}: capacity factor {old:g} -> {new:g}"
                    f" (drops at {old:g}: {mean:.2%}, target {self.target:.2%})"
                )
        return lines


def _sent_to_host(table: Tensor) -> Tensor:
    """The table on the host, once the device has come to it; nothing waits for that here."""
    if table.device.type == "cpu":
        return table
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    return host.copy_(table, non_blocking=True)
