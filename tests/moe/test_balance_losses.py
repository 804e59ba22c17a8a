"""A balance loss over the global batch, several at once, and a z-loss on chosen experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.moe import MoELayer, collect_statistics
from megatron_moe.moe.global_loads import GlobalLoads
from megatron_moe.moe.observing import begin_step
from megatron_moe.moe.scoring import ScoreRule, score
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
)
from tests.moe.ranks import context_of
from tests.support.pool import Pool

GLOBAL: dict[str, Any] = {
    "moe_router_load_balancing_type": ("global_aux_loss", "seq_aux_loss"),
    "moe_aux_loss_coeff": (0.3, 0.2),
    "moe_z_loss_coeff": 0.0,
}
CHOSEN: dict[str, Any] = {"moe_z_loss_over": "chosen"}


def test_loads_add_up_over_the_passes_of_a_step() -> None:
    loads = GlobalLoads()
    first, second = torch.tensor([3, 1]), torch.tensor([0, 4])
    assert loads.add(first)[0].tolist() == [3, 1]
    total_E, passes = loads.add(second)
    assert (total_E.tolist(), passes) == ([3, 5], 2)
    assert first.tolist() == [3, 1], "the caller's loads are its own"
    loads.begin_step()
    assert loads.add(second)[1] == 1


def balance_by_hand(layer: MoELayer, passes: list[Tensor]) -> list[float]:
    """E sum f P of each pass, f over all passes up to it, one loop for each factor."""
    counts, found = torch.zeros(4, dtype=DTYPE), []
    for number, x in enumerate(passes, start=1):
        scores, _ = layer.router(x.view(-1, HIDDEN))
        for expert in scores.choices_TK.flatten().tolist():
            counts[expert] += 1
        share_E = counts / (number * len(scores.choices_TK))
        found.append(4 * float((share_E * scores.probs_TE.detach().mean(0)).sum()))
    return found


def test_the_second_micro_batch_sees_the_loads_of_the_first() -> None:
    layer = layer_of(moe_config(**GLOBAL))
    batches = [tokens(1), tokens(2) + 1.0]
    expected = balance_by_hand(layer, batches)

    def losses() -> list[float]:
        found = []
        for x in batches:
            scores, _ = layer.router(x.view(-1, HIDDEN))
            plan = layer.dispatcher.plan(scores, BATCH, True, layer.experts, layer.draw)
            found.append(float(layer.losses.attach(scores, plan)[1][0]))
        return found

    assert losses() == pytest.approx(expected)
    assert losses() != pytest.approx(expected), "the step has not ended"
    begin_step([layer], seed=0, step=2)
    with torch.no_grad():  # the first pass of a recomputed layer, which counts in the second
        layer(batches[0])
    layer.eval()
    layer(batches[1])
    layer.train()
    assert losses() == pytest.approx(expected)


def compare_with_megatron_core(rank: int, world_size: int) -> None:
    """Two micro-batches on each data-parallel rank: gradients of Megatron-Core's own router.

    It divides a global loss by the tokens of all ranks, and the reduction of gradients averages
    over them once more: its gradient is ours divided by the data-parallel size.
    """
    ctx = context_of(world_size, 1, 1, 1)
    groups = SimpleNamespace(tp=ctx.pgs.tp, cp=ctx.pgs.tp, tp_cp=ctx.pgs.tp, tp_dp_cp=ctx.pgs.dp)
    kinds, weights = list(GLOBAL["moe_router_load_balancing_type"]), [0.3 * world_size, 0.2]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type=kinds,
        moe_aux_loss_coeff=weights,
        moe_router_dtype="fp64",
        add_bias_linear=False,
        perform_initialization=False,
    )
    settings = {**GLOBAL, "moe_loss_convention": "megatron", "moe_expert_capacity_factor": None}
    layer = layer_of(moe_config(**settings), pgs=ctx.pgs)
    theirs = TopKRouter(config, pg_collection=groups).to(DTYPE)
    theirs.set_layer_number(1)
    theirs.weight.data.copy_(layer.router.weight.data)
    set_loss_scale(0.5)
    for micro_batch in range(2):
        x = tokens(2 * micro_batch + ctx.dp_rank).requires_grad_()
        probs_TE, _ = theirs(x)
        (probs_TE * 0).sum().backward()  # the losses alone
        scores, _ = layer.router(x.view(-1, HIDDEN))
        plan = layer.dispatcher.plan(scores, BATCH, True, layer.experts, layer.draw)
        (layer.losses.attach(scores, plan)[0] * 0).sum().backward()
    expected = theirs.weight.grad
    torch.testing.assert_close(layer.router.weight.grad, expected, rtol=1e-5, atol=1e-7)
    assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_megatron_cores_loss(pool: Pool, world_size: int) -> None:
    pool.run(compare_with_megatron_core, world_size)


def padding_of(seed: int, padded: bool) -> Tensor:
    """Which tokens [S, B] are padding: the end of each row, longer in later rows and batches."""
    starts = SEQUENCE - torch.arange(1, BATCH + 1) - seed
    return (torch.arange(SEQUENCE).unsqueeze(1) >= starts) & torch.tensor(padded)


def compare_with_all_ranks_rows(
    rank: int, world_size: int, *, tp: int, ep: int, padded: bool
) -> float:
    """The sum over ranks of gradients of the router is that of one process.

    There, every data-parallel rank is a layer of its own, and f is that of all of them.
    """
    ctx = context_of(world_size, tp, ep, 1)
    settings = {**GLOBAL, "moe_expert_capacity_factor": None, "moe_ignore_padding_tokens": padded}
    layer = layer_of(moe_config(**settings), pgs=ctx.pgs, sequence_parallel=tp > 1)
    whole = layer_of(moe_config(**settings))
    layer.router.weight.data.copy_(whole.router.weight.data)
    set_loss_scale(1.0)
    total = torch.zeros((), dtype=DTYPE)
    chosen, real = [], []
    for micro_batch in range(2):
        seeds = [2 * micro_batch + replica for replica in range(ctx.layout.dp)]
        rows = [tokens(seed) for seed in seeds]
        real += [~padding_of(seed, padded) for seed in seeds]
        own_SB = padding_of(seeds[ctx.dp_rank], padded).chunk(tp)[ctx.tp_rank]
        padding_T = own_SB.flatten() if padded else None
        x = rows[ctx.dp_rank].chunk(tp)[ctx.tp_rank].reshape(-1, HIDDEN)
        scores, _ = layer.router(x)
        plan = layer.dispatcher.plan(scores, BATCH, True, layer.experts, layer.draw, padding_T)
        (layer.losses.attach(scores, plan)[0] * 0).sum().backward()
        found = [whole.router(each.view(-1, HIDDEN))[0] for each in rows]
        chosen += [
            torch.nn.functional.one_hot(s.choices_TK, 4).sum(1).view(SEQUENCE, BATCH, 4).to(DTYPE)
            * counts.unsqueeze(2)
            for s, counts in zip(found, real[-ctx.layout.dp :], strict=True)
        ]
        share_E = torch.stack(chosen).sum((0, 1, 2)) / torch.stack(real).sum()
        latest = slice(-ctx.layout.dp, None)
        for s, own, counts in zip(found, chosen[latest], real[latest], strict=True):
            probs_SBE = s.probs_TE.view(SEQUENCE, BATCH, 4) * counts.unsqueeze(2)
            lengths_B1 = counts.sum(0).unsqueeze(1)
            rowwise = (own.sum(0) * probs_SBE.sum(0) / lengths_B1**2).sum(1).mean()
            overall = (share_E * probs_SBE.sum((0, 1)) / counts.sum()).sum()
            total = total + 4 * (0.3 * overall + 0.2 * rowwise) / layer.num_moe_layers
    total.backward()
    grad = layer.router.weight.grad
    for group in (ctx.pgs.tp, ctx.pgs.dp):
        dist.all_reduce(grad, group=group)
    torch.testing.assert_close(grad, whole.router.weight.grad)
    return float(grad.abs().max())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (1, 2)])
def test_the_layout_changes_nothing(pool: Pool, tp: int, ep: int, padded: bool) -> None:
    """Beyond what is said of data-parallel ranks, whose micro-batches count together."""
    found = pool.run(compare_with_all_ranks_rows, 2, tp=tp, ep=ep, padded=padded)
    assert min(found) > 1e-3


def test_the_z_loss_of_chosen_experts_by_hand() -> None:
    """Of logits (1, 3, 2) and k = 2: log(e^3 + e^2), without the first."""
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=DTYPE, requires_grad=True)
    expected = torch.tensor([3.0, 2.0], dtype=DTYPE).logsumexp(0)
    for function in ("softmax", "sigmoid"):
        rule = ScoreRule(function=function, topk=2, z_of_chosen=True)  # type: ignore[arg-type]
        log_z_T = score(logits, rule).log_z_T
        torch.testing.assert_close(log_z_T, expected.view(1))
        (grad,) = torch.autograd.grad(log_z_T.sum(), logits)
        share = torch.tensor([3.0, 2.0], dtype=DTYPE).softmax(0)
        torch.testing.assert_close(grad, torch.tensor([[0, share[0], share[1]]], dtype=DTYPE))


@pytest.mark.parametrize(
    "settings", [CHOSEN, {**CHOSEN, "moe_router_score_function": "sigmoid"}, GLOBAL]
)
def test_the_reference_layer_agrees(settings: dict[str, Any]) -> None:
    """Two micro-batches, each with the output and the losses in one gradient; every balance loss is
    reported.
    """
    layer = layer_of(moe_config(**settings))
    reference = reference_of(layer)
    set_loss_scale(1.0)
    expected = []
    for seed in (4, 5):
        layer(tokens(seed)).square().sum().backward()
        y, routing = reference(tokens(seed).transpose(0, 1), training_capacity=True)
        weighted = zip(layer.moe.aux_loss_coeffs, routing.balance_losses, strict=True)
        balance = sum(weight * loss for weight, loss in weighted)
        losses = (balance + layer.moe.moe_z_loss_coeff * routing.z_loss) / layer.num_moe_layers
        (y.square().sum() + losses).backward()
        expected.append([loss.item() for loss in routing.balance_losses])
    torch.testing.assert_close(layer.router.weight.grad, reference.router.weight.grad)
    found = collect_statistics([layer], None)[layer.layer_number]
    means = [sum(losses) / 2 for losses in zip(*expected, strict=True)]
    assert [found.aux_loss, *found.further_aux_losses] == pytest.approx(means)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"moe_aux_loss_coeff": (0.1, 0.2)},
            "--moe-aux-loss-coeff must be a number for each",
        ),
        ({**GLOBAL, "moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff must be a number for each"),
        (
            {"moe_router_load_balancing_type": ("none", "aux_loss")},
            "one or several, each once",
        ),
        ({"moe_router_load_balancing_type": ("aux_loss", "aux_loss")}, "one or several, each once"),
    ],
)
def test_lists_that_do_not_fit_are_an_error(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        validate(RunConfig(moe=moe_config(**settings)))
