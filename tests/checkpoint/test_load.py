"""What a load rejects, and how; what it leaves unchanged; what it restores besides tensors."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.checkpoint import RunIdentity, TrainState, rng, save_checkpoint
from megatron_moe.checkpoint.compare import config_differences, tensor_differences
from megatron_moe.checkpoint.index import LogicalTensor
from megatron_moe.config import ObjectiveConfig
from megatron_moe.errors import UsageError
from tests.checkpoint.layouts import DIST, IDENTITY, STATE, Case, build, gathered, load, save, step

ONE, EP2 = Case(1, {}), Case(2, {"expert_model_parallel_size": 2})
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
HALF = Case(1, {}, bf16=True)


def _save(rank, world_size, *, case, directory, **options):
    run = build(case)
    step(run, 1)
    state = replace(STATE, scheduler={"x": 0.1}, extra={"y": [1]})
    save_checkpoint(directory, state, **run.parts(), **options)


def _changed(config: Any, section: str, **values: Any) -> Any:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _rejected(rank, world_size, *, case, directory, sections=(), **options):
    config = case.config()
    for section, values in sections:
        config = _changed(config, section, **values)
    run = build(case, config)
    before = [shard.param.detach().clone() for shard in run.shards]
    try:
        load(run, directory, **options)
    except UsageError as error:
        same = [torch.equal(a, s.param) for a, s in zip(before, run.shards, strict=True)]
        return str(error), all(same)
    return "", False


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    pool.run(_save, 1, case=ONE, directory=directory)
    return directory


def test_all_differences_are_listed_at_once_on_every_rank(pool, saved):
    sections = [
        ("model", {"hidden_size": 40, "rotary_base": 500.0}),
        ("moe", {"num_experts": 8, "moe_router_topk": 3, "moe_ffn_hidden_size": 24}),
        ("data", {"seq_length": 8}),
        ("optimizer", {"optimizer": "sgd"}),
    ]
    other = RunIdentity(padded_vocab_size=128, tokenizer_hash="u", data_fingerprint="e")
    results = pool.run(_rejected, 2, case=EP2, directory=saved, sections=sections, identity=other)
    assert results[0] == results[1]
    text, unchanged = results[0]
    assert unchanged
    for line in (
        "--hidden-size: 32 in the checkpoint, 40 in this run",
        f"--rotary-base: {ONE.config().model.rotary_base} in the checkpoint, 500.0 in this run",
        "--num-experts: 4 in the checkpoint, 8 in this run",
        "--moe-router-topk: 2 in the checkpoint, 3 in this run",
        "--moe-ffn-hidden-size: 20 in the checkpoint, 24 in this run",
        "--seq-length: 16 in the checkpoint, 8 in this run",
        "--optimizer: adam in the checkpoint, sgd in this run",
        "padded vocabulary: 96 in the checkpoint, 128 in this run",
        "tokenizer: t in the checkpoint, u in this run",
        "training data: d in the checkpoint, e in this run",
        "no momentum_buffer in the checkpoint",
        "final_norm.weight: F32 [32] in the checkpoint, F32 [40] in this run",
    ):
        assert line in text.splitlines(), line
    assert text.splitlines()[-1].startswith(
        f"checkpoint {saved / 'iter_0000002'} must be compatible with this model and this run (got "
    )


def test_grouped_heads_and_their_norms_differ_whether_or_not_the_run_resumes():
    ours = ONE.config()
    model = replace(ours.model, group_query_attention=True, num_query_groups=2, qk_layernorm=True)
    for resume in (True, False):
        grouped = replace(ours, model=model)
        assert list(config_differences(ours, grouped, resume=resume, optimizer=True)) == [
            "--qk-layernorm: False in the checkpoint, True in this run",
            "--num-query-groups: 4 in the checkpoint, 2 in this run",
        ]
        # As many groups as heads, and a number without effect, are the same model.
        plain = replace(ours.model, group_query_attention=True, num_query_groups=4)
        unused = replace(ours.model, num_query_groups=3)
        for same in (plain, unused):
            found = config_differences(
                ours, replace(ours, model=same), resume=resume, optimizer=True
            )
            assert list(found) == []


def test_a_run_resumes_only_with_the_router_and_the_padding_that_it_had():
    run = ONE.config()
    ours = replace(run, model=replace(run.model, zero_padding_activations=False))
    other = replace(
        ours,
        model=replace(ours.model, zero_padding_activations=True),
        moe=replace(ours.moe, moe_router_type="other"),
    )
    assert list(config_differences(ours, other, resume=True, optimizer=True)) == [
        "--zero-padding-activations: False in the checkpoint, True in this run",
        "--moe-router-type: linear in the checkpoint, other in this run",
    ]
    assert list(config_differences(ours, other, resume=False, optimizer=True)) == []


def test_a_run_with_padding_resumes_only_with_the_routing_of_padding_that_it_had():
    saved, ours = (
        replace(ONE.config(), moe=replace(ONE.config().moe, moe_ignore_padding_tokens=ignores))
        for ignores in (False, True)
    )
    assert list(config_differences(saved, ours, resume=True, optimizer=True)) == []
    rows = {"objective": ObjectiveConfig(objective="ul2")}
    phases = {"train": replace(saved.train, stages="phases.toml")}
    for changed in (rows, phases):
        pair = replace(saved, **changed), replace(ours, **changed)
        assert list(config_differences(*pair, resume=True, optimizer=True)) == [
            "--moe-ignore-padding-tokens: False in the checkpoint, True in this run"
        ]
        assert list(config_differences(*pair, resume=False, optimizer=True)) == []


def test_tensors_that_do_not_fit_are_told_apart():
    def tensor(name: str, shape: tuple[int, ...], dtype: str = "F32") -> LogicalTensor:
        return LogicalTensor("model", name, shape, dtype, shape, ())

    there = {
        ("model", t.name): t
        for t in (
            tensor("same", (2,)),
            tensor("shape", (2, 3)),
            tensor("dtype", (4,)),
            tensor("extra", (1,)),
        )
    }
    there["exp_avg", "unread"] = tensor("unread", (5,))
    wanted = [
        ["model", "same", [2], "F32"],
        ["model", "shape", [3, 2], "F32"],
        ["model", "dtype", [4], "BF16"],
        ["model", "missing", [7], "F32"],
    ]
    assert list(tensor_differences(there, wanted)) == [
        "shape: F32 [2, 3] in the checkpoint, F32 [3, 2] in this run",
        "dtype: F32 [4] in the checkpoint, BF16 [4] in this run",
        "missing: missing in the checkpoint, F32 [7] in this run",
        "extra: in the checkpoint, not in this run",
    ]


def test_no_silent_cast(pool, saved):
    ((text, unchanged),) = pool.run(_rejected, 1, case=HALF, directory=saved)
    assert unchanged
    assert "--bf16: False in the checkpoint, True in this run" in text
    assert "embedding.weight: F32 [96, 32] in the checkpoint, BF16 [96, 32] in this run" in text


def test_a_flipped_bit_is_rejected_on_every_rank_before_anything_changes(pool, tmp_path):
    pool.run(_save, 2, case=EP2, directory=tmp_path)
    path = tmp_path / "iter_0000002/rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 16
    path.write_bytes(data)
    results = pool.run(_rejected, 2, case=EP2, directory=tmp_path)
    for text, unchanged in results:
        assert unchanged
        assert "rank-00001.safetensors has SHA-256" in text
        assert text.splitlines()[-1].startswith(str(tmp_path / "iter_0000002"))


def test_a_missing_directory_is_rejected_on_every_rank(pool, tmp_path):
    results = pool.run(_rejected, 2, case=EP2, directory=tmp_path / "absent")
    assert results[0] == results[1]
    assert "absent" in results[0][0] and "--allow-missing-load" in results[0][0]


def test_what_was_not_saved_is_not_loaded_silently(pool, tmp_path):
    pool.run(_save, 1, case=ONE, directory=tmp_path, with_optimizer=False, with_rng=False)
    ((text, _),) = pool.run(_rejected, 1, case=ONE, directory=tmp_path)
    assert "no optimizer state in the checkpoint; --no-load-optim leaves it out" in text
    assert "no random states in the checkpoint; --no-load-rng leaves them out" in text
    assert "2 differences" in text
    without = {"with_optimizer": False, "with_rng": False}
    ((text, _),) = pool.run(_rejected, 1, case=ONE, directory=tmp_path, **without)
    assert text == ""


def _weights(rank, world_size, *, case, directory, sections=(), **options):
    """Masters, weights and moments after a load without optimizer state."""
    config = case.config()
    for section, values in sections:
        config = _changed(config, section, **values)
    run = build(case, config)
    state = load(run, directory, with_optimizer=False, with_rng=False, **options)
    step(run, 1)
    return state, [(k, n, b) for k, n, _, _, b in gathered(run)]


@pytest.mark.parametrize("flags", [{}, DIST])
def test_without_optimizer_state_masters_follow_the_weights(pool, tmp_path, flags):
    """A step from stale masters would undo the load; this run starts from other weights."""
    case = Case(1, flags, bf16=True)
    seed = [("train", {"seed": 99})]
    pool.run(_save, 1, case=case, directory=tmp_path)
    ((_, tensors),) = pool.run(_weights, 1, case=case, directory=tmp_path, sections=seed)
    masters = {name: block for kind, name, block in tensors if kind == "master"}
    weights = {name: block for kind, name, block in tensors if kind == "model"}
    saved = dict(_logical(tmp_path))
    for name, master in masters.items():
        assert torch.equal(master.to(torch.bfloat16), weights[name])
        moved = (master - saved[name].view(master.shape).float()).abs().max()
        assert moved < 1e-2, name  # one step of Adam at a rate of 3e-4


def _logical(directory):
    from megatron_moe.checkpoint import load_logical

    return load_logical(directory)


def test_finetuning_may_change_what_keeps_shapes(pool, saved):
    sections = [
        ("moe", {"moe_router_topk": 3}),
        ("data", {"seq_length": 8}),
        ("checkpoint", {"finetune": True}),
    ]
    other = replace(IDENTITY, data_fingerprint="other corpus")
    ((state, _),) = pool.run(
        _weights, 1, case=ONE, directory=saved, sections=sections, identity=other
    )
    assert state == TrainState(
        iteration=2, consumed_train_samples=16, scheduler={"x": 0.1}, extra={"y": [1]}
    )
    other = replace(IDENTITY, tokenizer_hash="other tokenizer")
    ((text, _),) = pool.run(
        _rejected, 1, case=ONE, directory=saved, sections=sections, identity=other
    )
    assert "tokenizer: t in the checkpoint, other tokenizer in this run" in text


def _draws() -> list[float]:
    """A number from every generator."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    numbers = [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal()]
    numbers.append(torch.rand(1).item())
    tracker = get_cuda_rng_tracker()
    for name in sorted(tracker.get_states()):
        with tracker.fork(name):
            numbers.append(torch.rand(1).item())
    return numbers


def _draw_and_save(rank, world_size, *, case, directory):
    run = build(case)
    random.seed(rank)
    np.random.seed(rank)
    earlier = _draws()
    save(run, directory)
    return earlier, _draws()


def _load_and_draw(rank, world_size, *, case, directory):
    load(build(case), directory)
    return _draws()


def _reseed(rank, world_size, *, case, seeds):
    run = build(case)
    drawn = []
    for seed, iteration in seeds:
        rng.reseed(seed, iteration, run.ctx)
        drawn.append(_draws())
    return drawn


def test_derived_states_follow_seed_step_and_place(pool):
    case = Case(2, {**TP2, "expert_tensor_parallel_size": 1})
    seeds = [(7, 2), (7, 3), (8, 2), (7, 2)]
    first, second = pool.run(_reseed, 2, case=case, seeds=seeds)
    assert first[0] == first[3]
    assert not set(first[0]) & set(first[1]) and not set(first[0]) & set(first[2])
    # Tensor-parallel ranks draw the same numbers outside parallel regions, others inside.
    assert first[0][:6] == second[0][:6]
    assert sum(a != b for a, b in zip(first[0], second[0], strict=True)) == 1


def test_random_states_of_every_rank_come_back(pool, tmp_path):
    expected = [after for _, after in pool.run(_draw_and_save, 2, case=EP2, directory=tmp_path)]
    assert expected[0] != expected[1]
    assert pool.run(_load_and_draw, 2, case=EP2, directory=tmp_path) == expected


def test_another_layout_derives_random_states_from_seed_and_step(pool, tmp_path):
    before = pool.run(_draw_and_save, 2, case=EP2, directory=tmp_path)
    case = Case(2, {"pipeline_model_parallel_size": 2})
    first = pool.run(_load_and_draw, 2, case=case, directory=tmp_path)
    assert first == pool.run(_load_and_draw, 2, case=case, directory=tmp_path)
    assert first[0] != first[1]
    drawn = {number for numbers in first for number in numbers}
    assert not drawn & {number for rank in before for numbers in rank for number in numbers}


def _overlapped(rank, world_size, *, directory):
    """Steps with overlapped gathers leave weights stale until the next forward pass."""
    case = Case(2, {**DIST, "overlap_grad_reduce": True, "overlap_param_gather": True})
    run = build(case)
    for chunk in run.wrapped:
        chunk.zero_grad_buffer()
    for shard in run.shards:
        shard.param.main_grad.fill_(1e-3)  # type: ignore[attr-defined]
    run.optimizer.step()
    stale = [shard.param.detach().clone() for shard in run.shards]
    save(run, directory)
    return sum(not torch.equal(a, s.param) for a, s in zip(stale, run.shards, strict=True))


def test_a_save_waits_for_overlapped_parameter_gathers(pool, tmp_path):
    stale = pool.run(_overlapped, 2, directory=tmp_path)
    assert min(stale) > 0  # the test would be void if nothing had been stale
    fresh = dict(_logical(tmp_path))
    plain_directory = tmp_path / "plain"
    pool.run(_plain_step, 1, directory=plain_directory)
    for name, tensor in _logical(plain_directory):
        torch.testing.assert_close(fresh[name], tensor, rtol=0, atol=1e-6)


def _plain_step(rank, world_size, *, directory):
    run = build(ONE)
    for shard in run.shards:
        shard.param.main_grad.fill_(1e-3)  # type: ignore[attr-defined]
    run.optimizer.step()
    save(run, directory)
