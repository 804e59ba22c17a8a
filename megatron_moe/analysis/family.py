"""What a family of MoE models is: tensor names, sizes, routing rule and experts.

Each file of `families/` describes one family and registers it under the `model_type` of its
`config.json`. Names are those of the published files, below `model.layers.i.`; rules are what the
classes of `transformers` compute. See docs/analyses/families.md for the recipe.

Shapes: T tokens, E experts, F width of an expert, H hidden.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_moe.analysis.model import ExpertPass
from megatron_moe.analysis.rule import RoutingRule


def stacked_expert(experts: Any, expert: int, x_TH: Tensor) -> ExpertPass:
    """One expert of a module with stacks [E, 2F, H] (gate above up) and [E, H, F]."""
    gate, up = (x_TH.float() @ experts.gate_up_proj[expert].float().T).chunk(2, dim=-1)
    activation = experts.act_fn(gate)
    inner = activation * up
    output = inner @ experts.down_proj[expert].float().T
    return ExpertPass(activation_TF=activation, inner_TF=inner, output_TH=output)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Args:
        label: display name.
        classes: prefix of its class names in `transformers`.
        experts: config field with the number of experts.
        width: config field with the width of an expert.
        rule: the routing rule of a configuration.
        moe_layers: indices of the MoE layers of a configuration.
        block: module of a layer that contains router and experts, in published files.
        router: name of the router within the block.
        router_bias: whether the router adds a bias to its logits.
        selection_bias: name within the block of the bias of the selection, for rules that are
            `biased`.
        matrices: names of the gate, up and down matrices of an expert.
        interleaved: the stacks are [E, H, 2F] with gate and up in alternating columns, and
            [E, F, H], each with a bias.
        shared: module of the shared experts, stored as a single wide one; empty for none.
        shared_width: width of the shared expert.
        shared_gate: whether a sigmoid gate weights the output of the shared expert.
        expert: computes one expert of the loaded module in fp32, from (experts module, expert,
            inputs [T, H]).
    """

    label: str
    classes: str
    experts: str = "num_experts"
    width: str = "moe_intermediate_size"
    rule: Callable[[Any], RoutingRule]
    moe_layers: Callable[[Any], list[int]]
    block: str = "mlp"
    router: str = "gate"
    router_bias: bool = False
    selection_bias: str = "gate.e_score_correction_bias"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False
    shared: str = ""
    shared_width: Callable[[Any], int] = lambda config: 0
    shared_gate: bool = False
    expert: Callable[[Any, int, Tensor], ExpertPass] = stacked_expert

    def configuration(
        self, transformers: Any, directory: Path, values: dict[str, Any], source: str
    ) -> Any:
        """The family's configuration object, from the contents of ``source`` in ``directory``."""
        config_class = getattr(transformers, f"{self.classes}Config")
        return config_class.from_pretrained(directory, local_files_only=True)

    def model_class(self, transformers: Any) -> Any:
        """The family's causal language model."""
        return getattr(transformers, f"{self.classes}ForCausalLM")


def every_layer(config: Any) -> list[int]:
    """All layers are MoE layers."""
    return list(range(config.num_hidden_layers))


def sparse_steps(config: Any) -> list[int]:
    """Every `decoder_sparse_step`-th layer, except `mlp_only_layers`."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    return [i for i in every_layer(config) if i not in dense and (i + 1) % step == 0]


def after_dense(config: Any) -> list[int]:
    """All layers after the first `first_k_dense_replace`."""
    return every_layer(config)[config.first_k_dense_replace :]


def plain_softmax(config: Any) -> RoutingRule:
    """Softmax over all experts, the best K; `norm_topk_prob` divides by their sum."""
    return RoutingRule(topk=config.num_experts_per_tok, normalised=bool(config.norm_topk_prob))


_FAMILIES: dict[str, Family] = {}


def register(model_type: str, family: Family) -> Family:
    """Enter a family under the `model_type` of its configurations.

    Raises:
        ValueError: the name is taken.
    """
    if model_type in _FAMILIES:
        raise ValueError(f"two families have the model_type {model_type!r}")
    _FAMILIES[model_type] = family
    return family


@cache
def all_families() -> Mapping[str, Family]:
    """Every family by `model_type`, in the order of these names."""
    folder = importlib.import_module("megatron_moe.analysis.families")
    for name in sorted(found.name for found in pkgutil.iter_modules(folder.__path__)):
        importlib.import_module(f"{folder.__name__}.{name}")
    return dict(sorted(_FAMILIES.items()))
