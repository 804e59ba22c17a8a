"""The arithmetic of an interval: asked for and done, by counts worked by hand."""

from __future__ import annotations

import pytest

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.model.counting import flops_per_token
from megatron_moe.moe import LayerStatistics
from megatron_moe.training.metrics import count_arithmetic

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, kv_channels=16
)
MOE = MoEConfig(
    num_experts=4,
    moe_layer_freq="[0,1]*2",
    moe_ffn_hidden_size=40,
    moe_shared_expert_intermediate_size=None,
)
CHOICE = 2 * 4 * 32 * 40
"""FLOPs of one token in one expert: four matrices of 32 x 40, a multiply-add counts two."""
OTHER = (
    4 * 4 * 32 * (64 + 64)  # four layers, projections of 32 x 64 to queries, keys, values and back
    + 4 * 2 * 64 * 17  # scores and values, of 8.5 of 16 keys on average
    + 2 * 2 * 4 * 32 * 48  # two dense layers
    + 2 * 2 * 32 * 4  # two routers
    + 2 * 32 * 64  # logits
)
"""Those of its forward pass outside of experts."""


def layer(kept_real: tuple[float, float], kept_pads: tuple[float, float]) -> LayerStatistics:
    """20 tokens and 4 pads, two choices each, of which these first and second ones were kept."""
    return LayerStatistics(
        load=(20, 20, 4, 4),
        kept=(sum(kept_real), 0, sum(kept_pads), 0),
        tokens=24,
        router_entropy=0.0,
        router_confidence=0.0,
        logit_rms=0.0,
        aux_loss=0.0,
        z_loss=0.0,
        micro_batches=1,
        tokens_at=((15, 5), (0, 4)),
        kept_at=((kept_real, (0, 0)), ((0, 0), kept_pads)),
    )


def test_a_choice_without_a_slot_is_not_done_and_padding_is_not_counted() -> None:
    """Of 2 x 20 x 2 choices of real tokens, 20 + 10 and 16 + 4 were kept: 50 of 80."""
    flops = flops_per_token(MODEL, MOE, 64, 16)
    assert flops.forward == OTHER + 2 * 2 * CHOICE
    layers = [layer((20, 10), (4, 4)), layer((16, 4), (0, 0))]
    tokens, done = count_arithmetic(flops, layers)
    assert tokens == 20
    assert done == pytest.approx(3 * (20 * OTHER + 50 * CHOICE), rel=1e-12)


def test_without_drops_all_that_is_asked_for_is_done() -> None:
    flops = flops_per_token(MODEL, MOE, 64, 16)
    assert count_arithmetic(flops, [layer((20, 20), (0, 0))] * 2) == (20, 20 * flops.training)


def test_an_interval_of_nothing_but_padding_does_nothing() -> None:
    flops = flops_per_token(MODEL, MOE, 64, 16)
    none = layer((0, 0), (4, 4))
    empty = LayerStatistics(**{**vars(none), "tokens_at": ((0, 0), (0, 4))})
    assert count_arithmetic(flops, [empty]) == (0, 0)
