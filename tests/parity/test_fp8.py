"""Emulated FP8: every layout computes what one process does, by recipe, where scales allow it.

In fp64 between the rounded operands: a difference of the order of additions would otherwise be
rounded to another FP8 number now and then. All sizes are multiples of 128 on every rank, so that
blocks of scales along inputs and outputs are the same ones. `EXCLUDED` has the layouts in which a
recipe's scales depend on what a rank holds, which docs/fp8.md names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from tests.parity.compare import Block, assemble
from tests.support.pool import Pool

VOCAB, SEQ, ROWS, STEPS = 128, 128, 2, 2
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP, ETP = {"expert_model_parallel_size": 2}, "expert_tensor_parallel_size"
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2": EP,
    "TP2xETP2": TP,
    "TP2": {**TP, ETP: 1},
    "TP2xEP2": {**TP, **EP, ETP: 1},
}
EXCLUDED = {
    "tensorwise": ("EP2", "TP2xETP2", "TP2", "TP2xEP2"),
    "delayed": (),
    "blockwise": (),
    "mxfp8": (),
}
"""Layouts of a recipe in which scales depend on the shards. With TP2 and experts that are not
divided, other rows of an expert share a block in its weight gradients, but a power of two changes
only numbers that are nearly 0 in FP8."""
PAIRS = [(recipe, layout) for recipe in EXCLUDED for layout in LAYOUTS]
QUICK = [
    *(("delayed", "TP2xEP2"), ("blockwise", "TP2xETP2")),
    *(("mxfp8", "EP2"), ("tensorwise", "EP2")),
]
"""Pairs of every run of the tests."""
HYBRID = {"tensorwise": True, "delayed": True, "blockwise": False, "mxfp8": False}


def config_of(recipe: str, flags: dict[str, Any]) -> RunConfig:
    """One dense and one MoE layer with a shared expert; experts drop some of both choices."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        kv_channels=64,
        max_position_embeddings=SEQ,
        router_init_method_std=0.3,
        init_variance_scale=0.5,
    )
    moe = MoEConfig(
        num_experts=2,
        moe_layer_freq="[0,1]",
        moe_router_topk=1,
        moe_ffn_hidden_size=256,
        moe_shared_expert_intermediate_size=256,
        moe_capacity_group_size=ROWS * SEQ,
        moe_expert_capacity_factor=1.0,
    )
    return RunConfig(
        model=model,
        moe=moe,
        parallel=ParallelConfig(**flags),
        precision=PrecisionConfig(
            fp8_format="hybrid" if HYBRID[recipe] else "e4m3",
            fp8_recipe=recipe,  # type: ignore[arg-type]
            fp8_emulate=True,
        ),
        data=DataConfig(seq_length=SEQ, vocab_size=VOCAB, make_vocab_size_divisible_by=1),
        train=TrainConfig(micro_batch_size=ROWS, global_batch_size=2 * ROWS, train_iters=1, seed=7),
    )


def two_steps(
    rank: int, world_size: int, recipe: str | None, flags: dict[str, Any]
) -> tuple[list[Block], dict[str, list[float]], float]:
    """Gradients and scales after the second step, without an update of weights in between.

    Args:
        rank: of this process.
        world_size: ranks.
        recipe: `None`: no FP8.
        flags: the layout.
    """
    from megatron_moe.data.batch import Batch
    from megatron_moe.model import fp8
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.context import initialize_parallel
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.parallel.schedule import forward_backward
    from megatron_moe.platform import activate
    from megatron_moe.training.optim.build import wrap_chunks
    from megatron_moe.training.plan import resolve_plan
    from megatron_moe.training.run import TrainingRun
    from megatron_moe.training.step import count_targets, forward_function, total_sums
    from tests.parity.harness import gradient_blocks

    config = config_of(recipe or "tensorwise", flags)
    if recipe is None:
        config = replace(config, precision=PrecisionConfig())
    platform = activate()
    layout = resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, VOCAB, platform.device, torch.float64)
    run = TrainingRun(
        config=config,
        plan=resolve_plan(config, layout.global_batch_size),
        ctx=ctx,
        chunks=chunks,
        wrapped=wrap_chunks(config, chunks, ctx.pgs),
        optimizer=None,  # type: ignore[arg-type]  # Megatron-Core has none for fp64
        freezing=None,  # type: ignore[arg-type]
        vocab_size=VOCAB,
    )
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (2 * ROWS, SEQ + 1), generator=generator)
    batches: list[Batch | None] = []
    for index in range(layout.num_microbatches):
        first = (index * layout.dp + ctx.dp_rank) * ROWS
        rows = ids[first : first + ROWS]
        mask = torch.ones(ROWS, SEQ)
        batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), mask)
        batches.append(batch if ctx.needs_data else None)
    for _ in range(STEPS):
        for chunk in run.wrapped:
            chunk.zero_grad_buffer()
        targets = count_targets(batches, run) if run.has_loss else None
        forward = forward_function(run, targets, len(batches))
        sums = total_sums(forward_backward(ctx, forward, batches, run.wrapped), run)
        fp8.update_scales(chunks, ctx.pgs)
    torch.distributed.all_reduce(sums)
    scales = {
        scale.name if scale.first is None else f"{scale.name} of {scale.first}": (
            scale.state.scale.flatten().tolist()
        )
        for scale in fp8.delayed_scales(chunks)
    }
    return gradient_blocks(chunks, config), scales, float(sums[0] / sums[2])


def merged(found: list[Any]) -> tuple[dict[str, Tensor], dict[str, list[float]], float]:
    """Whole gradients, all scales, the loss."""
    scales: dict[str, list[float]] = {}
    for _, own, _ in found:
        for name, values in own.items():
            # Of experts, by expert.
            whole, _, first = name.partition(" of ")
            for place, value in enumerate(values):
                key = f"{whole}.{int(first) + place}" if first else whole
                assert scales.setdefault(key, [value]) == [value]
    gradients = assemble(block for blocks, _, _ in found for block in blocks)
    return gradients, scales, found[0][2]


class Expected:
    """Results of one process, by recipe; each is computed once."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.found = pool, {}

    def of(self, recipe: str | None) -> Any:
        if recipe not in self.found:
            self.found[recipe] = merged(self.pool.run(two_steps, 1, recipe=recipe, flags={}))
        return self.found[recipe]


@pytest.fixture(scope="module")
def expected(pool: Pool) -> Expected:
    return Expected(pool)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to its largest element."""
    assert found.keys() == expected.keys()
    return max(
        ((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected
    )


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in PAIRS],
)
def test_a_layout_is_one_process_unless_it_is_excluded(
    pool: Pool, expected: Expected, recipe: str, layout: str
) -> None:
    gradients, scales, loss = expected.of(recipe)
    ranks = 2
    found = merged(pool.run(two_steps, ranks, recipe=recipe, flags=LAYOUTS[layout]))
    if layout in EXCLUDED[recipe]:
        assert 1e-4 < distance(found[0], gradients) < 0.5
        return
    assert distance(found[0], gradients) < 5e-6
    assert abs(found[2] - loss) < 1e-5
    assert found[1].keys() == scales.keys()
    assert bool(scales) == (recipe == "delayed")
    for name, values in scales.items():
        assert found[1][name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.parametrize("recipe", EXCLUDED)
def test_fp8_changes_gradients_by_its_rounding(expected: Expected, recipe: str) -> None:
    """A few percent of every gradient below the logits, which are not in FP8."""
    gradients, scales, loss = expected.of(recipe)
    plain, _, plain_loss = expected.of(None)
    off = {n: ((g - plain[n]).norm() / plain[n].norm()).item() for n, g in gradients.items()}
    above = {"final_norm.weight": off.pop("final_norm.weight"), "output": off.pop("output.weight")}
    assert min(off.values()) > 0.04 and max(off.values()) < 0.3
    assert 0 < max(above.values()) < 0.03
    assert 0 < abs(loss - plain_loss) < 0.002
    # 5 linear layers or experts of 3 operands, of which experts count twice.
    assert len(scales) == (36 if recipe == "delayed" else 0)


def test_layers_kept_in_bf16_are_those_of_a_run_without_fp8(pool: Pool) -> None:
    for start, end, layers in ((1, 0, {1}), (0, 1, {0}), (0, 0, {0, 1})):
        found = pool.run(layers_in_fp8, 1, start=start, end=end)
        assert found == [layers]


def layers_in_fp8(rank: int, world_size: int, start: int, end: int) -> set[int]:
    """0-based layers of which a linear layer, or the experts, multiply in FP8."""
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.context import initialize_parallel
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.platform import activate

    config = config_of("mxfp8", {})
    kept = {"num_layers_at_start_in_bf16": start, "num_layers_at_end_in_bf16": end}
    precision = replace(config.precision, first_last_layers_bf16=True, **kept)
    config = replace(config, precision=precision)
    layout, platform = resolve_layout(config, 1, VOCAB), activate()
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    (chunk,) = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    found = set()
    for layer in chunk.decoder.layers:
        linear = [layer.self_attention.linear_qkv, layer.self_attention.linear_proj]
        ffn = layer.shared if layer.is_moe else layer.ffn
        linear += [ffn.linear_fc1, ffn.linear_fc2, *([layer.moe.experts] if layer.is_moe else [])]
        used = {module.fp8 is not None for module in linear}
        assert len(used) == 1
        found |= {layer.layer_number - 1} if True in used else set()
    return found
