"""What was chosen, worked out here from what went into the layer; and what came out of it."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.foreign import ExpertWeights, LayerWeights, open_foreign
from megatron_moe.analysis.foreign_routing import LayerRouting, load_foreign
from megatron_moe.analysis.rule import RoutingRule
from megatron_moe.errors import UsageError
from tests.analysis.families import SETTINGS, VOCAB, make, save

TOKENS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))


def chosen(rule: RoutingRule, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Expert and weight for one token, worked out from what we say of the family's rule."""
    values = torch.tensor(logits, dtype=torch.float64)
    scores = (values.softmax(0) if rule.score == "softmax" else values.sigmoid()).tolist()
    ranked = [score + extra for score, extra in zip(scores, bias, strict=True)]
    allowed = list(range(len(scores)))
    if rule.groups > 1:
        size = len(scores) // rule.groups
        groups = [allowed[i : i + size] for i in range(0, len(scores), size)]
        best = 1 if rule.group_score == "best" else 2
        worth = [sum(sorted(ranked[e] for e in group)[-best:]) for group in groups]
        order = sorted(range(len(groups)), key=lambda g: -worth[g])[: rule.kept_groups]
        allowed = [e for g in order for e in groups[g]]
    experts = sorted(allowed, key=lambda e: -ranked[e])[: rule.topk]
    total = sum(scores[e] for e in experts) if rule.normalised else 1.0
    return {e: rule.scale * scores[e] / total for e in experts}


def applied(expert: ExpertWeights, x_TH: Tensor) -> Tensor:
    gate, up, down = (m.whole().double() for m in (expert.gate, expert.up, expert.down))
    if expert.gate_bias is None:
        return (F.silu(x_TH @ gate.T) * (x_TH @ up.T)) @ down.T
    biases = (expert.gate_bias, expert.up_bias, expert.down_bias)
    gate_bias, up_bias, down_bias = (m.whole().double() for m in biases)  # type: ignore
    limit = SETTINGS["gpt_oss"]["swiglu_limit"]
    g = torch.minimum(x_TH @ gate.T + gate_bias, torch.tensor(limit))
    u = torch.clip(x_TH @ up.T + up_bias, -limit, limit)
    return ((u + 1) * g * torch.sigmoid(1.702 * g)) @ down.T + down_bias


def mixture(weights: LayerWeights, record: LayerRouting, x_TH: Tensor) -> Tensor:
    """What the layer must give for its input, from our view alone."""
    out = torch.zeros_like(x_TH)
    for e, expert in enumerate(weights.experts):
        share_T = (record.weights_TK.double() * (record.ids_TK == e)).sum(1)
        out += share_T[:, None] * applied(expert, x_TH)
    if weights.shared is not None:
        shared = applied(weights.shared, x_TH)
        if weights.shared_gate is not None:
            shared = shared * (x_TH @ weights.shared_gate.whole().double().T).sigmoid()
        out += shared
    return out


@pytest.mark.parametrize("kind", all_families())
def test_choices_and_weights(tmp_path: Path, kind: str) -> None:
    model = make(kind)
    opened = open_foreign(save(model, tmp_path))
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    for i, layer in enumerate(model.model.layers):  # the test's own ear, at other modules
        if kind == "flex_olmo":  # its norms follow attention and experts
            layer.mlp.register_forward_pre_hook(
                lambda _, given, i=i: entered.__setitem__(i, given[0].detach().flatten(0, 1))
            )
        else:
            layer.post_attention_layernorm.register_forward_hook(
                lambda _, given, said, i=i: entered.__setitem__(i, said.detach().flatten(0, 1))
            )
        layer.mlp.register_forward_hook(
            lambda _, given, said, i=i: left.__setitem__(
                i, (said[0] if isinstance(said, tuple) else said).detach().flatten(0, 1)
            )
        )
    with torch.no_grad():
        logits = model(TOKENS).logits
    found = load_foreign(opened).run(TOKENS, inputs=True, logits=True)
    torch.testing.assert_close(found.logits_BSV, logits, rtol=1e-4, atol=1e-4)
    assert [record.layer for record in found.routing] == [w.layer for w in opened.layers]
    for weights, record in zip(opened.layers, found.routing, strict=True):
        x_TH = entered[weights.layer].double()
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(record.inputs_NH.double(), x_TH, **near)  # type: ignore
        logits_TE = x_TH @ weights.router.whole().double().T
        if weights.router_bias is not None:
            logits_TE += weights.router_bias.whole().double()
        bias = (
            [0.0] * opened.settings.num_experts
            if weights.bias is None
            else weights.bias.whole().tolist()
        )
        for token, row in enumerate(logits_TE.tolist()):
            expected = chosen(opened.settings.rule, row, bias)
            ids, said = record.ids_TK[token].tolist(), record.weights_TK[token].tolist()
            assert set(ids) == set(expected)
            assert said == sorted(said, reverse=True)
            assert said == pytest.approx([expected[e] for e in ids], rel=1e-4)
        sigmoid = kind in ("deepseek_v3", "glm4_moe", "minimax_m2")
        probs_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
        torch.testing.assert_close(record.router_probs_TE.double(), probs_TE, **near)
        picked = record.router_probs_TE.gather(1, record.ids_TK)
        assert torch.equal(record.probs_TK, picked)
        counts = [int((record.ids_TK == e).sum()) for e in range(opened.settings.num_experts)]
        assert record.counts_E.tolist() == counts
        assert bool(record.kept_TK.all())
        made = mixture(weights, record, x_TH)
        torch.testing.assert_close(made.float(), left[weights.layer], **near)


def test_every_part_of_a_rule_matters_in_these_cases() -> None:
    """Else the test above would not see it: without it, other experts or weights come out."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 8, generator=generator).tolist()
    bias = torch.randn(8, generator=generator).mul(0.2).tolist()
    none = [0.0] * 8
    v2 = RoutingRule(topk=3, scale=2.5, groups=4, kept_groups=2)
    v3 = replace(v2, score="sigmoid", normalised=True, group_score="best two", biased=True)

    def differ(
        first: RoutingRule, its: list[float], second: RoutingRule, others: list[float]
    ) -> bool:
        return any(set(chosen(first, r, its)) != set(chosen(second, r, others)) for r in rows)

    assert differ(v2, none, replace(v2, groups=1), none)
    assert differ(v2, none, replace(v2, kept_groups=3), none)
    assert differ(v3, bias, v3, none)
    assert differ(v3, none, replace(v3, group_score="best"), none)


def test_equal_weights_are_in_the_order_of_the_experts(tmp_path: Path) -> None:
    model = make("deepseek_v3")
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.weight.zero_()
    found = load_foreign(open_foreign(save(model, tmp_path))).run(TOKENS)
    for record in found.routing:
        assert torch.equal(record.ids_TK, record.ids_TK.sort(1).values)
        assert record.inputs_NH is None
    assert found.logits_BSV is None


def test_no_hook_stays_and_nothing_is_written_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[object] = []

    def refuse(_: Any, address: object) -> None:
        reached.append(address)
        raise OSError("no network")

    save(make("qwen2_moe"), tmp_path / "m")
    torch.save(load_file(tmp_path / "m/model.safetensors"), tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(socket.socket, "connect", refuse)
    runner = load_foreign(open_foreign(tmp_path / "m"), dtype=torch.bfloat16)
    assert runner.module.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in runner.module.parameters())
    first, second = (runner.run(TOKENS) for _ in range(2))
    assert torch.equal(first.routing[0].weights_TK, second.routing[0].weights_TK)
    assert len(first.routing) == len(second.routing) == 2
    assert not any(module._forward_hooks for module in runner.module.modules())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert reached == []


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    save(make("mixtral"), tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    path = tmp_path / "config.json"
    remote = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": remote}))
    load_foreign(open_foreign(tmp_path)).run(TOKENS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.self_attn.q_proj.weight": None}, "missing keys: .*layers.1.self_attn.q"),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(3, 3)}, "mismatched keys: .*k_proj"),
        ({"model.layers.0.strange.weight": torch.ones(3)}, "unexpected keys: .*strange"),
    ],
)
def test_nothing_is_drawn_at_random_in_place_of_what_is_missing(
    tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    save(make("olmoe"), tmp_path)
    file = tmp_path / "model.safetensors"
    values = {**load_file(file), **change}
    save_file({k: v for k, v in values.items() if v is not None}, file)
    with pytest.raises(UsageError, match=said):
        load_foreign(open_foreign(tmp_path))


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    runner = load_foreign(open_foreign(save(make("olmoe"), tmp_path)))
    for wrong in (-1, VOCAB):
        with pytest.raises(UsageError, match=rf"token id must be from 0 to 49 \(got {wrong}\)"):
            runner.run(torch.tensor([[1, wrong]]))
