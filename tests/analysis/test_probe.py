"""Routers that do not return what their stored weights and their family's rule give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.foreign import open_foreign
from megatron_moe.analysis.foreign_routing import load_foreign
from megatron_moe.errors import UsageError
from tests.analysis.families import make, save


def router_class(kind: str) -> Any:
    block = make(kind).model.layers[-1].mlp
    return type(getattr(block, "gate", None) or block.router)


def change(monkeypatch: pytest.MonkeyPatch, kind: str, alter: Any) -> None:
    """From now on the routers of a family return what `alter` makes of their results."""
    made = router_class(kind)
    own = made.forward

    def forward(self: Any, *given: Any) -> Any:
        return alter(*own(self, *given))

    monkeypatch.setattr(made, "forward", forward)


@pytest.mark.parametrize("kind", all_families())
@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (
            lambda logits, weights, ids: (logits.softmax(-1), weights, ids),
            r"logits of the router of layer \d in .* must be input times stored weights .*"
            r"\(got .probabilities, which sum to 1.\)",
        ),
        (
            lambda logits, weights, ids: (logits * 1.5, weights, ids),
            r"logits of the router .*\(got .values that differ by up to",
        ),
        (
            lambda logits, weights, ids: (logits, weights, (ids + 1) % logits.shape[-1]),
            r"choices of the router of layer \d in .* the best by the rule of its family",
        ),
        (
            lambda logits, weights, ids: (logits, weights * 0.8, ids),
            r"combine weights of the router of layer \d in .* by the rule of its family",
        ),
    ],
    ids=["probabilities", "scaled", "next expert", "weights"],
)
def test_other_results_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, alter: Any, said: str
) -> None:
    opened = open_foreign(save(make(kind), tmp_path))
    load_foreign(opened)
    change(monkeypatch, kind, alter)
    with pytest.raises(UsageError, match=said):
        load_foreign(opened)


def test_a_sigmoid_in_place_of_logits_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_foreign(save(make("minimax_m2"), tmp_path))
    change(monkeypatch, "minimax_m2", lambda logits, *rest: (logits.sigmoid(), *rest))
    with pytest.raises(UsageError, match=r"\(got .their sigmoid.\)"):
        load_foreign(opened)


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
def test_bf16_is_within_its_rounding(tmp_path: Path, kind: str) -> None:
    runner = load_foreign(open_foreign(save(make(kind), tmp_path)), dtype=torch.bfloat16)
    assert runner.module.dtype == torch.bfloat16


def test_experts_of_equal_scores_may_be_chosen_in_any_order(tmp_path: Path) -> None:
    model = make("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    load_foreign(open_foreign(save(model, tmp_path)))
