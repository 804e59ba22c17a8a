"""The parts of every pipeline stage in order: memory, arithmetic and traffic of each, side by side.

The one place that knows which units a stage consists of, and what recomputation repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_moe.config import RunConfig
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning import traffic, work
from megatron_moe.planning.tensor_sizes import TensorSizes, layers_of_stage
from megatron_moe.planning.traffic import Transfer, UnitTraffic
from megatron_moe.planning.work import Precision, UnitWork, Work


@dataclass(frozen=True)
class Part:
    """A unit of a layer: its work and traffic for one micro-batch."""

    name: str
    work: UnitWork
    traffic: UnitTraffic
    recomputed: bool = False
    """Whether the forward pass runs again before the backward pass."""

    @property
    def backward(self) -> Work:
        """The backward pass with what it recomputes."""
        return self.work.backward + self.work.forward if self.recomputed else self.work.backward

    @property
    def backward_transfers(self) -> tuple[Transfer, ...]:
        """Those of the backward pass with what it recomputes."""
        again = self.traffic.forward if self.recomputed else ()
        return self.traffic.backward + again

    @property
    def flops(self) -> int:
        """Arithmetic of both passes."""
        return self.work.forward.flops + self.backward.flops


ChunkPlan = Mapping[Part, int]
"""The parts of a model chunk, and how many of each there are."""


def chunk_plans(
    config: RunConfig, layout: Layout, sizes: TensorSizes, stage: int
) -> tuple[ChunkPlan, ...]:
    """The chunks of a stage."""
    found = []
    for index, pattern in enumerate(layers_of_stage(config, layout, stage)):
        parts: Counter[Part] = Counter()
        if stage == 0 and index == 0:
            parts[Part("embedding", work.embedding(sizes), traffic.embedding(sizes))] += 1
        layers = layout.layers_of_chunk(stage, index)
        for number, is_moe in enumerate(pattern):
            precision = precision_of(config, layers[number])
            whole = _layer_recomputed(config, number)
            parts.update(_layer(config, sizes, is_moe, whole, precision))
        if stage == layout.pp - 1 and index == layout.num_chunks - 1:
            parts[Part("logits and loss", work.head(sizes), traffic.head(sizes))] += 1
        found.append(parts)
    return tuple(found)


def precision_of(config: RunConfig, layer: int) -> Precision:
    """Of the matrix products of a layer, counted from 0."""
    fp8 = config.precision
    if fp8.fp8_format is not None and fp8.in_fp8(layer, config.model.num_layers):
        return "fp8"
    return "bf16" if config.train.bf16 else "fp32"


def _layer_recomputed(config: RunConfig, number: int) -> bool:
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return False
    return parallel.recompute_method == "uniform" or number < (parallel.recompute_num_layers or 0)


def _layer(
    config: RunConfig, sizes: TensorSizes, is_moe: bool, whole: bool, precision: Precision
) -> list[Part]:
    parallel = config.parallel
    modules: tuple[str, ...] = ()
    if parallel.recompute_granularity == "selective":
        modules = parallel.recompute_modules
    pair = traffic.linear_pair(sizes)
    parts = [Part("attention", work.attention(sizes, precision), pair, whole)]
    if "core_attn" in modules:
        core = Work(attention_flops=parts[0].work.forward.attention_flops, kernels=4)
        parts.append(Part("core attention again", UnitWork(Work(), core), UnitTraffic((), ())))
    if not is_moe:
        dense = work.feed_forward(sizes, sizes.ffn, precision)
        return [*parts, Part("feed-forward", dense, pair, whole or "mlp" in modules)]
    routed = work.experts(sizes, precision)
    again = whole or "moe" in modules
    parts.append(Part("experts", routed, traffic.expert_layer(sizes), again))
    if sizes.shared:
        again = whole or bool({"mlp", "shared_experts"} & {*modules})
        shared = work.feed_forward(sizes, sizes.shared, precision)
        parts.append(Part("shared expert", shared, pair, again))
    return parts
