"""Statistics of routing since the last reset: loads, drops, entropy, losses.

Each layer sums into one small fp64 tensor on its device. The host reads it only in
`collect_statistics`, after reducing over the ranks.

Shapes: E experts, T tokens of this rank, K choices, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe.moe.exchange import Group, size_of
from megatron_moe.moe.router import Scores

MOST_PENDING = 64
"""Passes whose tensors are kept at most before they are added up. On a CPU with 2 threads a layer
of 8 experts of 256 x 512 with 1024 tokens spends 0.16 ms of 25 ms if it adds each pass on its
own."""
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
        micro_batches: counted, over data-parallel ranks.
    """

    load: tuple[float, ...]
    kept: tuple[float, ...]
    tokens: float
    router_entropy: float
    aux_loss: float
    z_loss: float
    micro_batches: float

    @property
    def kept_choices(self) -> float:
        """Choices that an expert computed."""
        return sum(self.kept)

    @property
    def dropped_choices(self) -> float:
        """Choices without a slot."""
        return sum(self.load) - sum(self.kept)

    @property
    def drop_rate(self) -> float:
        """Share of choices that were dropped; 0 if there were none."""
        return self.dropped_choices / max(sum(self.load), 1.0)

    @property
    def max_over_mean_load(self) -> float:
        """Load of the busiest expert over the mean; 1 when balanced."""
        return max(self.load) * len(self.load) / max(sum(self.load), 1.0)


class LedgerError(RuntimeError):
    """A layer has lost tokens or counted some twice."""


def check_ledger(layers: Mapping[int, LayerStatistics], positions: int, topk: int) -> None:
    """Check that every MoE layer accounts for every position that went through the model.

    Each of these positions, padding included, must be routed once and make ``topk`` choices, of
    which each is kept or dropped: positions * topk = kept + dropped, and no expert keeps more than
    chose it. The counts are integers in fp64, so the comparison is exact up to 2^53.

    Args:
        layers: from `collect_statistics`; the same on every rank, so that all raise.
        positions: of all global batches since the last reset: sequences * length.
        topk: choices K of a token.

    Raises:
        LedgerError: names the layer and what does not add up.
    """
    for number, layer in layers.items():
        chosen, counts = sum(layer.load), zip(layer.kept, layer.load, strict=True)
        if layer.tokens != positions:
            found = f"{layer.tokens:.0f} tokens routed"
            expected = f"{positions}, the positions of the steps"
        elif chosen != positions * topk:
            found = f"{chosen:.0f} choices, kept and dropped"
            expected = f"{positions * topk}, {topk} for each of {positions} tokens"
        elif not all(0 <= kept <= load for kept, load in counts):
            found, expected = f"{layer.kept} kept of {layer.load}", "no more kept than chosen"
        else:
            continue
        raise LedgerError(f"MoE layer {number}: tokens must add up to {expected} (got {found})")


class RoutingCounter(nn.Module):
    """Sums of one layer on its device; not part of a checkpoint.

    `add` only keeps references to a few small tensors; they are added up when `MOST_PENDING` passes
    have been kept or the sums are read, so that a pass pays almost nothing.

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
            "_sums", torch.zeros(size, dtype=torch.float64, device=device), persistent=False
        )
        self._sums: Tensor
        self._clear_pending()

    def _clear_pending(self) -> None:
        self._loads: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._scalars: list[Tensor] = []
        self._tokens, self._micro_batches = 0, 0.0

    @torch.no_grad()
    def add(
        self,
        scores: Scores,
        load_GE: Tensor,
        kept_GE: Tensor,
        losses: Sequence[Tensor],
        ranks_per_row: int = 1,
    ) -> None:
        """Count one micro-batch.

        Args:
            scores: of this rank's tokens.
            load_GE: choices of each group and expert that this rank counts, before drops; may have
                no groups.
            kept_GE: those of them that were not dropped.
            losses: this rank's shares of the balance and the z-loss, without coefficients.
            ranks_per_row: ranks that share the micro-batch; each counts its part of it.
        """
        self._loads.append(load_GE)
        self._kept.append(kept_GE)
        self._scalars += ((scores.probs_TE * scores.log_probs_TE).sum(), *losses)
        self._tokens += scores.choices_TK.shape[0]
        self._micro_batches += 1.0 / ranks_per_row
        if len(self._loads) == MOST_PENDING:
            self._add_up()

    @torch.no_grad()
    def _add_up(self) -> None:
        """Add pending passes to the sums."""
        if not self._loads:
            return
        experts = self.num_experts
        self._sums[:experts] += torch.cat(self._loads).sum(0)
        self._sums[experts : 2 * experts] += torch.cat(self._kept).sum(0)
        tokens, batches, entropy, *losses = self._sums[2 * experts :].unbind()
        tokens += self._tokens
        batches += self._micro_batches
        scalars = torch.stack(self._scalars).view(-1, 1 + len(losses)).double().sum(0).unbind()
        entropy -= scalars[0]
        for loss, share in zip(losses, scalars[1:], strict=True):
            loss += share
        self._clear_pending()

    @property
    def sums(self) -> Tensor:
        """[2 E + 5] fp64: loads, kept choices, and `_SCALARS`; to be read or written in place."""
        self._add_up()
        return self._sums

    def reset(self) -> None:
        """Set all sums to zero."""
        self._clear_pending()
        self._sums.zero_()


def counters(chunks: Iterable[nn.Module]) -> dict[int, RoutingCounter]:
    """The counters of all MoE layers in model chunks, by 0-based layer number."""
    found = (m for chunk in chunks for m in chunk.modules() if isinstance(m, RoutingCounter))
    return {counter.layer_number: counter for counter in found}


def reset_statistics(chunks: Iterable[nn.Module]) -> None:
    """Set the sums of every MoE layer to zero."""
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
    """Device of the parameters of a pipeline stage without MoE layers."""
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
