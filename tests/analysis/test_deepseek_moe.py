"""The model that was put together against a forward pass written out from its published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.analysis.foreign import open_foreign
from megatron_moe.analysis.foreign_routing import load_foreign
from megatron_moe.errors import UsageError
from tests.analysis.families import SETTINGS, make, save
from tests.convert.test_formats import rms, turned

CONFIG = SETTINGS["deepseek"]
IDS = torch.tensor([5, 49, 3, 3, 41, 17, 8, 30])


def ffn(w: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate, up = (x @ w[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
    return (F.silu(gate) * up) @ w[f"{prefix}.down_proj.weight"].T


def by_hand(w: dict[str, Tensor]) -> Tensor:
    x = w["model.embed_tokens.weight"][IDS]
    for i in range(CONFIG["num_hidden_layers"]):
        p = f"model.layers.{i}"
        h = rms(x, w[f"{p}.input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{p}.self_attn.{n}_proj.weight"].T).unflatten(-1, (2, -1)).transpose(0, 1)
            for n in "qkv"
        )
        scores = turned(q, 300.0) @ turned(k, 300.0).mT / q.shape[-1] ** 0.5
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ w[f"{p}.self_attn.o_proj.weight"].T
        h = rms(x, w[f"{p}.post_attention_layernorm.weight"])
        if i == 0:
            x = x + ffn(w, f"{p}.mlp", h)
            continue
        probs = (h @ w[f"{p}.mlp.gate.weight"].T).softmax(-1)
        out = ffn(w, f"{p}.mlp.shared_experts", h)
        for t in range(len(IDS)):
            for e in probs[t].topk(3).indices.tolist():
                out[t] += probs[t, e] * ffn(w, f"{p}.mlp.experts.{e}", h[t])
        x = x + out
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def test_logits_are_those_of_the_published_description(tmp_path: Path) -> None:
    save(make("deepseek"), tmp_path)
    values = {k: v.double() for k, v in load_file(tmp_path / "model.safetensors").items()}
    assert "model.layers.2.mlp.experts.7.down_proj.weight" in values
    assert values["model.layers.0.self_attn.q_proj.weight"].shape == (16, 16)
    found = load_foreign(open_foreign(tmp_path)).run(IDS[None], logits=True).logits_BSV
    assert found is not None
    torch.testing.assert_close(found[0].double(), by_hand(values), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_topk_prob": True}, r"norm_topk_prob .* must be False \(got True\)"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "deepseek"}))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    values = {**CONFIG, "model_type": "deepseek", **changes}
    text = json.dumps({k: v for k, v in values.items() if v is not None})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        open_foreign(tmp_path)
