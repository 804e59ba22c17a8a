"""Experts in emulated FP8: scales come from an expert's own tokens, and drops stay as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kernels import load_kernels
from fused_kernels.fp8.gemm import DelayedScale, Fp8Gemm, Fp8Settings, Recipe
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


def results(experts: Fp8ExpertGemms, dtype: torch.dtype, blocks: int) -> list[Tensor]:
    """Output, gradients and what `delayed` records, of two passes with an update between."""
    numbers = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=numbers) ** 3
        return values.to(dtype).requires_grad_()

    plan: Any = SimpleNamespace(kernels=load_kernels("auto", "cpu"))
    found: list[Tensor] = []
    for _ in range(2):
        x, into, out = made(3, 40, 24), made(3, 24, blocks * 136), made(3, 136, 24)
        y = experts(x, into, out, plan)
        y.backward(made(*y.shape).detach())
        found += [y.detach(), *(leaf.grad for leaf in (x, into, out) if leaf.grad is not None)]
        for gemm in (experts.input, experts.down):
            for scale in gemm.kept().values():
                scale.update()
                found += [scale.scale.clone(), scale.amax_history.clone()]
    return found


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
def test_a_gate_that_writes_fp8_changes_no_bit(
    recipe: Recipe, dtype: torch.dtype, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Fp8Settings(recipe=recipe, hybrid=True, history=2, most_recent=False)
    calls = []
    gated = Fp8Gemm.gated

    def counted(*arguments: Any) -> Tensor:
        calls.append(recipe)
        return gated(*arguments)

    monkeypatch.setattr(Fp8Gemm, "gated", counted)
    found = results(Fp8ExpertGemms(settings, 3, torch.device("cpu")), dtype, blocks)
    assert len(calls) == 2
    monkeypatch.setattr(Fp8ExpertGemms, "quantises_in_the_gate", lambda *_: False)
    expected = results(Fp8ExpertGemms(settings, 3, torch.device("cpu")), dtype, blocks)
    assert len(calls) == 2
    assert len(found) == len(expected) == (8 if recipe != "delayed" else 8 + 2 * 2 * 3 * 2)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def test_which_devices_and_recipes_quantise_in_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(recipe: Recipe, device: str) -> bool:
        experts = Fp8ExpertGemms(Fp8Settings(recipe=recipe), 1, torch.device("cpu"))
        return experts.quantises_in_the_gate(torch.device(device))

    assert fused("mxfp8", "cpu") and not fused("tensorwise", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert not fused("delayed", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert fused("delayed", "cuda")
    with pytest.raises(ValueError, match="tensorwise needs the whole tensor"):
        Fp8Gemm(Fp8Settings(recipe="tensorwise")).output()
