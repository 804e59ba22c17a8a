"""Names and shapes of the Hugging Face layouts of OpenMoE.

All matrices but the experts' are stored [out, in] there as in our logical model. Experts come in
two public layouts: `stacked` [E, in, out] as ours, and `unstacked`, one [out, in] matrix each.
Source: the released checkpoints and the script that made them from t5x ones.
"""

from __future__ import annotations

import re
from typing import Literal

ExpertLayout = Literal["stacked", "unstacked"]

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
    "shared_norm.weight": "pre_extra_mlp_layernorm.weight",
    "shared.gate.weight": "extra_mlp.gate_proj.weight",
    "shared.up.weight": "extra_mlp.up_proj.weight",
    "shared.down.weight": "extra_mlp.down_proj.weight",
}
_ROUTER = {"stacked": "mlp.gate_weight", "unstacked": "mlp.gate.weight"}
_STACKED = {"gate": "wi_gate", "up": "wi_up", "down": "wo"}

EXPERT = re.compile(r"layers\.(\d+)\.moe\.experts\.(gate|up|down)")
"""A logical name of stacked experts."""


def hf_name(name: str, layout: ExpertLayout) -> str:
    """The name of a logical tensor, or of the stack of experts, under a layout.

    Raises:
        KeyError: there is no such tensor there.
    """
    if name in _WHOLE:
        return _WHOLE[name]
    _, number, rest = name.split(".", 2)
    prefix = f"model.layers.{number}"
    if rest == "moe.router.weight":
        return f"{prefix}.{_ROUTER[layout]}"
    found = EXPERT.fullmatch(name)
    if found:
        return f"{prefix}.mlp.experts.{_STACKED[found[2]]}"
    return f"{prefix}.{_LAYER[rest]}"


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's matrix in the `unstacked` layout."""
    found = EXPERT.fullmatch(name)
    if not found:
        raise KeyError(name)
    return f"model.layers.{found[1]}.mlp.experts.{expert}.{found[2]}_proj.weight"


def layout_of(names: set[str]) -> ExpertLayout:
    """Which layout a set of names is in."""
    return "unstacked" if any(".mlp.experts.0." in name for name in names) else "stacked"
