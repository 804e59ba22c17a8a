"""Runs in emulated FP8: they resume bit for bit, in any layout, from bf16 and back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.training.test_resume import _run, _steps, _tensors

DELAYED = "--fp8-format hybrid --fp8-emulate --fp8-recipe delayed --fp8-amax-history-len 3"
DELAYED += " --fp8-amax-compute-algo max"
EP2 = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]
KINDS = ("fp8_scale", "fp8_amax_history")


def test_a_run_that_resumes_is_one_that_never_stopped(pool, corpus, tmp_path):
    """Recomputed layers record the same magnitudes, and an evaluation records none."""
    flags = [*DELAYED.split(), *EP2, "--bf16", "--eval-iters", "1", "--eval-interval", "4"]
    flags += ["--recompute-granularity", "selective", "--recompute-modules", "mlp", "moe"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lines = _run(pool, 2, corpus, whole, flags)
    said = "FP8: hybrid, delayed, emulated: operands are rounded; 4 of 4 layers"
    assert any(said in line for line in lines)
    _run(pool, 2, corpus, parts, [*flags, "--exit-interval", "10"])
    _run(pool, 2, corpus, parts, [*flags, "--load", str(parts)])
    assert _steps(parts) == _steps(whole)
    assert _tensors(parts) == _tensors(whole)


@pytest.mark.slow
def test_a_run_goes_from_fp32_to_fp8_and_back(pool, corpus, tmp_path):
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    _run(pool, 1, corpus, plain, [])
    load = ["--load", str(mixed)]
    _run(pool, 1, corpus, mixed, ["--exit-interval", "5"])
    _run(pool, 1, corpus, mixed, [*DELAYED.split(), *load, "--exit-interval", "10"])
    assert {kind for kind, _ in saved(mixed / "iter_0000010")} >= set(KINDS)
    _run(pool, 1, corpus, mixed, load)
    assert not {kind for kind, _ in saved(mixed / "iter_0000020")} & set(KINDS)
    losses = [[float.fromhex(s["lm_loss_hex"]) for s in _steps(d)] for d in (plain, mixed)]
    off = [abs(a - b) for a, b in zip(*losses, strict=True)]
    # Step 6 is the first in FP8, with scales of 1.
    assert off[:5] == [0.0] * 5 and min(off[5:]) > 0 and max(off[5:]) < 0.1


def saved(directory: Path) -> dict[tuple[str, str], list[torch.Tensor]]:
    """Blocks of a checkpoint by kind and logical tensor, in the order of their offsets."""
    found: dict[tuple[str, str], list[tuple[str, torch.Tensor]]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in list(opened.keys()):
                kind, name, *_ = re.split("[:/@]", key)
                found.setdefault((kind, name), []).append((key, opened.get_tensor(key)))
    return {name: [t for _, t in sorted(blocks)] for name, blocks in found.items()}


def loaded(rank: int, world_size: int, directory: str, flags: dict[str, Any]) -> dict[str, list]:
    """Scale and history of each operand, by the first expert that they are of, after a load."""
    from megatron_moe.checkpoint.load import load_checkpoint
    from megatron_moe.config import ParallelConfig, RunConfig
    from megatron_moe.model.build import build_model
    from megatron_moe.model.fp8 import delayed_scales
    from megatron_moe.parallel.context import initialize_parallel
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.platform import activate

    config = RunConfig.load(Path(directory) / "iter_0000010" / "config.json")
    config = replace(config, parallel=ParallelConfig(**flags))
    layout, platform = resolve_layout(config, world_size), activate()
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    vocab = 128
    chunks = build_model(config, layout, ctx.pgs, vocab, platform.device)
    load_checkpoint(
        directory,
        config=config,
        ctx=ctx,
        chunks=chunks,
        optimizer=None,
        with_optimizer=False,
        with_rng=False,
    )
    found: dict[str, list] = {}
    for scale in delayed_scales(chunks):
        state = scale.state
        history = state.amax_history.view(len(state.amax_history), -1)
        for place, value in enumerate(state.scale.view(-1).tolist()):
            name = scale.name if scale.first is None else f"{scale.name} {scale.first + place}"
            found[name] = [value, *history[:, place].tolist()]
    return found


TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2": (2, {**TP, "expert_tensor_parallel_size": 1}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


def test_any_layout_loads_the_scales_of_any_other(pool, corpus, tmp_path):
    _run(pool, 2, corpus, tmp_path, [*DELAYED.split(), *EP2, "--exit-interval", "10"])
    files = saved(tmp_path / "iter_0000010")
    found = {
        name: pool.run(loaded, world, directory=str(tmp_path), flags=flags)
        for name, (world, flags) in LAYOUTS.items()
    }
    (whole,) = found["1"]
    # 4 linear layers in each of 4 layers, and in 2 of them 2 GEMMs of 4 experts; 3 operands each.
    assert len(whole) == 3 * (4 * 4 + 2 * 2 * 4)
    assert len({value for value, *_ in whole.values()}) > 70
    for name, results in found.items():
        for own in results:
            assert own and all(own[key] == whole[key] for key in own), name
        assert {key for own in results for key in own} == whole.keys(), name
    for (kind, name), blocks in files.items():
        if kind == "fp8_scale":
            values = torch.cat(blocks).tolist()
            keys = [f"{name} {e}" for e in range(4)] if ".experts." in name else [name]
            assert values == [whole[key][0] for key in keys]
    assert sum(kind == "fp8_scale" for kind, _ in files) == 3 * (4 * 4 + 2 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_a_run_learns_in_every_recipe(pool, corpus, tmp_path, recipe):
    """The loss of the last steps is that of a run in fp32, to a few hundredths of a nat."""
    flags = ["--fp8-format", "e4m3", "--fp8-emulate", "--fp8-recipe", recipe]
    _run(pool, 1, corpus, tmp_path / "fp8", [*flags, "--first-last-layers-bf16"])
    _run(pool, 1, corpus, tmp_path / "plain", [])
    ends = [
        sum(float.fromhex(step["lm_loss_hex"]) for step in _steps(tmp_path / name)[-4:]) / 4
        for name in ("fp8", "plain")
    ]
    assert 0 < abs(ends[0] - ends[1]) < 0.05
