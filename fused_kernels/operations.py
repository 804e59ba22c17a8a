"""The signature of each operation, and the set of implementations that one device uses.

Every implementation module (`reference/<operation>.py`, `triton/<operation>.py`) satisfies the
protocol of its operation. The reference's docstrings describe arguments and results in full.

Shapes: T tokens, H hidden, K choices of a token, R buffer rows, G groups, A choices of a group,
E experts, F width of a feed-forward layer, M = blocks * F, V vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fused_kernels.fp8.output import Fp8Output, Fp8Rows


class RankInExpert(Protocol):
    """How many earlier choices of the same group chose the same expert."""

    def forward(self, experts_GA: Tensor, num_experts: int, /) -> tuple[Tensor, Tensor]:
        """rank_GA and load_GE, both int64."""


class DispatchTokens(Protocol):
    """Tokens to buffer rows."""

    def forward(self, x_TH: Tensor, source_R: Tensor, /) -> Tensor:
        """The buffer, [R, H]; a row of no token, -1, is zero."""

    def forward_fp8(self, x_TH: Tensor, source_R: Tensor, output: Fp8Output, /) -> Fp8Rows:
        """The buffer, quantised: bytes of `fp8.output.quantized` of it."""

    def backward(self, grad_RH: Tensor, rows_TK: Tensor, kept_TK: Tensor, /) -> Tensor:
        """Gradient of the tokens, [T, H]."""


class CombineTokens(Protocol):
    """Buffer rows to tokens, weighted by router probabilities."""

    def forward(
        self, out_RH: Tensor, weights_TK: Tensor, rows_TK: Tensor, kept_TK: Tensor, /
    ) -> Tensor:
        """The weighted sums, [T, H]."""

    def backward(
        self,
        grad_TH: Tensor,
        out_RH: Tensor,
        weights_TK: Tensor,
        rows_TK: Tensor,
        kept_TK: Tensor,
        source_R: Tensor,
        /,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the expert outputs [R, H] and of the weights [T, K]."""


class GatedSilu(Protocol):
    """silu(gate) * up, or linear * silu(gate) * up.

    The `_step` forms check their arguments and make their views at once, and return the call that
    computes: expert GEMMs prepare a whole pass first and then run it.
    """

    OVERWRITES_GRADIENT: bool
    """Whether `backward` writes into its first argument."""

    def forward(self, z_RM: Tensor, blocks: int, /) -> Tensor:
        """h_RF."""

    def forward_fp8(self, z_RM: Tensor, blocks: int, output: Fp8Output, /) -> Fp8Rows:
        """h_RF, quantised: bytes of `fp8.output.quantized` of it."""

    def forward_step(self, z_RM: Tensor, blocks: int, h_RF: Tensor, /) -> Callable[[], None]:
        """`forward` into ``h_RF`` when called."""

    def backward(self, grad_RF: Tensor, z_RM: Tensor, blocks: int, /) -> tuple[Tensor, Tensor]:
        """grad_RM, and h_RF computed again."""

    def gradient(self, grad_RF: Tensor, z_RM: Tensor, blocks: int, /) -> Tensor:
        """grad_RM of `backward` without h_RF, which is not written."""

    def backward_step(
        self, grad_RF: Tensor, z_RM: Tensor, blocks: int, grad_RM: Tensor, h_RF: Tensor, /
    ) -> Callable[[], None]:
        """`backward` into ``grad_RM`` and ``h_RF`` when called."""


class LinearCrossEntropy(Protocol):
    """Numbers of each token's logits from which its cross entropy follows, over one shard of the
    vocabulary, without a matrix of all logits.
    """

    def forward(
        self, x_TH: Tensor, weight_VH: Tensor, target_T: Tensor, scale: float, chunk_tokens: int, /
    ) -> tuple[Tensor, Tensor]:
        """stats_3T (maximum, sum of exponentials, target's logit), and what `backward` takes as
        ``kept``: any tensor, which may be empty.
        """

    def backward(
        self,
        x_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        scale: float,
        stats_3T: Tensor,
        log_z_T: Tensor,
        coefficients_2T: Tensor,
        kept: Tensor,
        grad_VH: Tensor | None,
        /,
    ) -> Tensor:
        """Gradient of the tokens [T, H]; that of the weight is added to ``grad_VH``."""


class RmsNorm(Protocol):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    WIDEST: int | None
    """The longest rows that it takes; `None` for any."""

    def forward(self, x: Tensor, weight_W: Tensor, eps: float, /) -> tuple[Tensor, Tensor]:
        """The result, and the reciprocal roots [..., 1], the one thing that `backward` needs."""

    def backward(
        self, grad: Tensor, x: Tensor, weight_W: Tensor, inverse: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""


class Rotary(Protocol):
    """Rotary position embedding of queries or keys."""

    def forward(self, x_SBND: Tensor, cos: Tensor, sin: Tensor, /) -> Tensor:
        """Each pair rotated by its angle."""

    def backward(self, grad_SBND: Tensor, cos: Tensor, sin: Tensor, /) -> Tensor:
        """The gradient rotated back."""


class RouterKernel(Protocol):
    """Logits to probabilities and choices; sums of the losses."""

    def forward(
        self, logits_ET: Tensor, topk: int, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log_probs_ET, probs_ET, log_z_T, choices_KT, weights_KT."""

    def backward(
        self,
        grad_log_z_T: Tensor | None,
        grad_probs_ET: Tensor | None,
        grad_weights_KT: Tensor | None,
        probs_ET: Tensor,
        choices_KT: Tensor,
        /,
    ) -> Tensor:
        """Gradient of the logits, [E, T]."""

    def loss_sums(
        self, probs_TE: Tensor, log_z_T: Tensor, load_QE: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """Sums that the balance loss and the z-loss are multiples of."""


@dataclass(frozen=True)
class Kernel:
    """One operation as selected.

    Args:
        operation: its name, an attribute of `Kernels`.
        implementation: the folder it came from.
        reason: why that one, for the log.
        module: satisfies the protocol of the operation.
        sole: whether a device of this type has no other implementation of the operation.
    """

    operation: str
    implementation: str
    reason: str
    module: ModuleType
    sole: bool


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The implementation of every operation on one device; see `registry.load_kernels`.

    Args:
        rank_in_expert: ranks of choices within their experts.
        dispatch_tokens: the gather into the expert buffer.
        combine_tokens: the weighted sum out of it.
        gated_silu: the gate of feed-forward layers, dense ones included.
        linear_cross_entropy: the logits matrix and the loss.
        rms_norm: every norm but that of queries and keys over a whole projection.
        rotary: rotary positions of queries and keys.
        router: softmax and choices of the router, sums of its losses.
        selected: where each came from and why, for the log.
    """

    rank_in_expert: RankInExpert
    dispatch_tokens: DispatchTokens
    combine_tokens: CombineTokens
    gated_silu: GatedSilu
    linear_cross_entropy: LinearCrossEntropy
    rms_norm: RmsNorm
    rotary: Rotary
    router: RouterKernel
    selected: tuple[Kernel, ...]


if TYPE_CHECKING:
    # Implementations are imported by name, which a type checker cannot follow. These assignments
    # let it compare every module with its protocol.
    from fused_kernels.native import (
        combine_tokens,
        dispatch_tokens,
        gated_silu,
        rank_in_expert,
    )
    from fused_kernels.reference import combine_tokens as reference_combine
    from fused_kernels.reference import dispatch_tokens as reference_dispatch
    from fused_kernels.reference import gated_silu as reference_gate
    from fused_kernels.reference import linear_cross_entropy as reference_cross_entropy
    from fused_kernels.reference import rank_in_expert as reference_rank
    from fused_kernels.reference import rms_norm as reference_norm
    from fused_kernels.reference import rotary as reference_rotary
    from fused_kernels.reference import router as reference_router
    from fused_kernels.triton import combine_tokens as triton_combine
    from fused_kernels.triton import dispatch_tokens as triton_dispatch
    from fused_kernels.triton import gated_silu as triton_gate
    from fused_kernels.triton import linear_cross_entropy as triton_cross_entropy
    from fused_kernels.triton import rank_in_expert as triton_rank
    from fused_kernels.triton import rms_norm as triton_norm
    from fused_kernels.triton import rotary as triton_rotary
    from fused_kernels.triton import router as triton_router

    _ranks: tuple[RankInExpert, ...] = (rank_in_expert, reference_rank, triton_rank)
    _dispatches: tuple[DispatchTokens, ...] = (dispatch_tokens, reference_dispatch, triton_dispatch)
    _combines: tuple[CombineTokens, ...] = (combine_tokens, reference_combine, triton_combine)
    _gates: tuple[GatedSilu, ...] = (gated_silu, reference_gate, triton_gate)
    _cross_entropies: tuple[LinearCrossEntropy, ...] = (
        reference_cross_entropy,
        triton_cross_entropy,
    )
    _norms: tuple[RmsNorm, ...] = (reference_norm, triton_norm)
    _rotaries: tuple[Rotary, ...] = (reference_rotary, triton_rotary)
    _routers: tuple[RouterKernel, ...] = (reference_router, triton_router)
