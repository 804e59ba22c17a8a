"""Choices from logits, worked by hand; `test_foreign_routing.py` compares rules with each class."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moe.analysis.rule import RoutingRule, choose


def of(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def out(*ids: int, experts: int = 4) -> torch.Tensor:
    return torch.tensor([e in ids for e in range(experts)])


def test_without_an_expert_the_others_share_the_softmax() -> None:
    rule = RoutingRule(topk=2, scale=2.0)
    logits = of(3.0, 1.0, 2.0, 0.0)
    ids, weights = choose(rule, logits, None, out(0))
    total = math.exp(1) + math.exp(2) + 1
    assert ids.tolist() == [[2, 1]]
    assert weights[0].tolist() == pytest.approx([2 * math.exp(2) / total, 2 * math.e / total])
    ids, weights = choose(rule, logits)
    assert ids.tolist() == [[0, 2]]
    assert weights[0, 0].item() == pytest.approx(2 * math.exp(3) / (total + math.exp(3)))


def test_a_bias_does_not_bring_an_expert_back() -> None:
    rule = RoutingRule(topk=2, score="sigmoid", normalised=True, biased=True)
    bias = torch.tensor([9.0, -5.0, -5.0, -5.0])
    ids, weights = choose(rule, of(0.0, 1.0, 2.0, 3.0), bias, out(0))
    assert ids.tolist() == [[3, 2]]
    a, b = (1 / (1 + math.exp(-z)) for z in (3.0, 2.0))
    assert weights[0].tolist() == pytest.approx([a / (a + b), b / (a + b)])
    assert choose(rule, of(0.0, 1.0, 2.0, 3.0), bias)[0].tolist() == [[0, 3]]


def test_where_too_few_are_left_in_the_best_groups_the_rest_has_no_weight() -> None:
    rule = RoutingRule(topk=2, groups=2, kept_groups=1)
    ids, weights = choose(rule, of(1.0, 0.0, 4.0, 5.0), None, out(2))
    # Group 1 is the best by expert 3, the only one left in it; experts of group 0 do not count.
    assert ids[0, 0].item() == 3
    total = math.exp(5) + math.exp(1) + 1
    assert weights[0].tolist() == pytest.approx([math.exp(5) / total, 0.0])


def test_equal_scores_are_in_the_order_of_the_experts() -> None:
    ids, weights = choose(RoutingRule(topk=3, normalised=True), of(1.0, 1.0, 1.0, 1.0))
    assert ids.tolist() == [[0, 1, 2]]
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
