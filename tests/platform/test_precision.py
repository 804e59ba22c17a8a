"""FP8 where no device can multiply in it, and not emulated: one line before anything is built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_moe.config import (
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_moe.errors import UsageError
from megatron_moe.platform import transformer_engine
from megatron_moe.platform.precision import check_precision
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank


def test_fp8_is_an_error_where_nothing_multiplies_in_it() -> None:
    check_precision(RunConfig(), "cpu")
    config = RunConfig(precision=PrecisionConfig(fp8_format="hybrid"))
    emulated = replace(config, precision=replace(config.precision, fp8_emulate=True))
    for device in ("cpu", "cuda"):
        check_precision(emulated, device)
    with pytest.raises(UsageError, match="--fp8-format must be used with --fp8-emulate"):
        check_precision(config, "cpu")
    with pytest.raises(UsageError) as caught:  # a GPU without Transformer Engine
        check_precision(config, "cuda")
    assert str(caught.value) == (
        "--fp8-format must be used with --transformer-impl transformer_engine or --fp8-emulate (got"
        " 'hybrid'); layers are local (auto: Transformer Engine is not installed)"
    )


@pytest.mark.parametrize(
    ("recipe", "section", "change", "line"),
    [
        ("tensorwise", "model", {"hidden_size": 136}, "--hidden-size must be a multiple of 16"),
        ("mxfp8", "model", {"ffn_hidden_size": 528}, "--ffn-hidden-size / --tensor-model-parallel"),
        ("blockwise", "moe", {"moe_ffn_hidden_size": 320}, "--moe-ffn-hidden-size must be a mult"),
        ("tensorwise", "data", {"seq_length": 12}, "--micro-batch-size x --seq-length / --tensor"),
        ("blockwise", "model", {"kv_channels": 48}, "--num-attention-heads x --kv-channels / --"),
    ],
)
def test_sizes_that_fp8_gemms_do_not_take(
    monkeypatch: pytest.MonkeyPatch, recipe: Any, section: str, change: dict[str, Any], line: str
) -> None:
    monkeypatch.setattr(transformer_engine, "unavailable", lambda device_type: None)
    base = RunConfig(
        precision=PrecisionConfig(fp8_format="hybrid", fp8_recipe=recipe),
        parallel=ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1),
        model=ModelConfig(hidden_size=256, ffn_hidden_size=512, num_attention_heads=8),
        train=TrainConfig(micro_batch_size=2),
    )
    check_precision(base, "cuda")
    changed = replace(base, **{section: replace(getattr(base, section), **change)})
    with pytest.raises(UsageError) as caught:
        check_precision(changed, "cuda")
    assert str(caught.value).startswith(line)
    assert f"with --fp8-recipe {recipe} (got " in str(caught.value)


def test_a_run_on_a_cpu_ends_on_every_rank(pool: Pool) -> None:
    argv = [*MODEL, "--mock-data", "--fp8-format", "e4m3", "--train-iters", "9"]
    for code, out, error in pool.run(pretrain_rank, 2, argv=argv):
        assert (code, out) == (2, "")
        assert "\n" not in error.strip()
        assert "--fp8-format must be used with --fp8-emulate (got 'e4m3'); no CPU mul" in error
