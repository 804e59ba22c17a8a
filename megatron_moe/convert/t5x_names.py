"""Names and orientation of OpenMoE's parameters in t5x (flaxformer) checkpoints.

Kernels are [in, out] there, the transpose of ours; experts [E, in, out] and the embedding [V, H]
are as ours. Source: the released checkpoints, and the script that made Hugging Face ones of them.
"""

from __future__ import annotations

_WHOLE = {
    "embedding.weight": ("token_embedder/embedding", False),
    "final_norm.weight": ("decoder/decoder_norm/scale", False),
    "output.weight": ("decoder/logits_dense/kernel", True),
}
_LAYER = {
    "attention_norm.weight": ("pre_self_attention_layer_norm/scale", False),
    "attention.query.weight": ("self_attention/query/kernel", True),
    "attention.key.weight": ("self_attention/key/kernel", True),
    "attention.value.weight": ("self_attention/value/kernel", True),
    "attention.output.weight": ("self_attention/out/kernel", True),
    "ffn_norm.weight": ("pre_mlp_layer_norm/scale", False),
    "ffn.gate.weight": ("mlp/wi_0/kernel", True),
    "ffn.up.weight": ("mlp/wi_1/kernel", True),
    "ffn.down.weight": ("mlp/wo/kernel", True),
    "moe.router.weight": ("mlp/router/router_weights/w/kernel", True),
    "moe.experts.gate": ("mlp/expert/wi_0/kernel", False),
    "moe.experts.up": ("mlp/expert/wi_1/kernel", False),
    "moe.experts.down": ("mlp/expert/wo/kernel", False),
    "shared_norm.weight": ("pre_extra_mlp_layer_norm/scale", False),
    "shared.gate.weight": ("extra_mlp/wi_0/kernel", True),
    "shared.up.weight": ("extra_mlp/wi_1/kernel", True),
    "shared.down.weight": ("extra_mlp/wo/kernel", True),
}


def t5x_name(name: str) -> tuple[str, bool]:
    """The path of a logical tensor below `target`, and whether it is transposed there.

    Raises:
        KeyError: there is no such tensor there.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    _, number, rest = name.split(".", 2)
    path, transposed = _LAYER[rest]
    return f"decoder/layers_{number}/{path}", transposed
