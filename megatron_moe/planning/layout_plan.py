"""One layout on one cluster: whether it fits, how long a step takes, what it sends and costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.model.counting import TokenFlops, flops_per_token
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.placement import LinkBytes, place_of, sent_bytes
from megatron_moe.planning.stage_plan import chunk_plans
from megatron_moe.planning.step_memory import StageMemory, step_memory
from megatron_moe.planning.step_time import StepTime, step_time
from megatron_moe.planning.tensor_sizes import TensorSizes
from megatron_moe.planning.traffic import GroupName, Operation, Transfer, reductions, sends


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """What is predicted of a layout."""

    config: RunConfig
    layout: Layout
    vocab_size: int
    cluster: Cluster
    stages: tuple[StageMemory, ...]
    time: StepTime
    flops: TokenFlops

    @property
    def peak_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.peak.total for stage in self.stages)

    @property
    def tokens_per_step(self) -> int:
        """Positions of a global batch."""
        return self.layout.global_batch_size * self.layout.seq_length

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Arithmetic that the model asks for, of the bf16 (or fp32) peak."""
        return self.flops.training * self.tokens_per_second / self._peak

    @property
    def hfu(self) -> float:
        """Arithmetic that is done, of the same peak: every row of the buffers, filled or not, and
        what is recomputed.
        """
        ranks = self.layout.world_size // self.layout.pp
        return ranks * sum(self.time.flops) / self.time.total / self._peak

    @property
    def tflops_per_gpu(self) -> float:
        """Arithmetic that the model asks for, in TFLOP/s of one GPU."""
        per_second = self.flops.training * self.tokens_per_second
        return per_second / self.layout.world_size / 1e12

    @property
    def _peak(self) -> float:
        precision = "bf16" if self.config.train.bf16 else "fp32"
        return self.cluster.peak_flops(precision) * self.layout.world_size

    def days(self, tokens: float) -> float:
        """Of training on so many tokens, without evaluations, saves and restarts."""
        return tokens / self.tokens_per_second / 86400

    def gpu_hours(self, tokens: float) -> float:
        """All GPUs together."""
        return self.days(tokens) * 24 * self.layout.world_size

    def megawatt_hours(self, tokens: float) -> float:
        """At the nodes' largest power: an upper bound, without cooling."""
        node_hours = self.gpu_hours(tokens) / self.cluster.gpus_per_node
        return node_hours * self.cluster.node_kilowatts / 1000

    def sent(self, stage: int) -> dict[tuple[Operation, GroupName], LinkBytes]:
        """Bytes that a rank of a stage sends in a step over each kind of link."""
        totals: Counter[tuple[Operation, GroupName, str]] = Counter()
        for transfer, count in step_transfers(self.config, self.layout, self.vocab_size, stage):
            place = place_of(self.layout, self.cluster, transfer.group)
            links = sent_bytes(transfer, place)
            totals[transfer.operation, transfer.group, "intra"] += round(count * links.intra)
            totals[transfer.operation, transfer.group, "inter"] += round(count * links.inter)
        kinds = dict.fromkeys((operation, group) for operation, group, _ in totals)
        return {
            (operation, group): LinkBytes(
                totals[operation, group, "intra"], totals[operation, group, "inter"]
            )
            for operation, group in kinds
        }

    def to_dict(self, tokens: float | None = None) -> dict[str, Any]:
        """For JSON."""
        layout, time, parallel = self.layout, self.time, self.config.parallel
        values: dict[str, Any] = {
            "layout": {
                name: getattr(layout, name)
                for name in (
                    "chunk_layers",
                    *("tp", "sequence_parallel", "pp", "num_chunks", "ep", "etp", "dp", "edp"),
                    *("micro_batch_size", "num_microbatches", "global_batch_size"),
                )
            },
            "recompute": recomputation(self.config),
            "capacity_factor": self.config.moe.moe_expert_capacity_factor,
            "distributed_optimizer": parallel.use_distributed_optimizer,
            "memory": [{**stage.peak.to_dict(), "at": stage.moment.name} for stage in self.stages],
            "seconds": {
                "step": time.total,
                "pipeline": time.pipeline,
                "reduction": time.reduction,
                "optimizer": time.optimizer,
            },
            "bubble": time.bubble,
            "imbalance": time.imbalance,
            "flops_of_a_rank": list(time.flops),
            "sent_by_a_rank": [
                {f"{o} {g}": {"intra": b.intra, "inter": b.inter} for (o, g), b in sent.items()}
                for sent in map(self.sent, range(layout.pp))
            ],
            "tokens_per_second": self.tokens_per_second,
            "tflops_per_gpu": self.tflops_per_gpu,
            "mfu": self.mfu,
            "mfu_of_arithmetic_done": self.hfu,
        }
        if tokens is not None:
            values["budget"] = {
                "tokens": tokens,
                "days": self.days(tokens),
                "gpu_hours": self.gpu_hours(tokens),
                "megawatt_hours": self.megawatt_hours(tokens),
            }
        return values


def evaluate(
    config: RunConfig,
    layout: Layout,
    vocab_size: int,
    cluster: Cluster,
    stages: tuple[StageMemory, ...] | None = None,
) -> LayoutPlan:
    """Predict everything of one layout; ``stages`` if its memory is known already."""
    stages = step_memory(config, layout, vocab_size) if stages is None else stages
    return LayoutPlan(
        config=config,
        layout=layout,
        vocab_size=vocab_size,
        cluster=cluster,
        stages=stages,
        time=step_time(config, layout, vocab_size, cluster, tuple(s.state for s in stages)),
        flops=flops_per_token(config.model, config.moe, vocab_size, layout.seq_length),
    )


def step_transfers(
    config: RunConfig, layout: Layout, vocab_size: int, stage: int
) -> list[tuple[Transfer, int]]:
    """Every collective of a rank of a stage in a step, and how often."""
    sizes = TensorSizes.of(config, layout, vocab_size)
    found: list[tuple[Transfer, int]] = []
    for chunk in chunk_plans(config, layout, sizes, stage):
        for part, parts in chunk.items():
            both = (*part.traffic.forward, *part.backward_transfers)
            found += [(transfer, parts * layout.num_microbatches) for transfer in both]
    count = sum(sends(sizes, layout, stage))
    if count:
        found.append((Transfer("send", "pp", sizes.residual * sizes.bytes), count))
    found += [(transfer, 1) for transfer in reductions(config, layout, vocab_size, stage)]
    return found


def recomputation(config: RunConfig) -> str:
    """In a word or two: none, full, or the modules."""
    parallel = config.parallel
    if parallel.recompute_granularity is None:
        return "none"
    if parallel.recompute_granularity == "full":
        return f"full {parallel.recompute_method} {parallel.recompute_num_layers}"
    return "+".join(parallel.recompute_modules)
