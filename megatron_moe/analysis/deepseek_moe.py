"""The first DeepSeekMoE (Dai et al., arXiv 2401.06066), for which `transformers` has no class.

Its published code, which comes with the weights and is never run here, is Llama's block with the
experts that DeepSeek-V2 kept: softmax, the best K, no groups, shared experts. So it is put together
from these two classes.
"""

from __future__ import annotations

from typing import Any

from megatron_moe.errors import UsageError

_ONLY = {
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "moe_layer_freq": 1,
    "rope_scaling": None,
    "hidden_act": "silu",
}
"""Fields that must say this, if they are there."""


def configuration(transformers: Any, values: dict[str, Any], source: str) -> Any:
    """DeepSeek-V2's settings with Llama's heads in them.

    Args:
        transformers: the package.
        values: contents of ``source``.
        source: the file, for messages.

    Raises:
        UsageError: a field says what this model is not.
    """
    for key, only in _ONLY.items():
        if values.get(key, only) != only:
            raise UsageError(f"{key} in {source}", values[key], repr(only))
    # The head's width, which V2 takes from the rotary part of its heads.
    width = values["hidden_size"] // values["num_attention_heads"]
    changes = {"model_type": "deepseek_v2", "qk_rope_head_dim": width, "topk_method": "greedy"}
    own = {k: v for k, v in values.items() if k not in ("auto_map", "architectures", "head_dim")}
    return transformers.DeepseekV2Config.from_dict({**own, **changes})


def model_class(transformers: Any) -> Any:
    """A class like those of `transformers`."""
    import importlib

    modeling = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")

    class DeepseekForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
        """Llama, whose later layers have experts."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.model.layers[config.first_k_dense_replace :]:
                layer.mlp = modeling.DeepseekV2Moe(config)
            self.post_init()

    return DeepseekForCausalLM
