"""Passes of loaded models: single experts, forced choices, experts left out, predictions."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.analysis.opening import open_model
from megatron_moe.errors import UsageError
from megatron_moe.inference import scoring
from tests.analysis.families import VOCAB, make, save
from tests.inference import cases

KINDS = [*all_families(), "native"]


def batch(vocab: int = VOCAB, rows: int = 2, length: int = 9) -> TokenBatch:
    ids = np.random.default_rng(4).integers(3, vocab, (rows, length + 1))
    return TokenBatch(
        tokens_BS=ids[:, :-1],
        next_BS=ids[:, 1:],
        documents_BS=np.zeros((rows, length), np.int64),
        domain=0,
        number=0,
    )


def runner_of(kind: str, folder: Path) -> MoERunner:
    """A small random model of a family; `native` drops tokens in evaluation."""
    path = cases.save(folder / "m") if kind == "native" else save(make(kind), folder)
    return open_model(path).load("cpu", torch.float32)


def seen_by(runner: MoERunner, *contexts: AbstractContextManager[None], **more: Any) -> Observation:
    given = batch()
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        return runner.run(given, predictions=True, **more)


def last(runner: MoERunner) -> int:
    return runner.sizes.moe_layers[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_what_the_loaded_module_computes(tmp_path: Path, kind: str) -> None:
    runner: Any = runner_of(kind, tmp_path)
    layer = last(runner)
    x_TH = torch.randn(7, runner.sizes.hidden_size, generator=torch.Generator().manual_seed(1))
    found = runner.expert_outputs(layer, x_TH, [0, 2])
    assert found.shape == (2, 7, runner.sizes.hidden_size)
    for place, expert in enumerate([0, 2]):
        ids, ones = torch.full((7, 1), expert), torch.ones(7, 1)
        if kind == "native":
            own = runner.loaded.model.layers[layer].moe.experts(x_TH, ids, ones, ones.bool())
        else:
            own = runner._runner.block(layer).experts(x_TH, ids, ones)
        torch.testing.assert_close(found[place], own, rtol=1e-5, atol=1e-5)
    one = runner.expert(layer, x_TH, 2)
    assert one.activation_TF.shape == one.inner_TF.shape == (7, runner.sizes.expert_width)


@pytest.mark.parametrize("kind", KINDS)
def test_own_choices_change_nothing_and_others_do(tmp_path: Path, kind: str) -> None:
    runner = runner_of(kind, tmp_path)
    plain = seen_by(runner)
    own = [
        runner.forced(each.layer, each.ids_TK, each.weights_TK, each.kept_TK)
        for each in plain.layers
    ]
    same = seen_by(runner, *own)
    assert torch.equal(same.loss_T, plain.loss_T)  # type: ignore[arg-type]
    assert torch.equal(same.layers[-1].kept_TK, plain.layers[-1].kept_TK)
    if kind == "native":
        assert not bool(plain.layers[-1].kept_TK.all())
    record = plain.layers[-1]
    ids_TK = (record.ids_TK + 1) % runner.sizes.num_experts
    other = seen_by(runner, runner.forced(record.layer, ids_TK, record.weights_TK))
    assert torch.equal(other.layers[-1].ids_TK.sort(-1).values, ids_TK.sort(-1).values)
    assert not torch.allclose(other.loss_T, plain.loss_T)  # type: ignore[arg-type]
    assert torch.equal(seen_by(runner).loss_T, plain.loss_T)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_expert_is_a_logit_of_minus_infinity(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = runner_of(kind, tmp_path)
    plain, layer = seen_by(runner), last(runner)
    expert = int(plain.layers[-1].counts_E.argmax())
    assert torch.equal(seen_by(runner, runner.without({})).loss_T, plain.loss_T)  # type: ignore
    assert torch.equal(seen_by(runner, runner.without({layer: []})).loss_T, plain.loss_T)  # type: ignore
    left_out = seen_by(runner, runner.without({layer: [expert]}))
    assert int(left_out.layers[-1].counts_E[expert]) == 0
    assert float(left_out.layers[-1].router_probs_TE[:, expert].max()) == 0
    assert torch.equal(left_out.layers[0].ids_TK, plain.layers[0].ids_TK) or len(plain.layers) == 1
    assert torch.equal(seen_by(runner).loss_T, plain.loss_T)  # type: ignore[arg-type]

    _remove_by_hand(runner, kind, layer, expert, monkeypatch)
    expected = seen_by(runner)
    torch.testing.assert_close(left_out.loss_T, expected.loss_T, rtol=1e-5, atol=1e-5)
    weights = left_out.layers[-1].weights_TK
    torch.testing.assert_close(weights, expected.layers[-1].weights_TK, rtol=1e-5, atol=1e-6)


def _remove_by_hand(
    runner: Any, kind: str, layer: int, expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logit is -inf in the router's own code, and no bias brings the expert back.

    In the score of its group it counts as 0, the sigmoid of that logit.
    """
    if kind == "native":
        router = runner.loaded.model.layers[layer].moe.router
    else:
        router = runner._runner.router(layer)
        block = runner._runner.block(layer)
        for holder in (router, block):
            bias = getattr(holder, "e_score_correction_bias", None)
            if bias is not None:
                bias[expert] = -1e9 if kind == "minimax_m2" else 0.0
    matrix, own = router.weight.detach().clone(), F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = own(x, weight, bias)
        if weight.shape == matrix.shape and torch.equal(weight.float(), matrix.float()):
            out = out.clone()
            out[..., expert] = -torch.inf
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize("kind", ["mixtral", "native"])
@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ({99: [0]}, r"layer of an expert to leave out must be an MoE layer: .* \(got 99\)"),
        ({"last": [9]}, r"expert to leave out of layer \d must be from 0 to 3 \(got 9\)"),
        ({"last": [0, 1, 2]}, r"experts to leave out of layer \d must be at most [12]"),
    ],
)
def test_what_is_not_there_cannot_be_left_out(
    tmp_path: Path, kind: str, experts: dict[Any, list[int]], said: str
) -> None:
    runner = runner_of(kind, tmp_path)
    named = {last(runner) if layer == "last" else layer: ids for layer, ids in experts.items()}
    with pytest.raises(UsageError, match=said), runner.without(named):
        pass


@pytest.mark.parametrize("kind", ["qwen2_moe", "gpt_oss"])
def test_predictions_in_parts_are_those_of_all_logits(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = runner_of(kind, tmp_path)
    given = batch()
    logits = make(kind)(torch.from_numpy(given.tokens_BS), use_cache=False).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, torch.from_numpy(given.next_BS).flatten(), reduction="none")
    for size in (3 * VOCAB, 1, 1 << 26):
        monkeypatch.setattr(scoring, "LOGITS", size)
        seen = seen_by(runner)
        torch.testing.assert_close(seen.loss_T, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(seen.predicted_T, logits.argmax(-1))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["olmoe", "native"])
def test_only_requested_inputs_are_recorded(tmp_path: Path, kind: str) -> None:
    runner = runner_of(kind, tmp_path)
    seen = runner.run(batch(), inputs=[last(runner)])
    assert [record.inputs_NH is not None for record in seen.layers[:-1]] == [False] * (
        len(seen.layers) - 1
    )
    assert seen.layers[-1].inputs_NH is not None
    assert seen.loss_T is None and seen.predicted_T is None
