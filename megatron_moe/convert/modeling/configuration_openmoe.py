"""Configuration of OpenMoE for `transformers`, read from `config.json` beside this file.

The fields are those of the released checkpoints, and a few that these do not need: other widths,
other MoE layers, another attention scale. Files that were published under older field names are
read as well. Source: Xue et al., OpenMoE (arXiv 2402.01739), and the published `config.json` files.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256384,  # V, padded
    "hidden_size": 2048,  # H, width of the residual stream
    "intermediate_size": 8192,  # F, width of a dense feed-forward layer
    "num_hidden_layers": 24,
    "num_attention_heads": 24,  # query heads
    "num_key_value_heads": None,  # each shared by equally many query heads; None: as many as those
    "head_dim": 128,  # D, width of a head
    # swiglu (released): [a|b] = x W_gate, a silu(b) (x W_up); silu: silu(x W_gate) (x W_up).
    "hidden_act": "swiglu",
    "max_position_embeddings": 2048,  # longest row
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,  # base of the rotary position embedding
    "qk_layernorm": False,  # norms of queries and keys, before the rotary embedding
    "qk_layernorm_scope": "head",  # over each head, with one scale; projection: over all heads
    "softmax_scale": 1.0,  # factor of attention logits; None: 1/sqrt(D)
    "tie_word_embeddings": False,  # the embedding is the output matrix as well
    "scale_tied_logits": True,  # its logits are divided by sqrt(H)
    "num_experts": 32,  # E
    "moe_layer_interval": 6,  # layer i, from 0, has experts if (i + 1) % interval == 0
    "moe_layers": None,  # the layers with experts, where they follow no interval
    "router_topk": 2,  # experts K of a token
    "moe_intermediate_size": None,  # width of an expert; None: F
    "shared_expert_intermediate_size": None,  # width of the shared expert; None: F, 0: no expert
    # sequential (released): after the experts, under its own norm; parallel: beside them.
    "shared_expert_placement": "sequential",
    "expert_layout": None,  # stacked or unstacked tensors; None: as `architectures` implies
    # dropless: each token is processed by all its experts, so a row depends on nothing beside it.
    # eval, train: experts have that capacity; for whole rows, without padding and without a cache.
    "moe_capacity": "dropless",
    "router_capacity_factor_train": 1.25,
    "router_capacity_factor_eval": 2.0,
    "router_min_capacity": 4,
    "router_aux_loss_factor": 0.01,  # weight of the load-balancing loss
    "router_z_loss_factor": 1e-4,  # weight of the z-loss of router logits
    "z_loss_factor": 1e-4,  # weight of the z-loss of logits
    "output_router_logits": False,  # return router logits, and add all three to the loss
    "dropout_rate": 0.0,  # on the embedding and on each residual branch
    "attention_dropout": 0.0,
    "initializer_range": 0.02,  # standard deviation of new matrices
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "megatron_moe": None,  # settings of the training run; those of the capacity are read
}
"""Every field that the network reads, with the released 8B model's value."""
OLDER_NAMES = {
    "topk": "router_topk",
    "capacity_factor_train": "router_capacity_factor_train",
    "capacity_factor_eval": "router_capacity_factor_eval",
    "min_capacity": "router_min_capacity",
    "noisy_policy": "router_noisy_policy",
    "drop_tks": "router_drop_tks",
    "gated": "mlp_gated",
}
"""Present name of each field that the first published files name otherwise."""
KNOWN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swiglu", "silu"),
    "qk_layernorm_scope": ("head", "projection"),
    "shared_expert_placement": ("sequential", "parallel"),
    "expert_layout": ("stacked", "unstacked"),
    "moe_capacity": ("dropless", "eval", "train"),
    "mlp_gated": (True,),
    "attention_bias": (False,),
    "router_noisy_policy": (None,),
}
"""Implemented values; an absent field has the first."""


class OpenMoeConfig(PretrainedConfig):
    """Sizes and variant of an OpenMoE network.

    Args:
        values: fields of `DEFAULTS`, whose values apply to the others, by present or older name;
            `rope_scaling` or `rope_parameters` as releases of `transformers` write them; further
            fields are kept.

    Raises:
        ValueError: a value that the network does not implement.
    """

    model_type = "openmoe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **values: Any) -> None:
        values = {OLDER_NAMES.get(name, name): value for name, value in values.items()}
        theta = _rope_theta(values)
        own = {name: values.pop(name, default) for name, default in DEFAULTS.items()}
        super().__init__(**values)
        own["rope_theta"] = theta
        if own["num_key_value_heads"] is None:
            own["num_key_value_heads"] = own["num_attention_heads"]
        if own["expert_layout"] is None:
            unstacked = self.architectures == ["HFOpenMoeForCausalLM"]
            own["expert_layout"] = "unstacked" if unstacked else "stacked"
        # After the base class, which has defaults of its own for some of these.
        for name, value in own.items():
            setattr(self, name, value)
        self.check()

    def check(self) -> None:
        """Check the fields of `KNOWN`; `from_pretrained` sets values after the constructor.

        Raises:
            ValueError: a value that the network does not implement.
        """
        for name, known in KNOWN.items():
            found = getattr(self, name, known[0])
            if found not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"{name} in config.json must be {expected} (got {found!r})")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of `config.json`, with this class's type.

        Released files say `llama`, whose fields they extend; `transformers` would warn about it.
        """
        values, rest = super().get_config_dict(*args, **kwargs)
        if values.get("model_type") == "llama":
            values = {**values, "model_type": cls.model_type}
        return values, rest

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is an MoE layer."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return bool((layer + 1) % self.moe_layer_interval == 0)

    def run_setting(self, name: str, default: Any) -> Any:
        """A setting of the training run's experts, or ``default`` in a file without it."""
        return ((self.megatron_moe or {}).get("moe") or {}).get(name, default)


def _rope_theta(values: dict[str, Any]) -> float:
    """The rotary base, from the newer field if it is present; removes both other fields.

    Raises:
        ValueError: a scaling, which no OpenMoE model has.
    """
    scaling = values.pop("rope_scaling", None) or {}
    parameters = values.pop("rope_parameters", None) or {}
    for each in (scaling, parameters):
        kind = each.get("rope_type", each.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope_type in config.json must be 'default' (got {kind!r})")
    theta = values.get("rope_theta", DEFAULTS["rope_theta"])
    return float(parameters.get("rope_theta", theta))
