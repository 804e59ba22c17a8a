"""Routers and experts of other programs' MoE models, under one set of names for all families.

Tensors are read one at a time when needed, so a model may be larger than memory. Files are local
and only read; code that comes with them is never run.

Shapes: E experts, F width of an expert, H hidden. Matrices are [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.analysis.foreign_config import CONFIG, ForeignSettings, read_settings
from megatron_moe.analysis.model import ExpertWeights, LayerWeights
from megatron_moe.convert.hf_files import open_files
from megatron_moe.convert.inspection import setting_differences, tensor_differences
from megatron_moe.convert.model import LazyTensor
from megatron_moe.errors import Corrupt


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """An opened checkpoint directory.

    Args:
        path: the directory.
        settings: family, sizes and routing rule.
        layers: the MoE layers, in order.
        dense: feed-forward weights of the layers without experts, by layer.
        tensors: all tensors by their name in the files.
    """

    path: Path
    settings: ForeignSettings
    layers: tuple[LayerWeights, ...]
    dense: Mapping[int, ExpertWeights]
    tensors: Mapping[str, LazyTensor]

    def is_outside(self, name: str) -> bool:
        """Whether a tensor belongs to a layer behind the last one of the network.

        DeepSeek-V3's files have such layers for multi-token prediction (arXiv 2412.19437, 2.2):
        training uses them, a forward pass does not.
        """
        found = _LAYER.match(name)
        return found is not None and int(found[1]) >= self.settings.config.num_hidden_layers


def open_foreign(path: str | Path) -> ForeignModel:
    """Open a checkpoint directory of one of the families; names and shapes are checked.

    Raises:
        UsageError: `transformers` is not installed, the family is unknown, a file is missing or
            damaged, or the tensors are not those of the configuration.
    """
    path = Path(path)
    settings = read_settings(path)
    tensors = open_files(path)
    check_not_quantized(path, tensors)
    reader = _Reader(path, settings, tensors)
    return ForeignModel(
        path=path,
        settings=settings,
        layers=tuple(reader.layer(index) for index in settings.moe_layers),
        dense={i: reader.dense(i) for i in _dense_layers(settings)},
        tensors=tensors,
    )


def _dense_layers(settings: ForeignSettings) -> list[int]:
    return [i for i in range(settings.config.num_hidden_layers) if i not in settings.moe_layers]


_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SCALES = (
    *(".weight_scale", ".weight_scale_inv", ".qweight", ".scales", ".absmax", ".SCB"),
    *("_proj_blocks", "_proj_scales"),
)
"""Ends of the names of tensors that only quantized weights have."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_not_quantized(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Check that all matrices are plain floating-point numbers.

    Raises:
        UsageError: one is quantized.
    """
    for name, tensor in tensors.items():
        is_matrix = name.endswith(".weight") and tensor.dtype not in _FLOATS
        if is_matrix or name.endswith(_SCALES):
            found = f"{name} of {str(tensor.dtype).removeprefix('torch.')}"
            expected = "in fp32, bf16 or fp16, not quantized"
            fix = "convert them to bf16 first"
            raise Corrupt(f"weights in {path}", found, expected, fix)


_DENSE_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Reader:
    path: Path
    settings: ForeignSettings
    tensors: dict[str, LazyTensor]

    @property
    def hidden(self) -> int:
        return int(self.settings.config.hidden_size)

    def layer(self, index: int) -> LayerWeights:
        family, experts = self.settings.family, self.settings.num_experts
        width = getattr(self.settings.config, family.width)
        prefix = f"model.layers.{index}."
        # Newer `transformers` name the module `mlp` in all families and save it under that name.
        published = f"{prefix}{family.block}.{family.router}.weight" in self.tensors
        block = f"{prefix}{family.block if published else 'mlp'}."
        router, shared = f"{block}{family.router}.", f"{block}{family.shared}"
        is_biased = self.settings.rule.biased
        return LayerWeights(
            layer=index,
            router=self._get(f"{router}weight", experts, self.hidden),
            router_bias=self._get(f"{router}bias", experts) if family.router_bias else None,
            bias=self._get(f"{block}{family.selection_bias}", experts) if is_biased else None,
            experts=self._experts(f"{block}experts", experts, width),
            shared=self._shared(shared) if family.shared else None,
            shared_gate=(
                self._get(f"{shared}_gate.weight", 1, self.hidden) if family.shared_gate else None
            ),
        )

    def _experts(self, prefix: str, count: int, width: int) -> tuple[ExpertWeights, ...]:
        """From a matrix per expert, or from the stacks [E, 2F, H] and [E, H, F] of newer files."""
        hidden = self.hidden
        if self.settings.family.interleaved:
            return self._interleaved(prefix, count, width)
        if f"{prefix}.gate_up_proj" in self.tensors:
            both = self._get(f"{prefix}.gate_up_proj", count, 2 * width, hidden)
            down = self._get(f"{prefix}.down_proj", count, hidden, width)
            cuts = ((both, 0, width), (both, width, width), (down, 0, hidden))
            return tuple(
                ExpertWeights(*(_part(s, e, *rows) for s, *rows in cuts)) for e in range(count)
            )
        return tuple(
            self._expert(f"{prefix}.{e}", self.settings.family.matrices, width)
            for e in range(count)
        )

    def _interleaved(self, prefix: str, count: int, width: int) -> tuple[ExpertWeights, ...]:
        """From the stacks of GPT-OSS, [E, H, 2F] and [E, F, H], and a bias of each output."""
        hidden = self.hidden
        both = self._get(f"{prefix}.gate_up_proj", count, hidden, 2 * width)
        both_bias = self._get(f"{prefix}.gate_up_proj_bias", count, 2 * width)
        down = self._get(f"{prefix}.down_proj", count, width, hidden)
        down_bias = self._get(f"{prefix}.down_proj_bias", count, hidden)
        return tuple(
            ExpertWeights(
                _columns(both, e, slice(0, None, 2), width),
                _columns(both, e, slice(1, None, 2), width),
                _columns(down, e, slice(None), hidden),
                gate_bias=_entries(both_bias, e, slice(0, None, 2), width),
                up_bias=_entries(both_bias, e, slice(1, None, 2), width),
                down_bias=_entries(down_bias, e, slice(None), hidden),
            )
            for e in range(count)
        )

    def dense(self, index: int) -> ExpertWeights:
        """The feed-forward network of a layer without experts, named alike in all families."""
        width = int(self.settings.config.intermediate_size)
        return self._expert(f"model.layers.{index}.mlp", _DENSE_NAMES, width)

    def _shared(self, prefix: str) -> ExpertWeights:
        width = self.settings.family.shared_width(self.settings.config)
        return self._expert(prefix, _DENSE_NAMES, width)

    def _expert(self, prefix: str, names: tuple[str, str, str], width: int) -> ExpertWeights:
        gate, up, down = (f"{prefix}.{name}.weight" for name in names)
        hidden = self.hidden
        return ExpertWeights(
            self._get(gate, width, hidden),
            self._get(up, width, hidden),
            self._get(down, hidden, width),
        )

    def _get(self, name: str, *shape: int) -> LazyTensor:
        if name not in self.tensors:
            expected = "a checkpoint with all tensors of the model"
            raise Corrupt(str(self.path), f"one without {name}", expected)
        found = self.tensors[name]
        if found.shape != shape:
            what = f"shape of {name} in {self.path}"
            raise Corrupt(what, list(found.shape), f"{list(shape)} as in {CONFIG}")
        return found


def _part(stack: LazyTensor, expert: int, first: int, rows: int) -> LazyTensor:
    """Rows [first, first + rows) of one matrix of a stack [E, out, in]."""

    def read(start: int, stop: int) -> Tensor:
        return stack.rows(expert, expert + 1)[0][first + start : first + stop]

    return LazyTensor((rows, stack.shape[2]), stack.dtype, read)


def _columns(stack: LazyTensor, expert: int, columns: slice, count: int) -> LazyTensor:
    """Some columns of one matrix of a stack [E, in, out], as [out, in]."""

    def read(start: int, stop: int) -> Tensor:
        return stack.rows(expert, expert + 1)[0][:, columns].T[start:stop]

    return LazyTensor((count, stack.shape[1]), stack.dtype, read)


def _entries(stack: LazyTensor, expert: int, entries: slice, count: int) -> LazyTensor:
    """Some entries of one vector of a stack [E, out]."""

    def read(start: int, stop: int) -> Tensor:
        return stack.rows(expert, expert + 1)[0][entries][start:stop]

    return LazyTensor((count,), stack.dtype, read)


def foreign_overview(model: ForeignModel) -> dict[str, Any]:
    """Family, routing rule, sizes and MoE layers, as JSON values. Reads no tensor.

    `parameters` counts the elements of all files; `outside` those of layers that the files have
    besides the network (`ForeignModel.is_outside`); `activated` omits these and the routed experts
    that a token does not use.
    """
    settings = model.settings
    config, rule, family = settings.config, settings.rule, settings.family
    total = sum(prod(tensor.shape) for tensor in model.tensors.values())
    outside = sum(prod(t.shape) for name, t in model.tensors.items() if model.is_outside(name))
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
        "routing": describe_routing(settings),
        "parameters": total,
        "outside": outside,
        "activated": total - outside - idle,
        "bytes": sum(tensor.bytes for tensor in model.tensors.values()),
        "moe_layers": [_layer_overview(layer) for layer in model.layers],
    }


def describe_routing(settings: ForeignSettings) -> str:
    """The routing rule in one line."""
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


def _layer_overview(layer: LayerWeights) -> dict[str, Any]:
    sizes = {_size(expert) for expert in layer.experts}
    return {
        "layer": layer.layer,
        "router": list(layer.router.shape),
        "dtype": str(layer.router.dtype).removeprefix("torch."),
        "expert_elements": sizes.pop(),
        "shared_elements": _size(layer.shared) if layer.shared else 0,
    }


def _size(expert: ExpertWeights) -> int:
    biases = (expert.gate_bias, expert.up_bias, expert.down_bias)
    parts = (expert.gate, expert.up, expert.down, *(bias for bias in biases if bias is not None))
    return sum(prod(part.shape) for part in parts)
