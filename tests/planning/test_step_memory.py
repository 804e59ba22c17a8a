"""Predicted peaks of a step against what real runs allocate, stage by stage.

The runs are real: gloo ranks, Megatron-Core's schedules and optimizers. `LiveMemory` counts every
storage of the second step.
"""

from __future__ import annotations

import pytest

from megatron_moe.planning.step_memory import step_memory
from tests.planning.ranks import VOCAB, measured_memory, planned_config
from tests.support.pool import Pool

TOLERANCE = 0.05
TP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
EP = "--expert-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
SHARDED = "--use-distributed-optimizer"

QUICK = [
    (1, "--bf16"),
    (1, f"{FULL} uniform --recompute-num-layers 1"),
    (1, f"{SELECTIVE} moe mlp"),
    (1, "--optimizer adafactor --num-layers 2 --moe-layer-freq [0,1]"),
    (1, "--optimizer muon --num-layers 2 --moe-layer-freq [0,1]"),
    (2, f"{EP} {SHARDED} --bf16"),
    (2, f"{TP} --expert-tensor-parallel-size 1"),
    (2, f"{PP} --micro-batch-size 1"),
]
"""Ranks and flags."""
GROUPED = "--moe-expert-impl grouped --moe-expert-capacity-factor None"
OVERLAPPED = f"{EP} --moe-a2a-overlap-chunks 4"
MORE = [
    (1, ""),
    (2, f"{OVERLAPPED} --moe-ffn-hidden-size 512"),
    (2, f"{OVERLAPPED} --moe-ffn-hidden-size 512 --moe-shared-expert-placement parallel"),
    (1, f"{GROUPED} --bf16 --moe-ffn-hidden-size 512"),
    (2, f"{EP} {GROUPED} --moe-dropless-buffer-factor 1.25 --moe-ffn-hidden-size 512"),
    (2, f"{EP} {GROUPED} --bf16 --moe-ffn-hidden-size 256"),
    (4, f"{TP} {EP} --expert-tensor-parallel-size 2 {GROUPED} --moe-dropless-buffer-factor 1.5"),
    (1, "--micro-batch-size 1"),
    (1, f"{SELECTIVE} core_attn"),
    (1, f"{FULL} block --recompute-num-layers 2 --seq-length 512"),
    (1, "--moe-shared-expert-placement parallel --ffn-variant swiglu --seq-length 512"),
    (1, "--moe-expert-capacity-factor 2 --moe-ffn-hidden-size 256 --seq-length 512 --bf16"),
    (1, "--group-query-attention --num-query-groups 2"),
    (1, "--qk-layernorm --group-query-attention --num-query-groups 2 --bf16"),
    (1, "--qk-layernorm --qk-layernorm-scope projection"),
    (2, f"{EP} --moe-ffn-hidden-size 512 {FULL} uniform --recompute-num-layers 1"),
    (2, f"{TP} --moe-ffn-hidden-size 512 {SELECTIVE} moe"),
    (2, f"{PP} --num-layers 8 --moe-layer-freq [0,1]*4 {FULL} uniform --recompute-num-layers 2"),
    (2, f"{PP} --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 1"),
    (4, f"{TP} {EP} --expert-tensor-parallel-size 1"),
    (4, f"{TP} {EP} --expert-tensor-parallel-size 2 --bf16"),
    (4, f"{TP} {PP} --micro-batch-size 2"),
    (4, f"{PP} {EP} {SHARDED} --bf16"),
    (4, "--pipeline-model-parallel-size 4 --micro-batch-size 1"),
]


def _check(pool: Pool, ranks: int, flags: str) -> None:
    measured = pool.run(measured_memory, ranks, flags=flags.split())
    config, layout = planned_config(flags.split()), measured[0][1]
    stages = step_memory(config, layout, VOCAB, device="cpu", threads=1, overwrites_gradient=True)
    for rank, (stage, _, peak, operation) in enumerate(measured):
        planned = stages[stage]
        state = planned.state
        # Adam counts the steps of each parameter in four bytes; a shard has no state for padding.
        assert abs(peak["optimizer"] - state.optimizer) < 1000
        assert (peak["parameters"], peak["gradients"]) == (state.parameters, state.gradients)
        error = planned.peak.total / peak["total"] - 1
        assert abs(error) < TOLERANCE, (rank, stage, planned.moment.name, operation, error)


@pytest.mark.parametrize(("ranks", "flags"), QUICK)
def test_predicted_memory_is_what_a_real_step_allocates(pool: Pool, ranks: int, flags: str) -> None:
    _check(pool, ranks, flags)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), MORE)
def test_predicted_memory_of_more_layouts(pool: Pool, ranks: int, flags: str) -> None:
    _check(pool, ranks, flags)
