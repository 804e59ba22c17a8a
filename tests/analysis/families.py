"""Small random models of other programs' families, saved by `transformers` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_moe.analysis.families import deepseek

VOCAB = 50
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 3,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
}
_WIDE = {**_BASE, "intermediate_size": 20, "moe_intermediate_size": 12}
_LATENT = {
    **_WIDE,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_BASE, "intermediate_size": 12, "num_local_experts": 4},
    "olmoe": {**_BASE, "intermediate_size": 12, "num_experts": 6},
    "qwen2_moe": {
        **_WIDE,
        "num_experts": 6,
        "shared_expert_intermediate_size": 10,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
    },
    "qwen3_moe": {
        **_WIDE,
        "num_experts": 6,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "deepseek": {  # as published: V2's fields for latent attention are not there
        **_WIDE,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "rope_theta": 300.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
    },
    "deepseek_v2": {**_LATENT, "n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1},
    "flex_olmo": {**_BASE, "intermediate_size": 12, "num_experts": 6},
    "glm4_moe": {
        **_WIDE,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "head_dim": 8,
    },
    "gpt_oss": {
        **_BASE,
        "intermediate_size": 12,
        "num_local_experts": 6,
        "head_dim": 8,
        "sliding_window": 4,
        "swiglu_limit": 0.8,
    },
    "minimax_m2": {
        **_BASE,
        "intermediate_size": 12,
        "num_local_experts": 6,
        "head_dim": 8,
        "rotary_dim": 4,
    },
}
CLASSES = {
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "flex_olmo": "FlexOlmo",
    "glm4_moe": "Glm4Moe",
    "gpt_oss": "GptOss",
    "minimax_m2": "MiniMaxM2",
}


def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family, its routers decided enough for choices to be clear."""
    settings = {**SETTINGS[kind], **changes}
    if kind == "deepseek":
        config = deepseek.deepseek_configuration(transformers, settings, "the test")
        model = deepseek.deepseek_model_class(transformers)(config).eval()
    else:
        begin = CLASSES[kind]
        config = getattr(transformers, f"{begin}Config")(**settings)
        model = getattr(transformers, f"{begin}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            scale = 0.2 if "e_score" in name else 0.5
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=generator)
                value.copy_(drawn * scale + ("norm" in name))
    return model.to(dtype)


def save(model: Any, directory: Path, **options: Any) -> Path:
    """As `transformers` saves it; DeepSeekMoE with the settings that are published with it."""
    model.save_pretrained(directory, **options)
    if type(model).__name__ == "DeepseekForCausalLM":
        architecture = {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"}
        text = json.dumps(
            {**SETTINGS["deepseek"], **architecture, "torch_dtype": str(model.dtype)[6:]}
        )
        (directory / "config.json").write_text(text)
    return directory
