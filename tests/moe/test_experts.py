"""The choice of an implementation, its buffer layout, and the markers of the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_kernels.reference import rank_in_expert
from megatron_moe.errors import UsageError
from megatron_moe.moe.exchange import ExpertGroups
from megatron_moe.moe.expert_gemm import ExpertBucket
from megatron_moe.moe.experts import ExpertWork, StackedExperts, choose_impl
from megatron_moe.moe.plan import Capacity, SlotRule, Slots, assign_slots
from tests.moe.cases import DTYPE, layer_of, model_config, moe_config


def test_auto_decides_by_the_loads_of_the_pass() -> None:
    def work(*filled: int, multiply_adds: int = 1000) -> ExpertWork:
        rows = list(filled)
        return ExpertWork(readable=True, filled=rows, multiply_adds=multiply_adds, width=10)

    assert choose_impl("auto", work(100, 100, 90)).buckets == (ExpertBucket(3, 100),)
    assert choose_impl("auto", work(100, 100, 20)).name == "loop"
    # Large experts are worth no padding.
    full = work(1000, 1000, 1000, multiply_adds=10**7)
    assert choose_impl("auto", full).buckets == (ExpertBucket(3, 1000),)
    large = choose_impl("auto", work(1000, 900, 1000, multiply_adds=10**7))
    assert (large.name, large.reason) == ("loop", "auto: on a CPU filled rows alone are computed")
    assert choose_impl("auto", work(0, 0, 0)).name == "loop"
    several_sources = replace(work(1), filled=None)
    assert choose_impl("auto", several_sources).name == "loop"


def slots_of(choices: Tensor, experts: int) -> Slots:
    """Nothing drops: a slot for every token."""
    capacity = Capacity(group_size=len(choices), groups=1, slots=len(choices))
    weights, rule = torch.ones(choices.shape), SlotRule(num_experts=experts)
    return assign_slots(choices, weights, 1, capacity, rule, rank_in_expert)


@pytest.mark.parametrize(
    ("impl", "kind", "rows"),
    [("loop", "packed", 7), ("batched", "fixed", 28), ("auto", "aligned", 8)],
)
def test_each_implementation_has_its_layout(impl: str, kind: str, rows: int) -> None:
    """Seven tokens, two to each of experts 0 to 2 and one to expert 3.

    Packed rows are the filled ones, fixed rows 7 slots of 4 experts, aligned rows 2 of 4 experts.
    """
    experts = StackedExperts(
        model_config(), moe_config(moe_expert_impl=impl), ExpertGroups.of(None), DTYPE, None
    )
    schedule = experts.schedule(slots_of(torch.tensor([[0], [1], [0], [1], [2], [2], [3]]), 4))
    assert (schedule.layout.kind, schedule.layout.rows) == (kind, rows)
    assert schedule.filled_E.tolist() == [2, 2, 2, 1]


def test_the_markers_that_megatron_core_reads() -> None:
    layer = layer_of(moe_config())
    assert layer.router.weight.sequence_parallel is False
    for weight in (layer.experts.weight_in, layer.experts.weight_out):
        assert weight.allreduce is True
        assert weight.tensor_model_parallel is True


@pytest.mark.parametrize(
    ("ep", "etp", "error"),
    [
        (3, 1, "--num-experts must be a multiple of --expert-model-parallel-size (3) (got 4)"),
        (
            1,
            3,
            "--moe-ffn-hidden-size must be a multiple of --expert-tensor-parallel-size (3) (got 8)",
        ),
    ],
)
def test_experts_that_do_not_divide(ep: int, etp: int, error: str) -> None:
    groups = replace(ExpertGroups.of(None), ep=_Group(ep), expt_tp=_Group(etp))
    with pytest.raises(UsageError) as raised:
        StackedExperts(model_config(), moe_config(), groups, DTYPE, None)
    assert str(raised.value) == error


class _Group:
    """The size of a process group."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size
