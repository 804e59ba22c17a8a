"""Experts in emulated FP8: scales come from an expert's own tokens, and drops stay as they are."""

from __future__ import annotations

import torch

from fused_kernels.fp8.gemm import DelayedScale, Fp8Settings
from megatron_moe.moe.fp8_experts import Fp8ExpertGemms
from tests.moe.cases import layer_of, moe_config, tokens, watched


def test_rows_without_a_token_have_no_part_in_a_scale() -> None:
    """They hold a copy of token 0, which here is larger than all others."""
    layer = layer_of(moe_config(moe_router_topk=1))
    plain = watched(layer)
    x_SBH = tokens(1)
    x_SBH[0, 0] *= 1000.0
    layer(x_SBH)
    settings = Fp8Settings(recipe="delayed")
    layer.experts.fp8 = Fp8ExpertGemms(settings, layer.experts.num_local, torch.device("cpu"))
    layer(x_SBH).sum().backward()

    before, after = plain
    assert torch.equal(before.kept_TK, after.kept_TK)
    assert not after.kept_TK.all()
    kept_T, expert_T = after.kept_TK[:, 0], after.scores.choices_TK[:, 0]
    x_T = x_SBH.flatten(0, 1).abs().amax(1)
    largest = [x_T[kept_T & (expert_T == e)] for e in range(layer.experts.num_local)]
    state = layer.experts.fp8.input.scales["input"]
    assert isinstance(state, DelayedScale)
    expected = [float(values.max()) if len(values) else 0.0 for values in largest]
    assert state.amax_history[0].tolist() == torch.tensor(expected, dtype=torch.float32).tolist()
    assert max(expected) > 100 * sorted(expected)[-2]
    assert layer.experts.weight_in.grad is not None
