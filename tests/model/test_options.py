"""Options of the parallel model that must not change its results really do something."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.pool import Pool

FULL = {"recompute_granularity": "full"}
UNIFORM = {**FULL, "recompute_method": "uniform"}
SELECTIVE = {"recompute_granularity": "selective"}


def passes(rank: int, world_size: int, flags: dict[str, Any]) -> dict[str, int]:
    """Forward passes of each kind of module in one training step of one micro-batch."""
    from tests.parity.harness import build, micro_batch

    chunks, _, _ = build("released", flags, world_size)
    count: Counter[str] = Counter()
    for index, layer in enumerate(chunks[0].decoder.layers):
        modules = {f"layer {index}": layer, "attention": layer.self_attention.core_attention}
        modules |= {"moe": layer.moe, "ffn": layer.shared} if layer.is_moe else {"ffn": layer.ffn}
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: count.update([name]))
    batch = micro_batch(0)
    chunks[0](batch.tokens_BS, batch.labels_BS).sum().backward()
    return dict(count)


# Four layers, two of them with experts and a shared expert; every layer has one attention and,
# dense or shared, one plain feed-forward.
@pytest.mark.parametrize(
    ("flags", "layers", "attention", "ffn", "moe"),
    [
        ({}, [1, 1, 1, 1], 4, 4, 2),
        ({**UNIFORM, "recompute_num_layers": 1}, [2, 2, 2, 2], 8, 8, 4),
        ({**UNIFORM, "recompute_num_layers": 2}, [2, 2, 2, 2], 8, 8, 4),
        (
            {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
            [2, 1, 1, 1],
            5,
            5,
            2,
        ),
        ({**SELECTIVE, "recompute_modules": ("core_attn",)}, [1, 1, 1, 1], 8, 4, 2),
        ({**SELECTIVE, "recompute_modules": ("mlp",)}, [1, 1, 1, 1], 4, 8, 2),
        ({**SELECTIVE, "recompute_modules": ("moe",)}, [1, 1, 1, 1], 4, 4, 4),
        ({**SELECTIVE, "recompute_modules": ("shared_experts",)}, [1, 1, 1, 1], 4, 6, 2),
    ],
)
def test_recomputation_repeats_the_selected_modules(
    pool: Pool, flags: dict[str, Any], layers: list[int], attention: int, ffn: int, moe: int
) -> None:
    (found,) = pool.run(passes, 1, flags=flags)
    assert [found[f"layer {i}"] for i in range(4)] == layers
    assert (found["attention"], found["ffn"], found["moe"]) == (attention, ffn, moe)


def outputs(rank: int, world_size: int, field: str, share: float) -> dict[str, torch.Tensor]:
    """Losses per token, in training twice and in evaluation twice."""
    from megatron_moe.model.build import build_model
    from tests.parity.cases import VOCAB
    from tests.parity.harness import build, micro_batch

    _, ctx, config = build("dropless", {}, world_size)
    config = replace(config, model=replace(config.model, **{field: share}))
    (chunk,) = build_model(config, ctx.layout, ctx.pgs, VOCAB, ctx.platform.device)
    batch, found = micro_batch(0), {}
    for mode in ("train", "eval"):
        chunk.train(mode == "train")
        for turn in (1, 2):
            found[f"{mode} {turn}"] = chunk(batch.tokens_BS, batch.labels_BS).detach()
    return found


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_drawn_anew_in_training_only(pool: Pool, field: str) -> None:
    (with_it,) = pool.run(outputs, 1, field=field, share=0.3)
    (without,) = pool.run(outputs, 1, field=field, share=0.0)
    assert not torch.equal(with_it["train 1"], with_it["train 2"])
    torch.testing.assert_close(with_it["eval 1"], with_it["eval 2"], rtol=0, atol=0)
    torch.testing.assert_close(with_it["eval 1"], without["eval 1"])
    torch.testing.assert_close(without["train 1"], without["train 2"], rtol=0, atol=0)


def wrapper_settings(rank: int, world_size: int, flags: dict[str, Any]) -> tuple[bool, ...]:
    """Settings that reached Megatron-Core's data-parallel wrapper."""
    from tests.parity.harness import prepare

    settings = prepare("released", flags, world_size).wrapped[0].ddp_config
    return (
        settings.overlap_grad_reduce,
        settings.overlap_param_gather,
        settings.use_distributed_optimizer,
    )


@pytest.mark.parametrize("on", [False, True])
def test_overlap_reaches_megatron_core(pool: Pool, on: bool) -> None:
    names = ("overlap_grad_reduce", "overlap_param_gather", "use_distributed_optimizer")
    flags = dict.fromkeys(names, on)
    assert pool.run(wrapper_settings, 2, flags=flags) == [(on, on, on)] * 2
