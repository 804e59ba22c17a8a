"""Balance without a loss: a bias of each expert, which counts for the choices and not for weights.

    choices = the k largest of score + bias;  weights from the scores alone

Once per optimizer step, from all tokens of the global batch, the bias changes by one of two rules:

- `sign` (`--moe-router-enable-expert-bias`; Wang et al., arXiv 2408.15664, algorithm 1): up by
  `--moe-router-bias-update-rate` for an expert with less than the mean load, down for one with
  more. Megatron-Core's `get_updated_expert_bias`.
- `quantile` (`--moe-router-load-balancing-type quantile_balancing`): the bias with which each
  expert would have been chosen by its share k / E of the tokens. A token with cutoff c, the
  (k+1)-th largest of its biased scores, chooses an expert with score s if the bias exceeds c - s,
  so the bias is the k / E quantile of c - s over the tokens, less the mean of all biases, which
  changes no choice (Su, kexue.fm/archives/11619; Kimi K3, section 2.3.3 and appendix D).
  Megatron-LM (pull request 5349) takes the mean of the quantiles of micro-batches, and of logits.
  Here tokens are counted in `BINS` bins, whose counts add up to the same on every layout.

Ranks count integers and add them up, so the bias is equal on every rank to the bit. It is a tensor
of the model that is not trained: checkpoints hold it as they hold weights.

Shapes: T tokens, E experts, L layers, N bins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_moe.config import MoEConfig
from megatron_moe.moe.exchange import size_of
from megatron_moe.moe.scoring import Scores

BINS = 1000
"""Of the `quantile` rule, as in Kimi K3: over a range of little more than 2, within which the
quantile is interpolated."""


class BiasRule(ABC):
    """Counts what the next bias depends on, and makes it."""

    def __init__(self, moe: MoEConfig) -> None:
        self.moe, self.experts = moe, moe.num_experts

    @property
    @abstractmethod
    def width(self) -> int:
        """Counts of one layer."""

    @abstractmethod
    def count(
        self, scores: Scores, load_E: Tensor, bias_E: Tensor, padding_T: Tensor | None
    ) -> Tensor:
        """What one pass adds to the counts of a layer, int64.

        Args:
            scores: of this rank's tokens.
            load_E: int64 choices of each expert that this rank counts, before drops.
            bias_E: in use.
            padding_T: bool, which of the tokens do not count; `None` for none.
        """

    @abstractmethod
    def updated(self, counts_LN: Tensor, bias_LE: Tensor) -> Tensor:
        """The biases of the next step, fp32 [L, E], from the counts of all ranks."""


class SignRule(BiasRule):
    """A step of fixed size towards balance."""

    @property
    def width(self) -> int:
        """One count for each expert."""
        return self.experts

    def count(
        self, scores: Scores, load_E: Tensor, bias_E: Tensor, padding_T: Tensor | None
    ) -> Tensor:
        """The load."""
        return load_E

    def updated(self, counts_LN: Tensor, bias_LE: Tensor) -> Tensor:
        """Up where the load is below the mean, down where it is above.

        Example: loads (4, 1, 1), mean 2, rate 0.001: the bias changes by (-0.001, 0.001, 0.001).
        """
        load_LE = counts_LN.double()
        offset_LE = load_LE.mean(1, keepdim=True) - load_LE
        return bias_LE + offset_LE.sign().float() * self.moe.moe_router_bias_update_rate


class QuantileRule(BiasRule):
    """The bias that would have balanced the last step."""

    @property
    def width(self) -> int:
        """A histogram for each expert."""
        return self.experts * BINS

    def count(
        self, scores: Scores, load_E: Tensor, bias_E: Tensor, padding_T: Tensor | None
    ) -> Tensor:
        """Tokens by the least bias with which they would choose the expert."""
        score_TE = scores.raw_TE.detach()
        cutoff_T = (score_TE + bias_E).topk(self.moe.moe_router_topk + 1, dim=1).values[:, -1:]
        low, step = _range(bias_E.unsqueeze(0))
        bin_TE = ((cutoff_T - score_TE - low) / step).floor().clamp(0, BINS - 1).long()
        place_TE = bin_TE + torch.arange(self.experts, device=bin_TE.device) * BINS
        counts_N = torch.zeros(self.width, dtype=torch.int64, device=bin_TE.device)
        counted_TE = torch.ones_like(place_TE)
        if padding_T is not None:
            counted_TE.masked_fill_(padding_T.unsqueeze(1), 0)
        return counts_N.scatter_add_(0, place_TE.flatten(), counted_TE.flatten())

    def updated(self, counts_LN: Tensor, bias_LE: Tensor) -> Tensor:
        """The quantile, less the mean; smoothed with `--moe-router-quantile-balancing-ema`.

        Example: E = 2, k = 1 and bins of width 0.1 from 0 with (2, 6) tokens: half of these 8 is
        passed by 2 of the 6 of the second bin, so the quantile is 0.1 + 0.1 * 2 / 6.
        """
        below_LEN = counts_LN.view(*bias_LE.shape, BINS).cumsum(2).double()
        share = self.moe.moe_router_topk / self.experts
        target_LE1 = below_LEN[..., -1:] * share
        bin_LE1 = torch.searchsorted(below_LEN, target_LE1).clamp(max=BINS - 1)
        after_LE1 = below_LEN.gather(2, bin_LE1)
        before_LE1 = below_LEN.gather(2, (bin_LE1 - 1).clamp(min=0)) * (bin_LE1 > 0)
        within_LE1 = (target_LE1 - before_LE1) / (after_LE1 - before_LE1).clamp(min=1)
        low_L1, step_L1 = _range(bias_LE.double())
        found_LE = low_L1 + step_L1 * (bin_LE1 + within_LE1).squeeze(2)
        found_LE = (found_LE - found_LE.mean(1, keepdim=True)).float()
        # Without a token counted, e.g. all of them ignored, the bias stays.
        found_LE = found_LE.where(below_LEN[..., -1] > 0, bias_LE)
        kept = self.moe.moe_router_quantile_balancing_ema
        return bias_LE * kept + found_LE * (1 - kept)


def _range(bias_LE: Tensor) -> tuple[Tensor, Tensor]:
    """Lower end of the histograms of each layer and the width of their bins, [L, 1] each.

    Scores are between 0 and 1, so a cutoff less a score is between min(bias) - 1 and max(bias) + 1.
    """
    low_L1 = bias_LE.amin(1, keepdim=True) - 1.0
    return low_L1, (bias_LE.amax(1, keepdim=True) + 1.0 - low_L1) / BINS


class ExpertBias(nn.Module):
    """The bias of one layer's experts and what the current step has counted.

    Args:
        moe: the rule and its settings.
        device: where it is. It is uninitialized.

    Attributes:
        weight: [E] fp32, the same on every rank; not trained.
        counts_N: int64, of this rank in this step.
    """

    def __init__(self, moe: MoEConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rule: BiasRule = (QuantileRule if moe.balances_by_quantile else SignRule)(moe)
        value_E = torch.empty(moe.num_experts, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(value_E, requires_grad=False)
        self.counts_N: Tensor | None = None

    @torch.no_grad()
    def count(self, scores: Scores, load_E: Tensor, padding_T: Tensor | None = None) -> None:
        """Add one forward pass; see `BiasRule.count`."""
        counts_N = self.rule.count(scores, load_E, self.weight, padding_T)
        self.counts_N = counts_N if self.counts_N is None else self.counts_N + counts_N

    def take_counts(self) -> Tensor:
        """The counts, which begin anew."""
        taken_N, self.counts_N = self.counts_N, None
        if taken_N is None:  # nothing was routed
            return torch.zeros(self.rule.width, dtype=torch.int64, device=self.weight.device)
        return taken_N


@torch.no_grad()
def update_expert_biases(
    chunks: Iterable[nn.Module], pgs: Any, *, apply: bool = True, fixed: Sequence[Tensor] = ()
) -> None:
    """End a step: the biases of the next one from the counts of all ranks, which are reset.

    A collective call over the ranks that hold the same layers, without a host synchronization.

    Args:
        chunks: this rank's model chunks.
        pgs: the `ProcessGroupCollection`; `None` for one process.
        apply: whether biases change; otherwise counts are only reset.
        fixed: weights that are frozen; biases among them do not change.
    """
    found = [m for chunk in chunks for m in chunk.modules() if isinstance(m, ExpertBias)]
    counts = {bias: bias.take_counts() for bias in found}
    found = [bias for bias in found if all(bias.weight is not one for one in fixed)]
    if not found or not apply:
        return
    for experts in sorted({bias.rule.experts for bias in found}):
        alike = [bias for bias in found if bias.rule.experts == experts]
        counts_LN = torch.stack([counts[bias] for bias in alike])
        for group in (getattr(pgs, name, None) for name in ("tp", "dp")):
            if size_of(group) > 1:
                dist.all_reduce(counts_LN, group=group)
        bias_LE = torch.stack([bias.weight for bias in alike])
        for bias, new_E in zip(alike, alike[0].rule.updated(counts_LN, bias_LE), strict=True):
            bias.weight.copy_(new_E)
