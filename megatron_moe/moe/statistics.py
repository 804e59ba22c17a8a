"""Statistics of routing since the last reset: loads, drops, entropy, logits, losses.

Each layer sums into one small fp64 tensor on its device (`moe/counter.py`). The host reads it only
in `collect_statistics`, after reducing over the ranks.

Shapes: E experts, K choices, P position buckets, 2 kinds of tokens: real ones, then padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_moe.moe.counter import POSITION_BUCKETS, RoutingCounter
from megatron_moe.moe.exchange import Group, size_of


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """One MoE layer since the last reset, over all ranks and micro-batches.

    Args:
        load: choices of each expert, before drops.
        kept: those that were not dropped.
        tokens: tokens routed; without padding if that is not (`--moe-ignore-padding-tokens`).
        router_entropy: mean over tokens of -sum p ln p, in nats.
        router_confidence: mean over tokens of the largest of the E probabilities.
        logit_rms: root of the mean over tokens and experts of the squared router logit.
        aux_loss: load balancing, mean over micro-batches, without coefficient; k when balanced.
        z_loss: router z-loss, mean over micro-batches, without coefficient.
        micro_batches: counted, over data-parallel ranks.
        tokens_at: [2][P] tokens in each part of a row: real ones, then padding.
        kept_at: [2][P][K] choices of these tokens that were not dropped, by the rank of the choice.
        slots: of all experts, filled or not: the rows of buffers of fixed shape.
        further_aux_losses: as `aux_loss`, of the second and later balance losses, in the order of
            `--moe-router-load-balancing-type`.
    """

    load: tuple[float, ...]
    kept: tuple[float, ...]
    tokens: float
    router_entropy: float
    router_confidence: float
    logit_rms: float
    aux_loss: float
    z_loss: float
    micro_batches: float
    tokens_at: tuple[tuple[float, ...], ...]
    kept_at: tuple[tuple[tuple[float, ...], ...], ...]
    slots: float = 0.0
    further_aux_losses: tuple[float, ...] = ()

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

    @property
    def max_violation(self) -> float:
        """MaxVio: (load of the busiest expert - mean load) / mean load; 0 when balanced (Wang et
        al., arXiv 2408.15664).
        """
        return max(self.max_over_mean_load - 1.0, 0.0)

    @property
    def dead_experts(self) -> int:
        """Experts that no token has chosen."""
        return sum(count == 0 for count in self.load)

    @property
    def drop_rate_by_choice(self) -> tuple[float | None, ...]:
        """[K] share of first choices that were dropped, of second choices, ..."""
        kinds = self._routed_kinds
        tokens = sum(sum(self.tokens_at[kind]) for kind in kinds)
        buckets = [bucket for kind in kinds for bucket in self.kept_at[kind]]
        return tuple(_dropped(sum(kept), tokens) for kept in zip(*buckets, strict=True))

    @property
    def drop_rate_by_position(self) -> tuple[float | None, ...]:
        """[P] share of choices that were dropped in each part of a row; `None` without tokens."""
        kinds = self._routed_kinds
        tokens = [sum(self.tokens_at[kind][p] for kind in kinds) for p in range(POSITION_BUCKETS)]
        kept = [sum(sum(self.kept_at[k][p]) for k in kinds) for p in range(POSITION_BUCKETS)]
        return tuple(_dropped(k, t * self.topk) for k, t in zip(kept, tokens, strict=True))

    @property
    def _routed_kinds(self) -> tuple[int, ...]:
        """Kinds of tokens that made choices: real ones, and padding if it is routed."""
        return (0,) if self.tokens <= sum(self.tokens_at[0]) else (0, 1)

    @property
    def positions(self) -> float:
        """Tokens that passed through the layer, routed or not."""
        return sum(map(sum, self.tokens_at))

    @property
    def drop_rate_of_real(self) -> float | None:
        """Share of the choices of tokens that are not padding that were dropped."""
        return self._drop_rate_of(0)

    @property
    def drop_rate_of_padding(self) -> float | None:
        """Share of the choices of padding that were dropped; `None` if none was routed."""
        return self._drop_rate_of(1) if 1 in self._routed_kinds else None

    def _drop_rate_of(self, kind: int) -> float | None:
        return _dropped(sum(map(sum, self.kept_at[kind])), sum(self.tokens_at[kind]) * self.topk)

    @property
    def topk(self) -> int:
        """K, choices of a token."""
        return len(self.kept_at[0][0])

    def to_json(self) -> dict[str, Any]:
        """Fields and rates as plain values: counts are integers, a rate without tokens `None`."""
        counts = {"load": self.load, "kept": self.kept}
        at = {"tokens_at": self.tokens_at, "kept_at": self.kept_at}
        rates = (
            *("drop_rate", "drop_rate_of_real", "drop_rate_of_padding"),
            *("drop_rate_by_choice", "drop_rate_by_position"),
            *("max_over_mean_load", "max_violation", "dead_experts"),
        )
        means = ("router_entropy", "router_confidence", "logit_rms", "aux_loss", "z_loss")
        return {
            **{name: getattr(self, name) for name in (*rates, *means)},
            **_integers({**counts, "tokens": self.tokens, "slots": self.slots, **at}),
            "further_aux_losses": list(self.further_aux_losses),
            "micro_batches": self.micro_batches,
        }


def _integers(value: Any) -> Any:
    """The same with integers for floats, in nested containers."""
    if isinstance(value, dict):
        return {key: _integers(item) for key, item in value.items()}
    return [_integers(item) for item in value] if isinstance(value, tuple) else int(value)


def _dropped(kept: float, choices: float) -> float | None:
    """Share of choices that are not among the kept ones; `None` if there are none."""
    return 1.0 - kept / choices if choices else None


class LedgerError(RuntimeError):
    """A layer has lost tokens or counted some twice."""


def check_ledger(
    layers: Mapping[int, LayerStatistics],
    positions: int,
    topk: int,
    ignores_padding: bool = False,
) -> None:
    """Check that every MoE layer accounts for every position that went through the model.

    Each of these positions, padding included unless it is ignored, must be routed once and make
    ``topk`` choices, of which each is kept or dropped: positions * topk = kept + dropped, and no
    expert keeps more than chose it. The counts are integers in fp64, so the comparison is exact up
    to 2^53.

    Args:
        layers: from `collect_statistics`; the same on every rank, so that all raise.
        positions: of all global batches since the last reset: sequences * length.
        topk: choices K of a token.
        ignores_padding: whether padding is to make no choices.

    Raises:
        LedgerError: names the layer and what does not add up.
    """
    for number, layer in layers.items():
        chosen, counts = sum(layer.load), zip(layer.kept, layer.load, strict=True)
        pads = int(sum(layer.tokens_at[1])) if ignores_padding else 0
        routed, those = positions - pads, f" without {pads} of padding" if pads else ""
        if layer.tokens != routed:
            found = f"{layer.tokens:.0f} tokens routed"
            expected = f"{routed}, the positions of the steps{those}"
        elif layer.positions != positions:
            found = f"{layer.positions:.0f} tokens, real ones and padding"
            expected = f"{positions}, the positions of the steps"
        elif chosen != routed * topk:
            found = f"{chosen:.0f} choices, kept and dropped"
            expected = f"{routed * topk}, {topk} for each of {routed} tokens"
        elif not all(0 <= kept <= load for kept, load in counts):
            found, expected = f"{layer.kept} kept of {layer.load}", "no more kept than chosen"
        else:
            continue
        raise LedgerError(f"MoE layer {number}: tokens must add up to {expected} (got {found})")


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
    layers, width, experts, scalars = _table_shape(mine, pp, device)
    if layers == 0:
        return {}
    table = torch.zeros(layers, width + 2, dtype=torch.float64, device=device)
    for number, counter in mine.items():
        table[number, : counter.sums.numel()] = counter.sums
        table[number, width:] = torch.tensor([1.0, counter.num_experts], dtype=torch.float64)
    for group in (tp, dp, pp):
        if size_of(group) > 1:
            dist.all_reduce(table, group=group)
    rows = table.tolist()
    found = {}
    for number, row in enumerate(rows):
        if row[width] > 0:
            own = round(row[width + 1] / row[width])
            # Layers with fewer experts have fewer sums: two for each.
            found[number] = _statistics(row[: width - 2 * (experts - own)], own, scalars)
    return found


def _table_shape(
    mine: dict[int, RoutingCounter], pp: Group, device: torch.device
) -> tuple[int, int, int, int]:
    """Layers (highest number + 1), most sums and most E of a layer, and its scalars, over all
    pipeline stages.
    """
    width = max((c.sums.numel() for c in mine.values()), default=0)
    experts = max((c.num_experts for c in mine.values()), default=0)
    scalars = max((c.scalars for c in mine.values()), default=0)
    shape = torch.tensor([max(mine, default=-1) + 1, width, experts, scalars], device=device)
    if size_of(pp) > 1:
        dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=pp)
    layers, width, experts, scalars = shape.tolist()
    return layers, width, experts, scalars


def _device_of(chunks: Iterable[nn.Module]) -> torch.device:
    """Device of the parameters of a pipeline stage without MoE layers."""
    return next((p.device for c in chunks for p in c.parameters()), torch.device("cpu"))


def _statistics(sums: list[float], experts: int, scalars: int) -> LayerStatistics:
    """One row of sums as means."""
    ends = 2 * experts, 2 * experts + scalars
    tokens, batches, slots, entropy, confidence, square, balance, z, *more = sums[slice(*ends)]
    at_2PC = (
        torch.tensor(sums[ends[1] :], dtype=torch.float64).view(2, POSITION_BUCKETS, -1).tolist()
    )
    return LayerStatistics(
        load=tuple(sums[:experts]),
        kept=tuple(sums[experts : 2 * experts]),
        tokens=tokens,
        router_entropy=entropy / max(tokens, 1.0),
        router_confidence=confidence / max(tokens, 1.0),
        logit_rms=math.sqrt(square / max(tokens * experts, 1.0)),
        aux_loss=balance / max(batches, 1.0),
        z_loss=z / max(batches, 1.0),
        micro_batches=batches,
        tokens_at=tuple(tuple(counts[0] for counts in kind) for kind in at_2PC),
        kept_at=tuple(tuple(tuple(counts[1:]) for counts in kind) for kind in at_2PC),
        slots=slots,
        further_aux_losses=tuple(each / max(batches, 1.0) for each in more),
    )
