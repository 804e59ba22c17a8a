"""A Llama checkpoint gives Llama's logits: a forward pass written out here, from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.convert.formats import read
from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.upcycle import Upcycling, upcycle
from megatron_moe.errors import UsageError
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.convert.test_formats import rms, turned

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 300.0,
    "tie_word_embeddings": False,
    "vocab_size": 50,
}
IDS = torch.tensor([5, 49, 3, 3, 41, 17, 8, 30])


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random ones under Llama's names."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shared = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    found = {"model.embed_tokens.weight": draw(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        found[p + "input_layernorm.weight"] = 1 + draw(hidden)
        found[p + "post_attention_layernorm.weight"] = 1 + draw(hidden)
        for name, rows in (("q", hidden), ("k", shared), ("v", shared), ("o", hidden)):
            found[f"{p}self_attn.{name}_proj.weight"] = draw(rows, hidden)
        found[p + "self_attn.rotary_emb.inv_freq"] = draw(4)
        found[p + "mlp.gate_proj.weight"] = draw(wide, hidden)
        found[p + "mlp.up_proj.weight"] = draw(wide, hidden)
        found[p + "mlp.down_proj.weight"] = draw(hidden, wide)
    found["model.norm.weight"] = 1 + draw(hidden)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = draw(config["vocab_size"], hidden)
    return found


def save(directory: Path, config: dict[str, Any], values: dict[str, Tensor]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(values, directory / "model.safetensors")
    return directory


def by_hand(config: dict[str, Any], values: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits, head by head; query head h uses key head h // (heads / key heads)."""
    w = {name: tensor.double() for name, tensor in values.items()}
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms(x, w[p + "input_layernorm.weight"])
        q = (h @ w[p + "self_attn.q_proj.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1)
        k = (h @ w[p + "self_attn.k_proj.weight"].T).unflatten(-1, (shared, -1)).transpose(0, 1)
        v = (h @ w[p + "self_attn.v_proj.weight"].T).unflatten(-1, (shared, -1)).transpose(0, 1)
        q, k = turned(q, config["rope_theta"]), turned(k, config["rope_theta"])
        mixed = []
        for head in range(heads):
            its = head // (heads // shared)
            scores = q[head] @ k[its].T / q.shape[-1] ** 0.5
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            mixed.append(scores.softmax(-1) @ v[its])
        x = x + torch.cat(mixed, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = rms(x, w[p + "post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    last = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms(x, w["model.norm.weight"]) @ last.T


def ours(model: LogicalModel) -> Tensor:
    reference = ReferenceOpenMoE(model.config.model, model.config.moe, 50, seed=None)
    reference.load_logical((name, tensor.whole()) for name, tensor in model.tensors.items())
    with torch.no_grad():
        return reference.eval()(IDS[None], training_capacity=False).logits[0].double()


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_llama_s(tmp_path: Path, shared: int, tied: bool) -> None:
    config = {**CONFIG, "num_key_value_heads": shared, "tie_word_embeddings": tied}
    values = weights(config)
    model = read("hf", save(tmp_path / "llama", config, values))
    expected = by_hand(config, values, IDS)
    torch.testing.assert_close(ours(model), expected, rtol=1e-4, atol=1e-4)


def test_experts_made_of_it_begin_with_its_logits(tmp_path: Path) -> None:
    values = weights(CONFIG)
    dense = read("hf", save(tmp_path / "llama", CONFIG, values))
    how = Upcycling(mode="shared", num_experts=4, topk=2, layer_freq="[0,1,1]")
    assert torch.equal(ours(upcycle(dense, how)), ours(dense))


def test_the_newer_place_of_the_rotary_base(tmp_path: Path) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    config["rope_parameters"] = {"rope_theta": 77.0, "rope_type": "default"}
    model = read("hf", save(tmp_path / "llama", config, weights(CONFIG)))
    assert model.config.model.rotary_base == 77.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            r"rope_type .* must be 'default' \(got 'yarn'\)",
        ),
        ({"num_key_value_heads": 3}, r"num_key_value_heads .* must be a divisor of .* \(got 3\)"),
        ({"hidden_size": None}, r"hidden_size .* must be an integer from 1 .* \(got None\)"),
        ({"num_hidden_layers": 4}, "without model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "the model alone .*also has model.layers.2"),
        ({"intermediate_size": 41}, r"shape of model.layers.0.mlp.gate_proj.* must be \[41, 32\]"),
    ],
)
def test_what_ours_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    directory = save(tmp_path / "llama", {**CONFIG, **change}, weights(CONFIG))
    with pytest.raises(UsageError, match=said):
        read("hf", directory)
