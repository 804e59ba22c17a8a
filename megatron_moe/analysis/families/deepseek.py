"""The first DeepSeekMoE (Dai et al., arXiv 2401.06066): softmax, best K; shared experts.

It has no class in `transformers` and is assembled from two others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.analysis.families.deepseek_v2 import group_limited, shared_width
from megatron_moe.analysis.family import Family, after_dense, register
from megatron_moe.convert.hf_files import rotary_base
from megatron_moe.errors import UsageError

_REQUIRED = {
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
}
"""Required values of these fields of the first DeepSeekMoE, where present."""


def deepseek_configuration(transformers: Any, values: dict[str, Any], source: str) -> Any:
    """Configuration of the first DeepSeekMoE (Dai et al., arXiv 2401.06066).

    Its published code, which comes with the weights and is never run here, is Llama's block with
    the experts that DeepSeek-V2 kept: softmax, top-k, no groups, shared experts. So this is
    DeepSeek-V2's configuration with Llama's attention heads.

    Args:
        transformers: the package.
        values: contents of ``source``.
        source: the file, for messages.

    Raises:
        UsageError: a field has another value than this model implies.
    """
    for key, only in _REQUIRED.items():
        if values.get(key, only) != only:
            raise UsageError(f"{key} in {source}", values[key], repr(only))
    rotary_base(values, source)  # raises if there is a scaling, which none of these models has
    # DeepSeek-V2 reads the head width from the size of the rotary part of its heads.
    width = values["hidden_size"] // values["num_attention_heads"]
    changes = {"model_type": "deepseek_v2", "qk_rope_head_dim": width, "topk_method": "greedy"}
    own = {k: v for k, v in values.items() if k not in ("auto_map", "architectures", "head_dim")}
    return transformers.DeepseekV2Config.from_dict({**own, **changes})


def deepseek_model_class(transformers: Any) -> Any:
    """Class of the first DeepSeekMoE: Llama's, with DeepSeek-V2's MoE in the later layers."""
    import importlib

    modeling = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")

    class DeepseekForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
        """Llama with MoE layers after the first dense ones."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers[config.first_k_dense_replace :]:
                layer.mlp = modeling.DeepseekV2Moe(config)
            self.post_init()

    return DeepseekForCausalLM


@dataclass(frozen=True, kw_only=True)
class _Assembled(Family):
    def configuration(
        self, transformers: Any, directory: Path, values: dict[str, Any], source: str
    ) -> Any:
        return deepseek_configuration(transformers, values, source)

    def model_class(self, transformers: Any) -> Any:
        return deepseek_model_class(transformers)


FAMILY = register(
    "deepseek",
    _Assembled(
        label="DeepSeekMoE",
        classes="",
        experts="n_routed_experts",
        rule=group_limited,
        moe_layers=after_dense,
        shared="shared_experts",
        shared_width=shared_width,
    ),
)
