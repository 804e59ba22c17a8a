"""Published runs of Megatron-Core, to hold predictions against: `docs/scaling.md` has the table.

The runs are described with our flags. Dropless layers are planned as buffers with exactly as many
rows as choices, which is their arithmetic when experts are evenly loaded. Megatron-Core computes
attention with cuDNN, ours is FlashAttention-2: `CLUSTER` has the figure for theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.cluster import load_cluster
from megatron_moe.planning.layout_plan import LayoutPlan, evaluate

CLUSTER = {"attention_efficiency": 0.6}
"""Changes to the H100 profile. The share of attention is between FlashAttention-2's 35% and
FlashAttention-3's 75% of the peak (arXiv 2407.08608)."""
_ALL = (
    "--bf16 --seq-length 4096 --max-position-embeddings 4096 --moe-capacity-rule megatron "
    "--moe-expert-capacity-factor 1 --ffn-variant swiglu --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather --micro-batch-size 1 --global-batch-size 256 "
    "--kv-channels 128 --group-query-attention "
)
_MIXTRAL = "--num-experts 8 --moe-shared-expert-intermediate-size None --vocab-size 32000 "
_README = "Megatron-Core 0.8's MoE README: reference mapping"


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run whose throughput is published."""

    name: str
    gpus: int
    flags: str
    mfu: float
    """Published, of 989.4 TFLOP/s."""
    source: str

    def planned(self) -> LayoutPlan:
        """The same layout as predicted."""
        config = parse_args(self.flags.split()).config
        vocab = config.data.vocab_size or 0
        layout = resolve_layout(config, self.gpus, vocab)
        return evaluate(config, layout, vocab, load_cluster("h100", CLUSTER))


RUNS = (
    PublishedRun(
        name="Mixtral 8x7B, TP1 PP4 x 8 EP8",
        gpus=64,
        flags=_ALL
        + _MIXTRAL
        + "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
        "--num-query-groups 8 --moe-layer-freq [1]*32 --pipeline-model-parallel-size 4 "
        "--num-virtual-stages-per-pipeline-rank 8 --expert-model-parallel-size 8",
        mfu=468 / 989.4,
        source=f"{_README}; 468 TFLOP/s in Megatron-Core's MoE documentation",
    ),
    PublishedRun(
        name="Mixtral 8x22B, TP4 PP8 x 7 EP2",
        gpus=128,
        flags=_ALL
        + _MIXTRAL
        + "--num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48 "
        "--num-query-groups 8 --moe-layer-freq [1]*56 --pipeline-model-parallel-size 8 "
        "--num-virtual-stages-per-pipeline-rank 7 --expert-model-parallel-size 2 "
        "--tensor-model-parallel-size 4 --sequence-parallel",
        mfu=0.493,
        source=f"{_README}; 49.3% is the best mapping of arXiv 2504.14960, another one",
    ),
    PublishedRun(
        name="Qwen2-57B-A14B, TP2 PP4 x 7 EP4 ETP1",
        gpus=64,
        flags=_ALL + "--num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 2560 "
        "--moe-shared-expert-intermediate-size 20480 --moe-shared-expert-placement parallel "
        "--num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --num-attention-heads 28 "
        "--num-query-groups 4 --moe-layer-freq [1]*28 --vocab-size 151936 "
        "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 7 "
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 "
        "--expert-tensor-parallel-size 1",
        mfu=0.390,
        source="arXiv 2504.14960: 39.0% with its best mapping; this one is ours to compare with",
    ),
)
