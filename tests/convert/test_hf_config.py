"""`config.json` of OpenMoE: the published fields and values, older names, rotary embeddings.

`PUBLISHED_34B` and `PUBLISHED_FIRST` are the fields of the files openmoe_34b_config.json and, as
first published, openmoe_8b_config.json of the public ColossalAI port.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_moe.config.presets import PRESETS
from megatron_moe.convert.hf_config import from_hf, to_hf
from megatron_moe.errors import CheckpointError, UsageError

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


PUBLISHED_FIRST: dict[str, Any] = {
    "architectures": ["OpenMoeForCausalLM"],
    "intermediate_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": 128,
    "num_attention_heads": 24,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "vocab_size": VOCAB,
    "hidden_act": "swiglu",
    "num_experts": 32,
    "topk": 2,
    "capacity_factor_train": 1.25,
    "capacity_factor_eval": 2.0,
    "min_capacity": 4,
    "noisy_policy": None,
    "drop_tks": True,
    "expert_parallel": None,
    "gated": True,
    "moe_layer_interval": 6,
}


def test_the_first_published_names_are_read() -> None:
    config, vocab = from_hf(PUBLISHED_FIRST, "config.json")
    run = PRESETS["openmoe-8b-32e-released"]
    assert (config.model, vocab) == (run.model, VOCAB)
    assert replace(config.moe, moe_layer_freq=run.moe.moe_layer_freq) == run.moe
    changed = {**PUBLISHED_FIRST, "topk": 3, "capacity_factor_train": 1.5, "min_capacity": 8}
    moe = from_hf({**changed, "capacity_factor_eval": 3.0}, "config.json")[0].moe
    found = moe.moe_router_topk, moe.moe_expert_capacity_factor, moe.moe_eval_capacity_factor
    assert (*found, moe.moe_min_capacity) == (3, 1.5, 3.0, 8)
    for older in ("gated", "noisy_policy"):
        with pytest.raises(UsageError, match=f"{older if older != 'gated' else 'mlp_gated'}"):
            from_hf({**PUBLISHED_FIRST, older: "other"}, "config.json")


def test_the_exported_code_knows_the_same_names() -> None:
    from megatron_moe.convert import hf_config
    from megatron_moe.convert.modeling import configuration_openmoe

    assert configuration_openmoe.OLDER_NAMES == hf_config.OLDER_NAMES


BASE = {**COMMON, **SIZES["openmoe-8b-32e-released"]}


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rotary_embeddings_as_newer_files_write_them(kind: str) -> None:
    without = {key: value for key, value in BASE.items() if key != "rope_theta"}
    newer = {kind: "default", "rope_theta": 500000.0}
    for values in (
        {**without, "rope_parameters": newer},
        {**without, "rope_theta": 500000.0, "rope_scaling": {kind: "default"}},
        {**without, "rope_theta": 500000.0, "rope_parameters": None},
    ):
        assert from_hf(values, "config.json")[0].model.rotary_base == 500000.0
    assert from_hf(without, "config.json")[0].model.rotary_base == 10000.0


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "rope_type of rope_.*'yarn'"),
        ({"type": "linear", "factor": 2.0}, "rope_type of rope_.* must be 'default'.*'linear'"),
        ({"rope_theta": 500000.0}, "rope_theta of rope_.* must be 10000.0 as in the same file"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of rope_"),
        ({"full_attention": {"rope_theta": 1e4}}, "one set of parameters for all layers"),
        ("yarn", "one set of parameters"),
    ],
)
def test_other_rotary_embeddings_are_errors(field: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        from_hf({**BASE, field: value}, "config.json")


def test_what_transformers_makes_of_a_published_file(tmp_path: Any) -> None:
    """Saved again by its class for Llama, whose type the file names."""
    import json

    from transformers import LlamaConfig

    # The widths of Base: those of 8B, whose heads are wider than H / N, that class rejects.
    base = {**COMMON, **SIZES["openmoe-base-16e-released"], "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps(base))
    LlamaConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again/config.json").read_text())
    assert "rope_theta" not in values, "this release keeps the field: the case shows nothing"
    config, vocab = from_hf(values, "config.json")
    run = PRESETS["openmoe-base-16e-released"]
    assert (config.model, vocab) == (replace(run.model, rotary_base=500000.0), VOCAB)


def test_a_drop_policy_that_the_modelling_file_has_not_is_an_error() -> None:
    run = PRESETS["openmoe-tiny-released"]
    run = replace(run, moe=replace(run.moe, moe_token_drop_policy="fair"))
    expected = r"--moe-token-drop-policy must be position or probs .* \(got 'fair'\)"
    with pytest.raises(CheckpointError, match=expected):
        to_hf(run, VOCAB, "bfloat16")
