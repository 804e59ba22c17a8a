"""`config.json` of the released sizes: the fields and values that are published with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.hf_config import from_hf, to_hf

VOCAB = 256384
SIZES: dict[str, dict[str, Any]] = {
    "openmoe-base-16e-released": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "num_experts": 16,
        "moe_layer_interval": 4,
    },
    "openmoe-8b-32e-released": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "head_dim": 128,
        "num_experts": 32,
        "moe_layer_interval": 6,
    },
    "openmoe-34b-32e-released": {
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 24,
        "head_dim": 128,
        "num_experts": 32,
        "moe_layer_interval": 4,
    },
}
COMMON: dict[str, Any] = {
    "architectures": ["OpenMoeForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "swiglu",
    "mlp_gated": True,
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "router_topk": 2,
    "router_capacity_factor_train": 1.25,
    "router_capacity_factor_eval": 2.0,
    "router_min_capacity": 4,
    "router_noisy_policy": None,
    "router_drop_tks": True,
    "router_aux_loss_factor": 0.01,
    "enable_load_balance": False,
    "enable_kernel": False,
    "enable_comm_overlap": False,
    "enable_hierarchical_alltoall": False,
}


@pytest.mark.parametrize("preset", SIZES)
def test_what_is_written_is_what_was_published(preset: str) -> None:
    written = to_hf(PRESETS[preset], VOCAB, "bfloat16")
    expected = {**COMMON, **SIZES[preset]}
    assert {key: written.get(key, "absent") for key in expected} == expected


@pytest.mark.parametrize("preset", SIZES)
def test_published_fields_alone_give_the_preset_s_model(preset: str) -> None:
    config, vocab = from_hf({**COMMON, **SIZES[preset]}, "config.json")
    run = PRESETS[preset]
    assert (config.model, vocab) == (run.model, VOCAB)
    z_loss = run.moe.moe_z_loss_coeff  # the 34B code has another than its published file
    found = replace(config.moe, moe_z_loss_coeff=z_loss, moe_layer_freq=run.moe.moe_layer_freq)
    assert found == run.moe


def test_the_pattern_of_layers_with_experts() -> None:
    from megatron_moe.config import moe_layer_pattern

    for preset, sizes in SIZES.items():
        config, _ = from_hf({**COMMON, **sizes}, "config.json")
        layers, every = sizes["num_hidden_layers"], sizes["moe_layer_interval"]
        expected = tuple((i + 1) % every == 0 for i in range(layers))
        assert moe_layer_pattern(config.moe.moe_layer_freq, layers) == expected
        assert moe_layer_pattern(PRESETS[preset].moe.moe_layer_freq, layers) == expected
