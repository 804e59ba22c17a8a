"""Frozen weights stay as they are to the bit, and everything else moves as without freezing."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_moe.checkpoint import load_logical
from megatron_moe.checkpoint.metadata import open_checkpoint
from megatron_moe.checkpoint.reading import TensorReader
from megatron_moe.config import OptimizerConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.training.optim.freezing import ROUTERS, frozen_patterns
from megatron_moe.training.plan import resolve_plan
from tests.training.optim.freezing_ranks import frozen_steps
from tests.training.tiny import MODEL, pretrain_rank

_TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
_EP2 = ["--expert-model-parallel-size", "2"]
_SHARDED = ["--use-distributed-optimizer"]
_OVERLAPPED = [*_SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
_ADAFACTOR = ["--optimizer", "adafactor", "--adafactor-min-dim", "20"]
_GROUPED = ["--group-query-attention", "--num-query-groups", "2", "--qk-layernorm"]
PATTERNS = ["layers.0.*", "*.attention.key.weight", "*.experts.gate", "embedding.*", "*norm*"]
"""Whole parameters, and parts of fused ones."""
CASES = {
    "Adam": (1, []),
    "Adam sharded, bf16": (2, [*_SHARDED, "--bf16"]),
    "Adam overlapped": (2, _OVERLAPPED),
    "Adafactor on TP2, bf16": (2, [*_TP2, *_ADAFACTOR, "--bf16"]),
    "Muon on TP2, bf16": (2, [*_TP2, "--optimizer", "muon", "--bf16"]),
    "SGD on EP2": (2, [*_EP2, "--optimizer", "sgd"]),
    "Adam on TP2, grouped": (2, [*_TP2, *_SHARDED, *_GROUPED]),
}


def _matches(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS)


@pytest.mark.parametrize("name", list(CASES))
def test_frozen_weights_and_their_state_stay(name, pool):
    world, flags = CASES[name]
    flags = [*flags, "--weight-decay", "0" if "Adafactor" in name else "0.1", "--clip-grad", "0"]
    freeze = [*flags, "--freeze-params", *PATTERNS]
    frozen = pool.run(frozen_steps, world, flags=freeze, count=3)
    free = pool.run(frozen_steps, world, flags=flags, count=1)
    seen = set()
    for (steps, _), (other, _) in zip(frozen, free, strict=True):
        first, after_one, *_, last = steps
        assert last.keys() >= first.keys()
        for key, values in last.items():
            kind, name_ = key[:2]
            seen.add((kind, _matches(name_)))
            if not _matches(name_):
                assert torch.equal(after_one[key], other[1][key]), key
                assert not torch.equal(values, after_one[key]), key
            elif kind == "model":
                assert torch.equal(values, first[key]), key
            elif kind == "master":
                assert torch.equal(values.to(torch.bfloat16), first[("model", *key[1:])]), key
            else:
                assert not values.any(), key
    assert {matched for _, matched in seen} == {True, False}
    assert len(seen) >= 4


def test_without_freezing_these_weights_move(pool):
    """What makes the comparison above mean something."""
    ((steps, _),) = pool.run(frozen_steps, 1, flags=[], count=3)
    assert not any(torch.equal(steps[0][key], steps[-1][key]) for key in steps[0])


def test_frozen_gradients_are_not_in_the_norm(pool):
    """What one half leaves out is what the other half has."""
    world, flags = CASES["Adam sharded, bf16"]
    halves = [
        ["layers.[02].*", "*.key.weight"],
        ["layers.[13].[!a]*", "layers.[13].attention.[!k]*", "layers.[13].attention_*", "[!l]*"],
    ]
    norms = []
    for patterns in ([], *halves):
        freeze = ["--freeze-params", *patterns] if patterns else []
        found = pool.run(frozen_steps, world, flags=[*flags, *freeze], count=1)
        norms.append({norms_[0] for _, norms_ in found})
    whole, *parts = (only for (only,) in norms)
    assert math.hypot(*parts) == pytest.approx(whole, rel=1e-5)
    assert min(parts) > 0.05 * whole


def test_routers_freeze_after_their_step_in_one_run_or_two(pool, corpus, tmp_path):
    flags = ["--freeze-router-after", "7", "--save-interval", "1", "--train-iters", "12"]
    flags += ["--data-path", corpus, "--split", "100,0,0", *_EP2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _pretrain(pool, whole, flags)
    _pretrain(pool, parts, [*flags, "--exit-interval", "9"])
    _pretrain(pool, parts, [*flags, "--load", str(parts)])
    assert _metrics(whole) == _metrics(parts)
    steps = {step: dict(load_logical(whole, step)) for step in (6, 7, 8, 12)}
    for name, final in steps[12].items():
        frozen = fnmatchcase(name, ROUTERS)
        assert not torch.equal(steps[6][name], steps[7][name]), name
        assert torch.equal(steps[7][name], steps[8][name]) == frozen, name
        assert torch.equal(steps[7][name], final) == frozen, name
        assert torch.equal(final, dict(load_logical(parts, 12))[name])
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = [_whole(whole, step, kind, "layers.1.moe.router.weight") for step in (6, 7, 12)]
        assert not torch.equal(moments[0], moments[1])
        assert torch.equal(moments[1], moments[2])


def _whole(directory: Path, step: int, kind: str, name: str) -> Tensor:
    opened = open_checkpoint(directory / f"iter_{step:07}")
    return TensorReader(opened.path, opened.tensors).whole(kind, name)


def _pretrain(pool, directory: Path, flags: list[str]) -> None:
    argv = [*MODEL, *flags, "--save", str(directory)]
    argv += ["--metrics-file", str(directory / "metrics.jsonl")]
    for code, _, mistake in pool.run(pretrain_rank, 2, argv=argv):
        assert code == 0, mistake


def _metrics(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_what_is_frozen_is_a_function_of_the_step():
    settings = OptimizerConfig(freeze_params=("a",), freeze_router_after=3)
    assert frozen_patterns(settings, 3) == ("a",)
    assert frozen_patterns(settings, 4) == ("a", ROUTERS)
    assert frozen_patterns(OptimizerConfig(freeze_router_after=0), 1) == (ROUTERS,)
    assert frozen_patterns(OptimizerConfig(), 1) == ()


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--freeze-params embedding.weight layer.0.*", "--freeze-params"),
        ("--freeze-params [a-f]* [!a-f]*", "--freeze-params"),
        ("--freeze-router-after -1", "--freeze-router-after"),
        ("--freeze-router-after 5 --moe-layer-freq [0]*4", "--freeze-router-after"),
    ],
)
def test_invalid_values_are_rejected_by_flag(line, flag):
    with pytest.raises(UsageError) as error:
        resolve_plan(parse_args([*MODEL, "--train-iters", "3", *line.split()]).config, 8)
    assert error.value.what == flag
    if "layer.0" in line:
        assert error.value.found == "layer.0.*"
