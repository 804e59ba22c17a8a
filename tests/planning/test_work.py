"""Arithmetic of a layer: by hand for one small configuration, and counted in a real run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_moe.model.counting import flops_per_token
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.stage_plan import chunk_plans
from megatron_moe.planning.tensor_sizes import TensorSizes
from megatron_moe.planning.work import experts, head
from tests.planning.ranks import VOCAB, batches_of, planned_config, planned_run
from tests.support.pool import Pool

FLAGS = ["--moe-expert-capacity-factor", "2", "--ffn-variant", "swiglu"]
"""With C = 2 T / E slots and two choices a token, buffers have exactly as many rows as choices."""


def _forward_flops(flags: list[str]) -> tuple[int, int]:
    """Of one micro-batch on one rank: what is planned, what the model asks for."""
    config = planned_config(flags)
    layout = resolve_layout(config, 1, VOCAB)
    (chunk,) = chunk_plans(config, layout, TensorSizes.of(config, layout, VOCAB), 0)
    planned = sum(count * part.work.forward.flops for part, count in chunk.items())
    asked = flops_per_token(config.model, config.moe, VOCAB, layout.seq_length).forward
    return planned, asked * layout.micro_batch_size * layout.seq_length


def test_flops_worked_by_hand() -> None:
    """T = 256 tokens of 2 rows; H 64, n d 96, F 128, shared 192, E 4, C 64; 2 + 2 MoE layers."""
    tokens = 256
    attention = 4 * (2 * tokens * 64 * (3 * 96 + 96) + 2 * tokens * 129 * 96)
    dense = 2 * 2 * tokens * 3 * 64 * 128
    routed = 2 * (2 * tokens * 64 * 4 + 2 * 4 * (2 * 64) * 3 * 64 * 128)
    shared = 2 * 2 * tokens * 3 * 64 * 192
    logits = 2 * tokens * 64 * VOCAB
    planned, asked = _forward_flops(FLAGS)
    assert planned == attention + dense + routed + shared + logits == asked


def test_rows_of_buffers_count_whether_they_are_filled_or_not() -> None:
    """At a capacity factor of 1, t5x rule, half of the choices have a row."""
    full, _ = _forward_flops(FLAGS)
    half, asked = _forward_flops([*FLAGS, "--moe-expert-capacity-factor", "1"])
    experts = 2 * 2 * 4 * 128 * 3 * 64 * 128
    assert full - half == experts // 2
    assert asked == full


def _counted(rank: int, world_size: int, *, flags: list[str]) -> int:
    """FLOPs that PyTorch's counter sees in the forward pass of one micro-batch."""
    run = planned_run(world_size, flags)
    (batch, *_), (chunk,) = batches_of(run), run.chunks
    assert batch is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunk(batch.tokens_BS, batch.labels_BS)
    return int(counter.get_total_flops())


def test_flops_are_those_that_a_real_forward_pass_counts(pool: Pool) -> None:
    """On a CPU, PyTorch's counter does not know the fused attention; all else is equal."""
    flags = [*FLAGS, "--moe-expert-impl", "batched"]
    (counted,) = pool.run(_counted, 1, flags=flags)
    planned, _ = _forward_flops(flags)
    scores = 4 * 2 * 256 * 129 * 96
    assert counted == planned - scores


def test_rows_of_several_sources_are_brought_together_and_apart_again() -> None:
    config = planned_config(FLAGS)
    sizes = TensorSizes.of(config, resolve_layout(config, 1, VOCAB), VOCAB)
    alone = experts(sizes, "fp32").forward.bytes
    rows = 4 * 2 * 64  # E, groups, C
    moved = 4 * 4 * rows * 64  # bytes of [rows, H], four times
    assert experts(replace(sizes, ep=2), "fp32").forward.bytes == alone + moved
    # Two ranks share each expert, and each has the rows of both: three blocks of the gate, F 128.
    shared = replace(sizes, etp=2, gathers_rows=True)
    gate = 4 * 3 * rows * 128
    assert experts(shared, "fp32").forward.bytes == alone + 2 * moved + gate


def test_recomputation_is_arithmetic() -> None:
    again = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    config = planned_config(FLAGS)
    layout = resolve_layout(config, 1, VOCAB)
    sizes = TensorSizes.of(config, layout, VOCAB)
    (plain,) = chunk_plans(config, layout, sizes, 0)
    (full,) = chunk_plans(planned_config([*FLAGS, *again.split()]), layout, sizes, 0)
    layers = sum(
        count * part.work.forward.flops
        for part, count in plain.items()
        if part.name not in ("embedding", "logits and loss")
    )
    total = [sum(n * part.flops for part, n in chunk.items()) for chunk in (plain, full)]
    assert total[1] - total[0] == layers


def test_all_chunks_of_logits_but_the_last_are_computed_again() -> None:
    config = planned_config(["--logits-chunk-tokens", "100"])
    sizes = TensorSizes.of(config, resolve_layout(config, 1, VOCAB), VOCAB)
    # 256 tokens in three chunks of at most 86, two of which are computed again.
    assert (sizes.logits_chunks, sizes.logits_rows) == (3, 86)
    unit = head(sizes)
    assert unit.backward.flops == 8 * 2 * 86 * VOCAB * 64
