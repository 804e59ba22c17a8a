"""What the routers did since the last reset: loads, drops, entropy, losses.

Each layer adds to one small fp64 tensor on its device, in every forward pass that counts: with
recomputation the first pass of a checkpointed layer runs without gradients while training, and is
left out. The host reads only when someone asks, after reducing over the ranks.
Shapes: E experts, T tokens of this rank, K choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe.moe.exchange import Group, size_of
from megatron_moe.moe.router import Scores

_SCALARS = ("tokens", "micro_batches", "entropy", "load_balancing", "router_z")


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One MoE layer since the last reset, over all ranks and micro-batches.

    Args:
        load: choices of each expert, before drops.
        kept: those that were not dropped.
        tokens: tokens routed.
        router_entropy: mean over tokens of -sum p ln p, in nats.
        aux_loss: load balancing, mean over micro-batches, without coefficient; k when balanced.
        z_loss: router z-loss, mean over micro-batches, without coefficient.
        micro_batches: how many, over data-parallel ranks.
    """

    load: tuple[float, ...]
    kept: tuple[float, ...]
    tokens: float
    router_entropy: float
    aux_loss: float
    z_loss: float
    micro_batches: float

    @property
    def drop_rate(self) -> float:
        """Share of choices that were dropped; 0 if there were none."""
        return (sum(self.load) - sum(self.kept)) / max(sum(self.load), 1.0)

    @property
    def max_over_mean_load(self) -> float:
        """Load of the busiest expert over the mean; 1 when balanced."""
        return max(self.load) * len(self.load) / max(sum(self.load), 1.0)


class RoutingCounter(nn.Module):
    """Sums of one layer on its device; no part of a checkpoint.

    Args:
        layer_number: 0-based index of the transformer layer.
        num_experts: E.
        device: where the layer is.
    """

    def __init__(
        self, layer_number: int, num_experts: int, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.num_experts = num_experts
        size = 2 * num_experts + len(_SCALARS)
        self.register_buffer(
            "sums", torch.zeros(size, dtype=torch.float64, device=device), persistent=False
        )
        self.sums: Tensor
        # Tokens and micro-batches of a pass, kept on the device: they hardly ever change.
        self.register_buffer("step", torch.zeros_like(self.sums[:2]), persistent=False)
        self.step: Tensor
        self._step: tuple[int, int] | None = None

    @torch.no_grad()
    def add(
        self,
        scores: Scores,
        load_E: Tensor,
        kept_E: Tensor,
        load_balancing: Tensor,
        router_z: Tensor,
        ranks_per_row: int,
    ) -> None:
        """Count one micro-batch.

        Args:
            scores: of this rank's tokens.
            load_E: choices of each expert that this rank counts, before drops.
            kept_E: those of them that were not dropped.
            load_balancing: this rank's share of the loss, without coefficient.
            router_z: likewise.
            ranks_per_row: ranks that share the micro-batch; each counts its part of it.
        """
        if self._step != (scores.choices_TK.shape[0], ranks_per_row):
            self._step = scores.choices_TK.shape[0], ranks_per_row
            self.step[0], self.step[1] = self._step[0], 1.0 / ranks_per_row
        entropy = -(scores.probs_TE * scores.log_probs_TE).sum()
        values = torch.stack((entropy, load_balancing, router_z))
        self.sums += torch.cat((load_E, kept_E, self.step, values))

    def reset(self) -> None:
        """Start counting afresh."""
        self.sums.zero_()


def counters(chunks: Iterable[nn.Module]) -> dict[int, RoutingCounter]:
    """The counters of all MoE layers in model chunks, by 0-based layer number."""
    found = (m for chunk in chunks for m in chunk.modules() if isinstance(m, RoutingCounter))
    return {counter.layer_number: counter for counter in found}


def reset_statistics(chunks: Iterable[nn.Module]) -> None:
    """Start counting afresh in every MoE layer."""
    for counter in counters(chunks).values():
        counter.reset()


def collect_statistics(chunks: Iterable[nn.Module], pgs: Any) -> dict[int, LayerStatistics]:
    """Statistics of every MoE layer of the whole model, the same on every rank.

    A collective call: summed over the ranks that share rows and over data-parallel ranks, and
    gathered over pipeline stages. It waits for the device.

    Args:
        chunks: this rank's model chunks.
        pgs: the `ProcessGroupCollection`; `None` for one process.
    """
    mine = counters(chunks)
    tp, dp, pp = (getattr(pgs, name, None) for name in ("tp", "dp", "pp"))
    device = next((c.sums.device for c in mine.values()), _device_of(chunks))
    layers, width = _table_shape(mine, pp, device)
    if layers == 0:
        return {}
    table = torch.zeros(layers, width + 1, dtype=torch.float64, device=device)
    for number, counter in mine.items():
        table[number, :width] = counter.sums
        table[number, width] = 1.0
    for group in (tp, dp, pp):
        if size_of(group) > 1:
            dist.all_reduce(table, group=group)
    rows = table.tolist()
    return {i: _statistics(row[:width]) for i, row in enumerate(rows) if row[width] > 0}


def _table_shape(
    mine: dict[int, RoutingCounter], pp: Group, device: torch.device
) -> tuple[int, int]:
    """Layers (highest number + 1) and sums per layer, over all pipeline stages."""
    width = max((c.sums.numel() for c in mine.values()), default=0)
    shape = torch.tensor([max(mine, default=-1) + 1, width], device=device)
    if size_of(pp) > 1:
        dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=pp)
    layers, width = shape.tolist()
    return layers, width


def _device_of(chunks: Iterable[nn.Module]) -> torch.device:
    """Where a stage without MoE layers keeps its parameters."""
    return next((p.device for c in chunks for p in c.parameters()), torch.device("cpu"))


def _statistics(sums: list[float]) -> LayerStatistics:
    """One row of sums as means."""
    experts = (len(sums) - len(_SCALARS)) // 2
    tokens, batches, entropy, balance, z = sums[2 * experts :]
    return LayerStatistics(
        load=tuple(sums[:experts]),
        kept=tuple(sums[experts : 2 * experts]),
        tokens=tokens,
        router_entropy=entropy / max(tokens, 1.0),
        aux_loss=balance / max(batches, 1.0),
        z_loss=z / max(batches, 1.0),
        micro_batches=batches,
    )
