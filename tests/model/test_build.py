"""Our configuration in Megatron-Core's terms."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch
from megatron.core.transformer import TransformerConfig

from megatron_moe.config import PrecisionConfig, RunConfig
from megatron_moe.model.build import transformer_config
from megatron_moe.parallel.layout import resolve_layout

FP8 = PrecisionConfig(
    fp8_format="hybrid",
    fp8_recipe="delayed",
    fp8_margin=2,
    fp8_amax_history_len=16,
    fp8_amax_compute_algo="max",
)
KEPT = PrecisionConfig(
    fp8_format="e4m3",
    fp8_recipe="blockwise",
    first_last_layers_bf16=True,
    num_layers_at_start_in_bf16=2,
    num_layers_at_end_in_bf16=0,
)


def core_of(precision: PrecisionConfig) -> TransformerConfig:
    base = RunConfig()
    # With experts, Megatron-Core refuses FP8 where Transformer Engine is not installed.
    moe = replace(base.moe, moe_layer_freq="[0]*4")
    config = replace(base, moe=moe, precision=precision)
    layout = resolve_layout(config, 1)
    return transformer_config(config, layout, torch.device("cpu"), torch.bfloat16)


def test_settings_of_fp8_reach_megatron_core() -> None:
    for given in (FP8, KEPT):
        core = core_of(given)
        names = {field.name for field in dataclasses.fields(PrecisionConfig)} - {"fp8_emulate"}
        for name in names:
            theirs = "fp8" if name == "fp8_format" else name
            assert getattr(core, theirs) == getattr(given, name), name
    # Megatron-Core would enter Transformer Engine's contexts.
    assert core_of(PrecisionConfig()).fp8 is None
    assert core_of(replace(FP8, fp8_emulate=True)).fp8 is None


def test_layers_kept_in_bf16_are_those_that_megatron_core_keeps() -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    core = core_of(KEPT)
    for layer in range(4):
        assert KEPT.in_fp8(layer, 4) != is_first_last_bf16_layer(core, layer)
    assert [FP8.in_fp8(layer, 4) for layer in range(4)] == [True] * 4
    assert not PrecisionConfig().in_fp8(0, 4)
