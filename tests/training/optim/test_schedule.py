"""Learning rates against closed forms and against Megatron-Core's scheduler."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe.config import OptimizerConfig, RunConfig, TrainConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training.optim.schedule import learning_rate
from megatron_moe.training.plan import rate_lengths, resolve_plan


def rate_at(optimizer: OptimizerConfig, step: int, decay: int) -> float:
    config = RunConfig(optimizer=optimizer, train=TrainConfig(train_iters=decay))
    return learning_rate(optimizer, rate_lengths(config, decay), step)


def _megatron_rates(config: OptimizerConfig, decay: int, steps: int) -> list[float]:
    group: dict[str, float] = {}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=decay,
        lr_decay_style=config.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_iters,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )
    rates = [group["lr"]]
    for _ in range(steps):
        scheduler.step(1)
        rates.append(group["lr"])
    return rates


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_every_style_is_megatron_cores_at_every_step(style, warmup, floor):
    config = OptimizerConfig(
        lr=0.01, min_lr=floor, lr_decay_style=style, lr_warmup_iters=warmup, lr_warmup_init=1e-4
    )
    ours = [rate_at(config, step, 40) for step in range(51)]
    assert ours == pytest.approx(_megatron_rates(config, 40, 50), rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine", "minus_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("last", [1, 10, 33])
def test_every_end_of_wsd_is_megatron_cores_at_every_step(shape, warmup, last):
    config = OptimizerConfig(
        lr=0.01,
        min_lr=1e-3,
        lr_decay_style="WSD",
        lr_wsd_decay_style=shape,
        lr_wsd_decay_iters=last,
        lr_warmup_iters=warmup,
    )
    ours = [rate_at(config, step, 40) for step in range(51)]
    assert ours == pytest.approx(_megatron_rates(config, 40, 50), rel=1e-12, abs=0)


@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" not in name])
def test_the_published_recipe_is_flat_and_then_falls_with_the_root_of_the_step(name):
    config = PRESETS[name].optimizer
    for step in (0, 1, 100, 9999, 10000, 10001, 40000, 390000):
        expected = 1 / math.sqrt(max(step, 10000))
        assert rate_at(config, step, 500000) == pytest.approx(expected, rel=1e-12)


def test_closed_forms_by_hand():
    cosine = OptimizerConfig(lr=1.0, min_lr=0.2, lr_decay_style="cosine", lr_warmup_iters=4)
    assert [rate_at(cosine, step, 12) for step in (0, 2, 4, 8, 12, 13)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.6, 0.2, 0.2]
    )
    linear = OptimizerConfig(lr=1.0, min_lr=0.0, lr_decay_style="linear")
    assert [rate_at(linear, step, 4) for step in range(6)] == pytest.approx(
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    )


@pytest.mark.parametrize(
    ("shape", "end"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4, 0.0]),
        ("exponential", [2 * 0.5**0.25 - 1, math.sqrt(2) - 1, 2 * 0.5**0.75 - 1, 0.0]),
        ("minus_sqrt", [0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0]),
    ],
)
def test_wsd_by_hand(shape, end):
    """Two steps of warm-up, stable until step 6, four of decay, then the floor."""
    config = OptimizerConfig(
        lr=1.0,
        lr_decay_style="WSD",
        lr_wsd_decay_style=shape,
        lr_wsd_decay_iters=4,
        lr_warmup_iters=2,
    )
    found = [rate_at(config, step, 10) for step in range(13)]
    expected = [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *end, 0.0, 0.0]
    assert found == pytest.approx(expected, abs=1e-12)


def _resolve(config: RunConfig) -> None:
    validate(config)
    resolve_plan(config, 8)


@pytest.mark.parametrize(
    "line",
    [
        "--lr-decay-style WSD",
        "--lr-decay-style WSD --lr-wsd-decay-iters 0",
        "--lr-decay-style WSD --lr-wsd-decay-iters 9 --lr-warmup-iters 2",
        "--lr-wsd-decay-iters 4",
    ],
)
def test_invalid_values_are_rejected_by_flag(line):
    config = parse_args(["--train-iters", "10", *line.split()]).config
    with pytest.raises(UsageError) as error:
        _resolve(config)
    assert error.value.what == "--lr-wsd-decay-iters"
