"""Check that a loaded router of `transformers` routes as its stored weights and its family say.

Releases of `transformers` have returned probabilities under the name of logits, and choices can
change with a release. So a few tokens are routed when a model is loaded, and what each router
returns is compared with logits from the stored weights, and with choices and weights from these
logits by the family's rule.

Shapes: T tokens, E experts, K choices, H hidden.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.analysis.model import LayerWeights
from megatron_moe.analysis.rule import RoutingRule, choose, ranking_of, scores_of
from megatron_moe.errors import Corrupt

PROBE_TOKENS = 32
"""Tokens that are routed to check a model."""
_LOW, _FULL = 0.03, 1e-3
"""Largest difference in relation to the largest value, for bf16 and fp16, and for fp32."""


def probe_tokens(vocab_size: int, max_length: int) -> Tensor:
    """One row of ids that are spread over the vocabulary, [1, S]."""
    length = min(PROBE_TOKENS, max_length)
    return (torch.arange(length) * vocab_size // length)[None]


def check_router(
    path: Path,
    rule: RoutingRule,
    weights: LayerWeights,
    x_TH: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Check one router on the probe.

    Args:
        path: of the checkpoint, for messages.
        rule: of its family.
        weights: of the layer, as stored.
        x_TH: input of the router.
        result: what it returned: logits [T, E], combine weights and ids [T, K].

    Raises:
        UsageError: logits, choices or weights are others.
    """
    logits_TE, weights_TK, ids_TK = result
    layer, tolerance = weights.layer, _FULL if x_TH.dtype == torch.float32 else _LOW
    own_TE = _logits(weights, x_TH)
    if _differs(logits_TE, own_TE, tolerance):
        raise Corrupt(
            f"logits of the router of layer {layer} in {path}",
            _described(logits_TE, own_TE),
            "input times stored weights",
            "install the release of transformers in constraints.txt",
        )
    bias_E = None if weights.bias is None else weights.bias.whole().to(x_TH.device)
    own_ids_TK, own_TK = choose(rule, logits_TE, bias_E)
    # Of equal scores, either may be chosen: the scores of the chosen experts are compared.
    ranking_TE = ranking_of(rule, scores_of(rule, logits_TE), bias_E)
    found, expected = (ranking_TE.gather(1, ids).sort(-1).values for ids in (ids_TK, own_ids_TK))
    if ids_TK.shape != own_ids_TK.shape or not torch.allclose(found, expected, 1e-5, 1e-6):
        token = (
            int((found != expected).any(-1).nonzero()[0]) if found.shape == expected.shape else 0
        )
        raise Corrupt(
            f"choices of the router of layer {layer} in {path}",
            sorted(ids_TK[token].tolist()),
            f"{sorted(own_ids_TK[token].tolist())}, the best by the rule of its family",
            "install the release of transformers in constraints.txt",
        )
    found, expected = weights_TK.float().sort(-1).values, own_TK.sort(-1).values
    if _differs(found, expected, tolerance):
        raise Corrupt(
            f"combine weights of the router of layer {layer} in {path}",
            [round(value, 5) for value in found[0].tolist()],
            f"{[round(value, 5) for value in expected[0].tolist()]}, by the rule of its family",
            "install the release of transformers in constraints.txt",
        )


def _logits(weights: LayerWeights, x_TH: Tensor) -> Tensor:
    matrix_EH = weights.router.whole().to(x_TH).float()
    logits_TE = x_TH.float() @ matrix_EH.T
    if weights.router_bias is not None:
        logits_TE = logits_TE + weights.router_bias.whole().to(x_TH).float()
    return logits_TE


def _differs(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return True
    largest = float((found.float() - expected.float()).abs().max())
    return not largest <= tolerance * float(expected.abs().max())  # true for NaN


def _described(found_TE: Tensor, own_TE: Tensor) -> str:
    """What a router returned in place of its logits."""
    if found_TE.shape != own_TE.shape:
        return f"shape {list(found_TE.shape)}"
    values = found_TE.float()
    sums = values.sum(-1)
    if bool((values >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=0.02):
        return "probabilities, which sum to 1"
    if torch.allclose(values, own_TE.sigmoid(), atol=0.02):
        return "their sigmoid"
    return f"values that differ by up to {float((values - own_TE).abs().max()):.3g}"
