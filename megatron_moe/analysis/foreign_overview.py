"""What another program's mixture is, in numbers: for people and, as JSON values, for programs."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from megatron_moe.analysis.foreign import ExpertWeights, ForeignModel, LayerWeights
from megatron_moe.analysis.foreign_config import Settings
from megatron_moe.convert.inspection import setting_differences, tensor_differences


def foreign_overview(model: ForeignModel) -> dict[str, Any]:
    """Family, routing rule, sizes and the layers with experts. Reads no tensor.

    `parameters` counts the elements of all files; `activated` leaves out the experts that a token
    does not pass.
    """
    settings = model.settings
    config, rule, family = settings.config, settings.rule, settings.family
    total = sum(prod(tensor.shape) for tensor in model.tensors.values())
    idle = sum(_size(expert) for layer in model.layers for expert in layer.experts[rule.topk :])
    return {
        "path": str(model.path),
        "family": family.label,
        "model_type": settings.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "experts": settings.num_experts,
        "top_k": rule.topk,
        "expert_width": getattr(config, family.width),
        "shared_width": family.shared_width(config),
        "routing": routing_in_words(settings),
        "parameters": total,
        "activated": total - idle,
        "bytes": sum(tensor.bytes for tensor in model.tensors.values()),
        "moe_layers": [_layer(layer) for layer in model.layers],
    }


def routing_in_words(settings: Settings) -> str:
    """The rule in one line."""
    rule = settings.rule
    words = [f"{rule.score} over {settings.num_experts}"]
    if rule.biased:
        words.append("choice by score plus bias")
    if rule.groups > 1:
        words.append(f"best {rule.kept_groups} of {rule.groups} groups by their {rule.group_score}")
    words.append(f"best {rule.topk}")
    words.append("weights sum to 1" if rule.normalised else "weights are the scores")
    if rule.scale != 1.0:
        words.append(f"times {rule.scale:g}")
    if settings.family.shared_gate:
        words.append("shared expert behind a sigmoid gate")
    return ", ".join(words)


def foreign_differences(first: ForeignModel, second: ForeignModel) -> Iterator[str]:
    """A line for every setting and every tensor in which two models differ."""
    yield from setting_differences(
        first.settings.config.to_dict(), second.settings.config.to_dict()
    )
    yield from tensor_differences(first.tensors, second.tensors)


def _layer(layer: LayerWeights) -> dict[str, Any]:
    sizes = {_size(expert) for expert in layer.experts}
    return {
        "layer": layer.layer,
        "router": list(layer.router.shape),
        "dtype": str(layer.router.dtype).removeprefix("torch."),
        "expert_elements": sizes.pop(),
        "shared_elements": _size(layer.shared) if layer.shared else 0,
    }


def _size(expert: ExpertWeights) -> int:
    return sum(prod(matrix.shape) for matrix in (expert.gate, expert.up, expert.down))
