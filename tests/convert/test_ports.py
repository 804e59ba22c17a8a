"""What the two public PyTorch ports build from an exported folder: every field, tensor and shape.

The ports need other packages (ColossalAI; an old `transformers`), so their code is not run. Each
is read instead, and `PORTS` holds what it does with `config.json`:

- ColossalAI, hpcaitech/ColossalAI at 85ba7ab6, examples/language/openmoe/model/modeling_openmoe.py,
  with its `SparseMLP` and `MLPExperts`; its configuration is transformers 4.34's `LlamaConfig`.
- HFOpenMoe, pingzhili/openmoe-pt at b03ca282, hf_openmoe/modeling_hf_openmoe.py; its configuration
  is `LlamaConfig` with defaults for the fields of the experts.

Both compute the released variant alone: four-matrix SwiGLU, attention logits times 1, rotary base
10000, experts and shared expert as wide as dense layers, the latter after the former.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.hf_config import to_hf
from tests.convert.cases import CONFIG, VOCAB
from tests.convert.exported import VARIANTS, export, varied

LLAMA = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_return_dict": True,
    "vocab_size": 32000,
}
"""Fields of `LlamaConfig` of transformers 4.34 with defaults: what a file may leave out."""
MODEL = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads hidden_act max_position_embeddings rms_norm_eps pad_token_id "
    "initializer_range pretraining_tp use_cache enable_kernel label_smoothing z_loss_factor "
    "num_experts moe_layer_interval router_topk router_capacity_factor_train "
    "router_capacity_factor_eval router_min_capacity router_drop_tks"
)
PORTS = {
    "ColossalAI": f"{MODEL} router_noisy_policy mlp_gated enable_load_balance "
    "load_balance_tolerance load_balance_beam_width load_balance_group_swap_factor "
    "enable_hierarchical_alltoall router_aux_loss_factor router_z_loss_factor",
    "HFOpenMoe": MODEL,
}
"""Fields that each port reads as attributes of its configuration."""


def configuration(values: dict[str, Any]) -> SimpleNamespace:
    """As `LlamaConfig(**values)`: the fields of the file, and its defaults for some others."""
    found = SimpleNamespace(**{**LLAMA, **values})
    if found.num_key_value_heads is None:
        found.num_key_value_heads = found.num_attention_heads
    return found


def tensors(config: SimpleNamespace, port: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a port builds."""
    hidden, width = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    feed_forward = {
        "gate_proj.weight": (2 * width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        own = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (shared, hidden),
            "self_attn.v_proj.weight": (shared, hidden),
            "self_attn.o_proj.weight": (hidden, query),
        }
        if (layer + 1) % config.moe_layer_interval == 0:
            own["pre_extra_mlp_layernorm.weight"] = (hidden,)
            own |= {f"extra_mlp.{name}": shape for name, shape in feed_forward.items()}
            if port == "ColossalAI":
                assert config.mlp_gated
                assert config.hidden_act == "swiglu"
                experts = config.num_experts
                own["mlp.gate_weight"] = (experts, hidden)
                own["mlp.experts.wi_gate"] = (experts, hidden, 2 * width)
                own["mlp.experts.wi_up"] = (experts, hidden, width)
                own["mlp.experts.wo"] = (experts, width, hidden)
            else:
                own["mlp.gate.weight"] = (config.num_experts, hidden)
                for expert in range(config.num_experts):
                    each = {f"mlp.experts.{expert}.{n}": s for n, s in feed_forward.items()}
                    own |= each
        else:
            own |= {f"mlp.{name}": shape for name, shape in feed_forward.items()}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found


@pytest.mark.parametrize(
    ("port", "layout"), [("ColossalAI", "stacked"), ("HFOpenMoe", "unstacked")]
)
def test_a_port_builds_exactly_the_tensors_of_the_files(
    tmp_path: Path, port: str, layout: Any
) -> None:
    export(tmp_path / "hf", CONFIG, layout)
    values = json.loads((tmp_path / "hf/config.json").read_text())
    config = configuration(values)
    missing = [name for name in PORTS[port].split() if not hasattr(config, name)]
    assert missing == []
    with safe_open(tmp_path / "hf/model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == tensors(config, port)
    assert config.vocab_size == VOCAB
    assert config.rope_scaling is None
    assert config.router_noisy_policy is None
    assert (config.hidden_act, config.router_topk) == ("swiglu", 2)


@pytest.mark.parametrize("size", ["base-16e", "8b-32e", "34b-32e"])
def test_every_field_is_in_the_file_of_every_released_size(size: str) -> None:
    """In the file itself, not by a default of `LlamaConfig`, except what only training sets."""
    values = to_hf(PRESETS[f"openmoe-{size}-released"], 256384, "bfloat16")
    for port, names in PORTS.items():
        assert [name for name in names.split() if name not in values] == [], port
    found = {key: values[key] for key in ("load_balance_tolerance", "load_balance_beam_width")}
    assert found == {"load_balance_tolerance": 0.1, "load_balance_beam_width": 8}
    assert values["load_balance_group_swap_factor"] == 0.4
    assert values["architectures"] == ["OpenMoeForCausalLM"]
    assert values["model_type"] == "llama"


@pytest.mark.parametrize("variant", [n for n in VARIANTS if n not in ("released", "grouped")])
def test_of_another_variant_a_port_builds_nothing(tmp_path: Path, variant: str) -> None:
    """Rather than another model: it has no layer pattern, and another type."""
    changes = VARIANTS[variant]
    if variant == "dense":
        changes = {**changes, "softmax_scale": None}
    export(tmp_path / "hf", varied(changes))
    values = json.loads((tmp_path / "hf/config.json").read_text())
    assert values["model_type"] == "openmoe"
    with pytest.raises(TypeError):
        tensors(configuration(values), "ColossalAI")
