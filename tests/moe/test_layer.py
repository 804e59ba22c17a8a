"""The whole layer against the reference model's: values, drops, every gradient, both losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe import MoELayer, collect_statistics, reset_statistics
from megatron_moe.moe.statistics import LedgerError, check_ledger
from tests.moe.cases import (
    BATCH,
    DTYPE,
    HIDDEN,
    SEQUENCE,
    layer_of,
    moe_config,
    reference_of,
    set_loss_scale,
    tokens,
    watched,
)
from tests.support.kernels import IMPLEMENTATIONS, need

SETTINGS: dict[str, dict[str, Any]] = {
    "t5x": {},
    "port": {"moe_capacity_rule": "port"},
    "part of a row": {"moe_capacity_group_size": 4},
    "two rows": {"moe_capacity_group_size": 24},
    "probs": {"moe_token_drop_policy": "probs"},
    "probs, port": {"moe_token_drop_policy": "probs", "moe_capacity_rule": "port"},
    "random": {"moe_token_drop_policy": "random"},
    "fair, small groups": {"moe_token_drop_policy": "fair", "moe_capacity_group_size": 6},
    "dropless": {"moe_expert_capacity_factor": None},
    "one choice": {"moe_router_topk": 1},
    "three choices": {"moe_router_topk": 3},
    "loss of the micro-batch": {"moe_router_load_balancing_type": "aux_loss"},
    "no balance loss": {"moe_router_load_balancing_type": "none"},
    "many experts": {"num_experts": 40},
    "odd width": {"moe_ffn_hidden_size": 7},
}


def compare(layer: MoELayer, x_SBH: Tensor, *, training: bool = True) -> int:
    """Hold one pass against the reference; the number of dropped choices."""
    set_loss_scale(0.5)
    layer.train(training)
    seen = watched(layer)
    reference = reference_of(layer)
    x, x_ref = x_SBH.clone().requires_grad_(), x_SBH.transpose(0, 1).clone().requires_grad_()
    y = layer(x)
    y_ref, routing = reference(x_ref, training)
    grad = torch.randn_like(y)
    y.backward(grad)
    moe = layer.moe
    extra = moe.moe_aux_loss_coeff * routing.balance_loss + moe.moe_z_loss_coeff * routing.z_loss
    total = (y_ref * grad.transpose(0, 1)).sum() + 0.5 * extra / layer.num_moe_layers
    total.backward()
    kept = seen[0].kept_TK.view(*x.shape[:2], -1).transpose(0, 1).reshape(routing.kept_TK.shape)
    assert torch.equal(kept, routing.kept_TK)
    torch.testing.assert_close(y, y_ref.transpose(0, 1))
    experts = reference.experts
    pairs = [
        (x.grad, x_ref.grad.transpose(0, 1)),
        (layer.router.weight.grad, reference.router.weight.grad),
        (layer.experts.weight_in.grad, torch.cat([experts.gate.grad, experts.up.grad], dim=2)),
        (layer.experts.weight_out.grad, experts.down.grad),
    ]
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)
    statistics = collect_statistics([layer], None)[layer.layer_number]
    assert statistics.aux_loss == pytest.approx(routing.balance_loss.item())
    assert statistics.z_loss == pytest.approx(routing.z_loss.item())
    return int((~kept).sum())


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_training(settings: dict[str, Any], impl: str, kernels: str) -> None:
    need(kernels)
    width = {"moe_ffn_hidden_size": 8, **settings}
    if settings.get("moe_ffn_hidden_size") == 7:
        layer = odd_layer(impl, kernels)
    else:
        layer = layer_of(moe_config(**width, moe_expert_impl=impl, moe_dispatch_impl=kernels))
    dropped = compare(layer, tokens(1))
    assert (dropped == 0) == (settings.get("moe_expert_capacity_factor", 1.0) is None)


def odd_layer(impl: str, kernels: str) -> MoELayer:
    """Sizes without a common factor."""
    model = ModelConfig(hidden_size=HIDDEN, ffn_hidden_size=7)
    moe = moe_config(num_experts=5, moe_expert_impl=impl, moe_dispatch_impl=kernels)
    layer = MoELayer(model, moe, layer_number=0, num_moe_layers=1, params_dtype=DTYPE)
    layer.reset_parameters(0)
    return layer


@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (13, 1)])
def test_odd_shapes(shape: tuple[int, int], impl: str) -> None:
    layer = layer_of(moe_config(moe_expert_impl=impl))
    compare(layer, tokens(2, *shape))


@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_three_matrices(impl: str) -> None:
    assert compare(layer_of(moe_config(moe_expert_impl=impl), "swiglu"), tokens(3)) > 0


@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_evaluation_has_its_own_capacity(impl: str) -> None:
    moe = moe_config(moe_eval_capacity_factor=None, moe_expert_impl=impl)
    layer = layer_of(moe)
    assert compare(layer, tokens(4), training=False) == 0
    assert compare(layer_of(moe), tokens(4)) > 0


@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_all_tokens_to_one_expert(impl: str) -> None:
    """The others are empty and get zero gradients; 21 of 24 tokens lose both choices or more."""
    layer = layer_of(moe_config(moe_router_topk=1, moe_expert_impl=impl))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 5.0
    assert compare(layer, tokens(5).abs()) == 2 * (12 - 3)
    assert layer.experts.weight_in.grad is not None
    assert layer.experts.weight_in.grad[[0, 1, 3]].abs().max() == 0


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
@pytest.mark.parametrize("huge", [[0, 1, 3], [3]])
def test_experts_without_tokens_add_no_nan(huge: list[int], impl: str, kernels: str) -> None:
    """They would overflow for any token: infinity, and NaN where it is multiplied by zero.

    Expert 0 has row 0 of the buffer, which dropped choices name.
    """
    need(kernels)
    moe = moe_config(moe_router_topk=1, moe_expert_impl=impl, moe_dispatch_impl=kernels)
    layer = layer_of(moe)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 5.0
        layer.experts.weight_in[huge] = 1e200
        layer.experts.weight_out[huge] = 1e200
    compare(layer, tokens(5).abs())
    assert layer.experts.weight_in.grad is not None
    assert layer.experts.weight_in.grad[[0, 1, 3]].abs().max() == 0


@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_a_token_dropped_twice_gets_exactly_zero(impl: str) -> None:
    layer = layer_of(moe_config(moe_expert_impl=impl))
    seen = watched(layer)
    y = layer(tokens(6)).view(-1, HIDDEN)
    lost = ~seen[0].kept_TK.any(1)
    assert lost.any()
    assert y[lost].abs().max() == 0
    assert (y[~lost].abs().amax(1) > 0).all()


def test_gradcheck() -> None:
    """Numerical differentiation through everything but the attached losses."""
    layer = layer_of(moe_config(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0))
    x = tokens(7, 4, 2).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_recomputation_counts_once_and_gives_the_same_gradients() -> None:
    set_loss_scale(1.0)
    gradients = []
    for again in (False, True):
        layer = layer_of(moe_config())
        x = tokens(8).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=True) if again else layer(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
        statistics = collect_statistics([layer], None)[3]
        assert statistics.micro_batches == 1
        assert statistics.tokens == 24
    for once, twice in zip(*gradients, strict=True):
        assert torch.equal(once, twice)


def test_without_values_the_shape_is_still_known() -> None:
    """Fake tensors, as in a dry run of a cluster: nothing may be read back, forward or backward."""
    with FakeTensorMode():
        layer = MoELayer(ModelConfig(), MoEConfig(), layer_number=0, num_moe_layers=1)
        x = torch.empty(256, 4, 256, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert x.grad is not None
        assert "batched (auto: no host read" in layer.describe(4, 256)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_nothing_has_the_size_of_tokens_by_experts_by_capacity(impl: str) -> None:
    sequence, experts, slots = 512, 8, 64
    moe = moe_config(num_experts=experts, moe_expert_impl=impl)
    layer = layer_of(moe)
    x = tokens(0, sequence, 1).requires_grad_()
    with _Largest() as largest:
        layer(x).sum().backward()
    buffer = experts * slots * layer.experts.weight_in.shape[2]
    assert largest.elements <= max(buffer, 2 * sequence * experts)
    assert largest.elements < sequence * experts * slots / 10


def test_auto_selects_by_size_and_describes_it() -> None:
    model = ModelConfig(hidden_size=32, ffn_hidden_size=32)

    def choice(sequence: int, **settings: Any) -> str:
        layer = MoELayer(model, MoEConfig(**settings), layer_number=0, num_moe_layers=1)
        return layer.describe(2, sequence)

    assert "batched (auto: evenly loaded experts)" in choice(64)
    assert "loop (as requested)" in choice(64, moe_expert_impl="loop")


def test_the_loop_is_rejected_where_there_is_nothing_to_read() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(
            UsageError,
            match=r"must be auto, batched or grouped \(got 'loop'\); reading row counts",
        ),
    ):
        layer_of(moe_config(moe_expert_impl="loop"))(tokens(0))


def test_a_missing_kernel_is_rejected_at_once() -> None:
    moe = moe_config()
    object.__setattr__(moe, "moe_dispatch_impl", "triton")
    with pytest.raises(
        UsageError,
        match=r"--kernel-impl must be auto or native or reference on cpu \(got 'triton'\)",
    ):
        layer_of(moe)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_bfloat16(impl: str, kernels: str) -> None:
    """Low precision stays close to fp32 with the same weights."""
    need(kernels)
    torch.manual_seed(0)
    settings = {"moe_expert_impl": impl, "moe_dispatch_impl": kernels}
    moe = moe_config(**settings, moe_expert_capacity_factor=None)
    low = MoELayer(
        ModelConfig(), moe, layer_number=0, num_moe_layers=1, params_dtype=torch.bfloat16
    )
    low.reset_parameters(0)
    full = MoELayer(ModelConfig(), moe, layer_number=0, num_moe_layers=1)
    with torch.no_grad():
        for a, b in zip(full.parameters(), low.parameters(), strict=True):
            a.copy_(b)
    x = torch.randn(16, 2, 256).bfloat16()
    y = low(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    error = (y.float() - full(x.float())).norm() / y.float().norm()
    assert error < 0.01


def test_ignored_padding_is_in_no_output_count_or_gradient() -> None:
    """A row with padding gives what the row alone gives, a row of padding nothing."""
    layer = layer_of(moe_config(moe_expert_capacity_factor=None))
    set_loss_scale(1.0)
    x, padding = tokens(4), torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    padding[5:, 0], padding[:, 1] = True, True
    results = []
    for given, pads in ((x, padding), (x[:5, :1], None)):
        reset_statistics([layer])
        layer.zero_grad()
        given = given.clone().requires_grad_()
        y = layer(given, pads)
        y[:5, 0].square().sum().backward()
        assert given.grad is not None
        gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        results.append((y, given.grad, gradients, collect_statistics([layer], None)[3]))
    whole, alone = results
    torch.testing.assert_close(whole[0][:5, :1], alone[0])
    assert (whole[0][padding] == 0).all()
    torch.testing.assert_close(whole[1][:5, :1], alone[1])
    assert (whole[1][padding] == 0).all()
    torch.testing.assert_close(whole[2], alone[2])
    names = ("load", "kept", "tokens", "router_entropy", "router_confidence", "logit_rms")
    for name in (*names, "aux_loss", "z_loss", "drop_rate_of_padding", "drop_rate"):
        assert getattr(whole[3], name) == pytest.approx(getattr(alone[3], name)), name
    assert whole[3].positions == SEQUENCE * BATCH
    check_ledger({3: whole[3]}, SEQUENCE * BATCH, 2, ignores_padding=True)
    with pytest.raises(LedgerError, match="must add up to 24, the positions of the steps"):
        check_ledger({3: whole[3]}, SEQUENCE * BATCH, 2)
