"""What one MoE layer sums up of its passes, on its device.

`RoutingCounter.add` is called by every pass and must cost almost nothing; `moe/statistics.py`
reduces the sums over ranks and turns them into rates.

Shapes: E experts, T tokens of this rank, K choices, G groups, S positions of a row on this rank, R
rows of several passes, P position buckets, 2 kinds of tokens: real ones, then padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.moe.scoring import Scores

MOST_PENDING = 64
"""Passes whose tensors are kept at most before they are added up. On a CPU with 2 threads a layer
of 8 experts of 256 x 512 with 1024 tokens spends 0.16 ms of 25 ms if it adds each pass on its
own."""
POSITION_BUCKETS = 8
"""Equal parts P of a row in which drops are counted separately."""
SCALARS = (
    *("tokens", "micro_batches", "slots", "entropy", "confidence", "logit_square"),
    *("load_balancing", "router_z"),
)
"""Numbers of a layer that are one each, in the order of the sums; further balance losses follow."""


@dataclass(frozen=True, kw_only=True)
class TokenFates:
    """Which choices of this rank's tokens were kept, and where the tokens are.

    Args:
        kept_TK: bool, tokens in (sequence, batch) order.
        batch: rows of the micro-batch.
        shard: which part of the rows' positions these tokens are, under sequence parallelism.
        shards: such parts; one for each rank that shares the rows.
        padding_T: bool, which tokens are padding; `None` for none.
        ignored: whether padding was not routed.
        slots: of all experts and groups of the micro-batch, on the one rank that counts them.
    """

    kept_TK: Tensor
    batch: int
    shard: int = 0
    shards: int = 1
    padding_T: Tensor | None = None
    ignored: bool = False
    slots: int = 0


class RoutingCounter(nn.Module):
    """Sums of one layer on its device; not part of a checkpoint.

    `add` only keeps references to a few small tensors; they are added up when `MOST_PENDING` passes
    have been kept or the sums are read, so that a pass pays almost nothing.

    Args:
        layer_number: 0-based index of the transformer layer.
        num_experts: E.
        topk: K.
        device: where the layer is.
        balance_losses: of the layer, at least one.

    Attributes:
        most_pending: passes that are kept at most before they are added up.
    """

    def __init__(
        self,
        layer_number: int,
        num_experts: int,
        topk: int,
        device: torch.device | str | None,
        balance_losses: int = 1,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.num_experts, self.topk = num_experts, topk
        self.most_pending = MOST_PENDING
        self.scalars = len(SCALARS) + balance_losses - 1
        size = 2 * num_experts + self.scalars + 2 * POSITION_BUCKETS * (1 + topk)
        self.register_buffer(
            "_sums", torch.zeros(size, dtype=torch.float64, device=device), persistent=False
        )
        self._sums: Tensor
        self._clear_pending()

    def _clear_pending(self) -> None:
        self._loads: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._scalars: list[Tensor] = []
        self._fates: list[TokenFates] = []
        self._tokens: int | Tensor = 0
        self._micro_batches = 0.0
        self._slots = 0

    @torch.no_grad()
    def add(
        self,
        scores: Scores,
        load_GE: Tensor,
        kept_GE: Tensor,
        losses: Sequence[Tensor],
        fates: TokenFates,
    ) -> None:
        """Count one micro-batch.

        Args:
            scores: of this rank's tokens.
            load_GE: choices of each group and expert that this rank counts, before drops; may have
                no groups.
            kept_GE: those of them that were not dropped.
            losses: this rank's shares of the first balance loss, the z-loss and further balance
                losses, without coefficients.
            fates: of the same tokens as the scores.
        """
        self._loads.append(load_GE)
        self._kept.append(kept_GE)
        negative_TE, probs_TE = scores.probs_TE * scores.log_probs_TE, scores.probs_TE
        logits_TE = scores.logits_TE
        tokens: int | Tensor = scores.choices_TK.shape[0]
        if fates.ignored and fates.padding_T is not None:
            # Chosen, not multiplied: zero times a number that is infinite would be NaN.
            pads_T1 = fates.padding_T.unsqueeze(1)
            negative_TE, probs_TE, logits_TE = (
                x_TE.masked_fill(pads_T1, 0.0) for x_TE in (negative_TE, probs_TE, logits_TE)
            )
            tokens = tokens - fates.padding_T.sum()
        self._scalars += (
            negative_TE.sum(),
            probs_TE.amax(1).sum(),
            torch.linalg.vector_norm(logits_TE),
            *losses,
        )
        self._fates.append(fates)
        self._tokens = self._tokens + tokens
        self._micro_batches += 1.0 / fates.shards
        self._slots += fates.slots
        if len(self._loads) >= self.most_pending:
            self._add_up()

    @torch.no_grad()
    def _add_up(self) -> None:
        """Add pending passes to the sums."""
        if not self._loads:
            return
        experts = self.num_experts
        self._sums[:experts] += torch.cat(self._loads).sum(0)
        self._sums[experts : 2 * experts] += torch.cat(self._kept).sum(0)
        ends = 2 * experts, 2 * experts + self.scalars
        scalars = self._sums[slice(*ends)].unbind()
        tokens, batches, slots, entropy, confidence, square, *losses = scalars
        tokens += self._tokens
        batches += self._micro_batches
        slots += self._slots
        table = torch.stack(self._scalars).view(len(self._loads), -1).double()
        entropy -= table[:, 0].sum()
        confidence += table[:, 1].sum()
        square += table[:, 2].square().sum()
        for loss, shares in zip(losses, table[:, 3:].unbind(1), strict=True):
            loss += shares.sum()
        at_2PC = self._sums[ends[1] :].view(2, POSITION_BUCKETS, 1 + self.topk)
        for same in _of_equal_shape(self._fates):
            at_2PC += _by_position(same)
        self._clear_pending()

    @property
    def sums(self) -> Tensor:
        """[2 E + 7 + balance losses + 2 P (1 + K)] fp64: loads, kept choices, `SCALARS`, further
        balance losses, then tokens and kept choices by kind and part of the row; to be read or
        written in place.
        """
        self._add_up()
        return self._sums

    def reset(self) -> None:
        """Set all sums to zero."""
        self._clear_pending()
        self._sums.zero_()


def _of_equal_shape(passes: Iterable[TokenFates]) -> list[list[TokenFates]]:
    """The passes whose tensors can be stacked, together."""
    found: dict[tuple[Any, ...], list[TokenFates]] = {}
    for one in passes:
        where = one.batch, one.shard, one.shards, one.padding_T is None
        found.setdefault((*where, one.kept_TK.shape), []).append(one)
    return list(found.values())


def _by_position(passes: Sequence[TokenFates]) -> Tensor:
    """Tokens and kept choices of each kind and part of the row, [2, P, 1 + K] int64.

    Position s of a row of S is in part s P // S: with S = 12 and P = 8 the parts have 2, 1, 2, 1,
    2, 1, 2 and 1 positions.
    """
    first = passes[0]
    rows = len(passes) * first.batch
    kept = torch.stack([one.kept_TK for one in passes])
    kept_SRK = kept.view(len(passes), -1, first.batch, kept.shape[-1]).transpose(0, 1).flatten(1, 2)
    length = kept_SRK.shape[0]
    all_SC = torch.cat((kept.new_full((length, 1), rows, dtype=torch.int64), kept_SRK.sum(1)), 1)
    pads_SC = torch.zeros_like(all_SC)
    if first.padding_T is not None:
        pads = torch.stack([one.padding_T for one in passes if one.padding_T is not None])
        pads_SR = pads.view(len(passes), length, -1).transpose(0, 1).flatten(1)
        kept_pads_SK = (kept_SRK & pads_SR.unsqueeze(-1)).sum(1)
        pads_SC = torch.cat((pads_SR.sum(1, keepdim=True), kept_pads_SK), 1)
    place_S = torch.arange(length, device=kept.device) + first.shard * length
    bucket_S = place_S * POSITION_BUCKETS // (length * first.shards)
    found_P2C = all_SC.new_zeros(POSITION_BUCKETS, 2, all_SC.shape[1])
    found_P2C.index_add_(0, bucket_S, torch.stack((all_SC - pads_SC, pads_SC), 1))
    return found_P2C.transpose(0, 1)
