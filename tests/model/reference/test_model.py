"""The reference model, piece by piece, against explicit loops and formulas in fp64."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import initial_tensors, logical_parameters
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.model.reference.attention import Attention, rotate
from megatron_moe.model.reference.ffn import Experts, FeedForward, MoE
from megatron_moe.model.reference.model import DecoderBlock, RMSNorm

MODEL = ModelConfig(
    num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2, kv_channels=6
)
MOE = MoEConfig(
    num_experts=4,
    moe_layer_freq="[0,1]",
    moe_shared_expert_intermediate_size=10,
    moe_min_capacity=1,
)
VOCAB = 24


def _values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _filled(module: nn.Module) -> nn.Module:
    """The module in fp64 with weights of order one."""
    module.double()
    for index, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


def _model(model: ModelConfig = MODEL, moe: MoEConfig = MOE) -> ReferenceOpenMoE:
    reference = _filled(ReferenceOpenMoE(model, moe, VOCAB, seed=None))
    assert isinstance(reference, ReferenceOpenMoE)
    return reference


def _tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_rms_norm_divides_by_the_root_mean_square_and_scales() -> None:
    norm = _filled(RMSNorm(MODEL))
    x = _values(2, 3, 8) / 100  # small enough for epsilon to count
    found = norm(x)
    for b in range(2):
        for s in range(3):
            row = x[b, s].tolist()
            root = math.sqrt(sum(v * v for v in row) / 8 + 1e-6)
            for h in range(8):
                expected = row[h] / root * norm.weight[h].item()
                assert found[b, s, h].item() == pytest.approx(expected, rel=1e-12)


def test_rms_norm_reduces_in_fp32() -> None:
    norm = RMSNorm(MODEL).bfloat16()
    nn.init.ones_(norm.weight)
    x = (_values(1, 1, 8) * 1e-3).bfloat16()
    exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.bfloat16())


def test_rope_multiplies_half_split_pairs_by_a_complex_phase() -> None:
    x = _values(1, 1, 5, 6)
    found = rotate(x, base=10000.0)
    for position in range(5):
        for pair in range(3):
            angle = position * 10000.0 ** (-2 * pair / 6)
            before = complex(x[0, 0, position, pair], x[0, 0, position, pair + 3])
            after = before * cmath.exp(1j * angle)
            assert found[0, 0, position, pair].item() == pytest.approx(after.real, rel=1e-12)
            assert found[0, 0, position, pair + 3].item() == pytest.approx(after.imag, rel=1e-12)


def test_rope_angles_are_fp32_for_bf16_activations() -> None:
    # bf16 holds no position above 256 exactly: angles in bf16 would be off by whole radians.
    x = torch.ones(1, 1, 2048, 2, dtype=torch.bfloat16)
    found = rotate(x, base=10000.0)[0, 0, 2047]
    expected = [math.cos(2047) - math.sin(2047), math.cos(2047) + math.sin(2047)]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (None, 6**-0.5), (0.3, 0.3)])
def test_attention_is_causal_softmax_attention(scale: float | None, factor: float) -> None:
    attention = _filled(Attention(replace(MODEL, softmax_scale=scale)))
    x = _values(2, 4, 8)

    def heads(projection: nn.Linear) -> Tensor:
        return (x @ projection.weight.T).view(2, 4, 2, 6)  # heads are the outer part of the rows

    q = rotate(heads(attention.query).transpose(1, 2), 10000.0).transpose(1, 2)
    k = rotate(heads(attention.key).transpose(1, 2), 10000.0).transpose(1, 2)
    v = heads(attention.value)
    mixed = torch.zeros(2, 4, 12, dtype=torch.float64)
    for b in range(2):
        for head in range(2):
            for i in range(4):
                scores = [
                    factor * torch.dot(q[b, i, head], k[b, j, head]).item() for j in range(i + 1)
                ]
                weights = [math.exp(score) for score in scores]
                for j, weight in enumerate(weights):
                    rows = slice(head * 6, head * 6 + 6)
                    mixed[b, i, rows] += weight / sum(weights) * v[b, j, head]
    expected = mixed @ attention.output.weight.T
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["swiglu", "gated-swiglu"])
def test_feed_forward_by_loops(variant: str) -> None:
    ffn = _filled(FeedForward(replace(MODEL, ffn_variant=variant), 5))
    x = _values(1, 1, 8)
    gate = [torch.dot(row, x[0, 0]).item() for row in ffn.gate.weight]
    up = [torch.dot(row, x[0, 0]).item() for row in ffn.up.weight]
    assert len(gate) == (5 if variant == "swiglu" else 10)
    if variant == "swiglu":
        inner = [_silu(gate[i]) * up[i] for i in range(5)]
    else:  # the first half is linear, the second gated by silu
        inner = [gate[i] * _silu(gate[i + 5]) * up[i] for i in range(5)]
    for h in range(8):
        expected = sum(ffn.down.weight[h, i].item() * inner[i] for i in range(5))
        assert ffn(x)[0, 0, h].item() == pytest.approx(expected, rel=1e-10)


def _expert(experts: Experts, e: int, x_H: Tensor, variant: str) -> Tensor:
    """One expert on one token."""
    gate, up = x_H @ experts.gate[e], x_H @ experts.up[e]
    if variant == "gated-swiglu":
        a, b = gate[: len(up)], gate[len(up) :]
        return (a * (b * torch.sigmoid(b)) * up) @ experts.down[e]
    return (gate * torch.sigmoid(gate) * up) @ experts.down[e]


@pytest.mark.parametrize("variant", ["swiglu", "gated-swiglu"])
def test_moe_is_the_sum_of_kept_choices_weighted_by_raw_probability(variant: str) -> None:
    moe = replace(MOE, moe_ffn_hidden_size=7)
    layer = _filled(MoE(replace(MODEL, ffn_variant=variant), moe, layer=1))
    assert layer.experts.up.shape == (4, 8, 7)
    x = _values(2, 12, 8)
    found, routing = layer(x, True)
    kept = routing.kept_TK
    assert not kept.all()
    assert (~kept).all(dim=1).any(), "the case needs a token that is dropped twice"
    for t, x_H in enumerate(x.flatten(0, 1)):
        probs = (layer.router.weight @ x_H).softmax(dim=0)
        expected = torch.zeros(8, dtype=torch.float64)
        for choice, e in enumerate(probs.argsort(descending=True)[:2].tolist()):
            if kept[t, choice]:
                expected += probs[e] * _expert(layer.experts, e, x_H, variant)
        torch.testing.assert_close(found.flatten(0, 1)[t], expected, rtol=1e-10, atol=1e-12)
        if not kept[t].any():
            assert torch.equal(found.flatten(0, 1)[t], torch.zeros(8, dtype=torch.float64))


def test_an_expert_without_tokens_has_zero_gradients_not_none() -> None:
    layer = _filled(MoE(MODEL, MOE, layer=0))
    with torch.no_grad():
        layer.router.weight[3] = -layer.router.weight[:3].sum(dim=0)
    x = torch.ones(1, 1, 8, dtype=torch.float64)
    y, routing = layer(x, True)
    y.sum().backward()
    unused = (routing.counts_E == 0).nonzero().flatten().tolist()
    assert len(unused) == 2
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[unused].any()
        assert parameter.grad[routing.ids_TK[0]].any()


@pytest.mark.parametrize("placement", ["sequential", "parallel", None])
def test_block_places_the_shared_expert(placement: str | None) -> None:
    moe = replace(MOE, moe_shared_expert_placement=placement or "sequential")
    if placement is None:
        moe = replace(moe, moe_shared_expert_intermediate_size=None)
    block = _filled(DecoderBlock(MODEL, moe, layer=1, is_moe=True))
    x = _values(2, 12, 8)
    found, _ = block(x, True)
    h = x + block.attention(block.attention_norm(x))
    normed = block.ffn_norm(h)
    routed, _ = block.moe(normed, True)
    expected = h + routed
    if placement == "parallel":
        expected = expected + block.shared(normed)
    if placement == "sequential":
        expected = expected + block.shared(block.shared_norm(expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dense_block_is_two_residual_branches() -> None:
    block = _filled(DecoderBlock(MODEL, MOE, layer=0, is_moe=False))
    x = _values(2, 5, 8)
    found, routing = block(x, True)
    h = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(found, h + block.ffn(block.ffn_norm(h)), rtol=1e-12, atol=1e-12)
    assert routing is None


@pytest.mark.parametrize("untied", [True, False])
def test_logits_are_tied_with_a_scale_or_untied_without(untied: bool) -> None:
    reference = _model(replace(MODEL, untie_embeddings_and_output_weights=untied))
    x = _values(2, 8)
    if untied:
        assert reference.output is not None
        expected = x @ reference.output.weight.T
    else:
        expected = x @ reference.embedding.weight.T / math.sqrt(8)
    torch.testing.assert_close(reference.logits(x), expected, rtol=1e-12, atol=1e-12)


def test_the_scale_of_tied_logits_can_be_left_out() -> None:
    model = replace(MODEL, untie_embeddings_and_output_weights=False, scale_tied_logits=False)
    reference = _model(model)
    x = _values(2, 8)
    expected = x @ reference.embedding.weight.T
    torch.testing.assert_close(reference.logits(x), expected, rtol=1e-12, atol=1e-12)


def test_losses_are_cross_entropy_and_both_z_losses_and_balance() -> None:
    moe = replace(MOE, moe_layer_freq="[1,1]", moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.2)
    reference = _model(replace(MODEL, logit_z_loss_coeff=0.1), moe)
    tokens, labels = _tokens(), _tokens(seed=1)
    mask = (torch.arange(24).view(2, 12) % 3 > 0).double()
    output = reference(tokens, labels, mask, training_capacity=True)
    p = output.logits.softmax(dim=-1)
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        for s in range(12):
            ce = -p[b, s, labels[b, s]].log()
            log_z = output.logits[b, s].exp().sum().log()
            torch.testing.assert_close(output.cross_entropy_BS[b, s], ce)
            torch.testing.assert_close(output.logit_z_BS[b, s], log_z**2)
            expected += mask[b, s] * (ce + 0.1 * log_z**2) / 16
    assert [r.layer for r in output.routing] == [0, 1]
    aux = (output.routing[0].balance_loss + output.routing[1].balance_loss) / 2
    router_z = (output.routing[0].z_loss + output.routing[1].z_loss) / 2
    torch.testing.assert_close(output.aux_loss, aux)
    torch.testing.assert_close(output.router_z_loss, router_z)
    torch.testing.assert_close(output.loss, expected + 0.3 * aux + 0.2 * router_z)
    per_token = output.cross_entropy_BS + 0.1 * output.logit_z_BS
    double = reference.total_loss(output, mask, num_targets=8)
    torch.testing.assert_close(double - output.loss, (mask * per_token).sum() / 16)


def test_gradients_are_the_slope_of_the_loss() -> None:
    reference = _model()
    tokens, labels = _tokens(), _tokens(seed=1)
    reference(tokens, labels, training_capacity=True).loss.backward()
    for name, parameter in reference.named_parameters():
        direction = _values(*parameter.shape)
        slope = (parameter.grad * direction).sum().item()
        ends = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                ends.append(reference(tokens, labels, training_capacity=True).loss.item())
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7), name


def test_a_token_is_blind_to_later_ones_when_nothing_drops() -> None:
    reference = _model(moe=replace(MOE, moe_eval_capacity_factor=None))
    tokens = _tokens()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    before = reference(tokens, training_capacity=False).logits
    after = reference(changed, training_capacity=False).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all()


def test_training_and_evaluation_have_their_own_capacity() -> None:
    reference = _model(moe=replace(MOE, moe_eval_capacity_factor=None))
    tight = reference(_tokens(), training_capacity=True)
    loose = reference(_tokens(), training_capacity=False)
    assert not tight.routing[0].kept_TK.all()
    assert loose.routing[0].kept_TK.all()
    assert tight.loss is None


def test_names_are_the_logical_names_in_order_in_both_variants() -> None:
    paper = replace(MODEL, ffn_variant="swiglu", untie_embeddings_and_output_weights=False)
    parallel = replace(MOE, moe_shared_expert_placement="parallel")
    for model, moe in ((MODEL, MOE), (paper, parallel)):
        logical = logical_parameters(model, moe, VOCAB)
        state = ReferenceOpenMoE(model, moe, VOCAB).state_dict()
        shapes = [(name, tuple(tensor.shape)) for name, tensor in state.items()]
        assert shapes == [(name, p.shape) for name, p in logical.items()]


def test_initial_values_are_the_logical_ones_of_the_seed() -> None:
    state = ReferenceOpenMoE(MODEL, MOE, VOCAB, seed=3).state_dict()
    for name, tensor in initial_tensors(logical_parameters(MODEL, MOE, VOCAB), 3):
        assert torch.equal(state[name], tensor)


def test_untied_model_starts_near_the_uniform_loss() -> None:
    model = replace(MODEL, hidden_size=64, ffn_hidden_size=64)
    reference = ReferenceOpenMoE(model, MOE, 512, seed=1)
    tokens = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
    output = reference(tokens, tokens.roll(-1, dims=1), training_capacity=True)
    # Logits start with variance 0.1, which adds about 0.05 to ln V.
    assert output.cross_entropy_BS.mean().item() == pytest.approx(math.log(512) + 0.05, abs=0.1)


def test_loading_refuses_what_does_not_fit() -> None:
    reference = ReferenceOpenMoE(MODEL, MOE, VOCAB)
    tensors = dict(reference.state_dict())
    reference.load_logical(tensors.items())
    with pytest.raises(UsageError, match=r"must be 0 \(got 1\); .* missing is output\.weight"):
        reference.load_logical((n, t) for n, t in tensors.items() if n != "output.weight")
    with pytest.raises(UsageError, match="must be a tensor of this model, each given once"):
        reference.load_logical([*tensors.items(), ("final_norm.weight", torch.ones(8))])
    with pytest.raises(UsageError, match=r"layers\.9"):
        reference.load_logical([("layers.9.ffn_norm.weight", torch.ones(8))])
    with pytest.raises(UsageError, match=r"final_norm\.weight must be \(8,\) \(got \(9,\)\)"):
        reference.load_logical([("final_norm.weight", torch.ones(9))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions_agree_and_logits_and_router_stay_at_least_fp32(dtype: torch.dtype) -> None:
    moe = replace(MOE, moe_eval_capacity_factor=None)
    reference = ReferenceOpenMoE(MODEL, moe, VOCAB, seed=5, dtype=dtype)
    exact = ReferenceOpenMoE(MODEL, moe, VOCAB, seed=5, dtype=torch.float64)
    found = reference(_tokens(), training_capacity=False)
    expected = exact(_tokens(), training_capacity=False)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.logits.dtype == found.routing[0].router_probs_TE.dtype == kept
    assert reference.embedding.weight.dtype == dtype
    error = F.mse_loss(found.logits.double(), expected.logits).sqrt() / expected.logits.std()
    assert error < {torch.bfloat16: 0.02, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(field: str) -> None:
    reference = _model(replace(MODEL, **{field: 0.5}))
    plain = _model()
    tokens = _tokens()
    reference.eval()
    still = reference(tokens, training_capacity=True).logits
    assert torch.equal(still, plain(tokens, training_capacity=True).logits)
    reference.train()
    torch.manual_seed(0)
    first = reference(tokens, training_capacity=True).logits
    second = reference(tokens, training_capacity=True).logits
    assert not torch.isclose(first, still).all()
    assert not torch.isclose(first, second).all()


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("is_moe", [True, False])
def test_dropout_is_on_every_residual_branch(placement: str, is_moe: bool) -> None:
    moe = replace(MOE, moe_shared_expert_placement=placement)
    block = _filled(DecoderBlock(replace(MODEL, hidden_dropout=1.0), moe, layer=0, is_moe=is_moe))
    x = _values(1, 6, 8)
    assert torch.equal(block(x, True)[0], x)


def test_hidden_dropout_is_on_the_embedding() -> None:
    # At p = 1 nothing of the embedding remains, and every residual branch is dropped too.
    reference = _model(replace(MODEL, hidden_dropout=1.0)).train()
    x, _ = reference.hidden_states(_tokens(), training_capacity=True)
    assert not x.any()
    x, _ = reference.eval().hidden_states(_tokens(), training_capacity=True)
    assert x.all()


def test_dropout_acts_on_the_embedding_in_training_alone() -> None:
    """As in Megatron-Core and T5: half of the elements are zero, the others doubled."""
    seen: list[Tensor] = []
    model = ReferenceOpenMoE(ModelConfig(hidden_dropout=0.5), MoEConfig(), 64)
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.arange(64).view(2, 32)
    embedded = model.embedding.weight[tokens]
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            model(tokens, training_capacity=False)
    dropped, whole = seen
    assert torch.equal(whole, embedded)
    kept = dropped != 0
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(dropped[kept], 2 * embedded[kept])
