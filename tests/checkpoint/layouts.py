"""Real models and optimizers in any layout, and their state gathered without checkpoint code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint import RunIdentity, TrainState, load_checkpoint, save_checkpoint
from megatron_moe.config import RunConfig
from megatron_moe.model.build import build_model
from megatron_moe.model.sharding.shards import ParamShard, model_shards
from megatron_moe.parallel.context import ParallelContext, initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.platform import activate
from megatron_moe.training.optim.build import build_optimizer, wrap_chunks
from tests.parity.cases import VOCAB, run_config

IDENTITY = RunIdentity(padded_vocab_size=VOCAB, tokenizer_hash="t", data_fingerprint="d")
STATE = TrainState(iteration=2, consumed_train_samples=16)
DIST = {"use_distributed_optimizer": True}


@dataclass(frozen=True)
class Case:
    """A layout of a run that saves or loads."""

    world_size: int
    flags: dict[str, Any]
    variant: str = "released"
    bf16: bool = False
    optimizer: str = "adam"

    def config(self) -> RunConfig:
        run = run_config(self.variant, self.flags, bf16=self.bf16)
        return replace(run, optimizer=replace(run.optimizer, optimizer=self.optimizer))


@dataclass(frozen=True)
class Run:
    """A model with its optimizer on this rank."""

    config: RunConfig
    ctx: ParallelContext
    wrapped: list[Any]
    optimizer: Any
    shards: list[ParamShard]

    def parts(self) -> dict[str, Any]:
        """What a save and a load take of it."""
        return {
            "config": self.config,
            "ctx": self.ctx,
            "chunks": self.wrapped,
            "optimizer": self.optimizer,
            "identity": IDENTITY,
        }


def build(case: Case, config: RunConfig | None = None) -> Run:
    config = config or case.config()
    platform = activate()
    layout = resolve_layout(config, case.world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    chunks = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    wrapped = wrap_chunks(config, chunks, ctx.pgs)
    optimizer = build_optimizer(config, wrapped, ctx.pgs)
    shards = model_shards(chunks, config.model, config.moe)
    return Run(config, ctx, wrapped, optimizer, shards)


def step(run: Run, number: int) -> None:
    """An optimizer step with gradients that depend on step and logical element alone."""
    for chunk in run.wrapped:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    for shard in run.shards:
        for piece in shard.pieces:
            digest = hashlib.sha256(f"{piece.name}:{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            grad = torch.randn(piece.logical_shape, generator=generator) * 1e-3
            piece.select(shard.param.main_grad).copy_(piece.block_of(grad))  # type: ignore[attr-defined]
    run.optimizer.step()
    for chunk in run.wrapped:
        if run.config.parallel.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


def spoil(run: Run) -> None:
    """Make sure that a load has to write every weight."""
    for shard in run.shards:
        shard.param.data.fill_(float("nan"))


def gathered(run: Run) -> list[tuple[str, str, Any, Any, Tensor]]:
    """Everything in this rank's memory: kind, name, view, offsets, block.

    State of the distributed optimizer is put together over the data-parallel group first.
    """
    found = []
    for shard in run.shards:
        group = run.ctx.pgs.expt_dp if shard.expert else run.ctx.pgs.dp_cp
        tensors = {"model": shard.param.detach(), **_state(run, shard.param, group)}
        for kind, tensor in tensors.items():
            for piece in shard.pieces:
                block = piece.select(tensor).clone()
                found.append((kind, piece.name, piece.view_shape, piece.offsets, block))
    return found


def _state(run: Run, param: Tensor, group: Any) -> dict[str, Tensor]:
    for leaf in run.optimizer.chained_optimizers:
        if leaf.is_stub_optimizer:
            continue
        if run.config.parallel.use_distributed_optimizer:
            state = _sharded_state(leaf, param, group)
        else:
            state = _replicated_state(leaf, param)
        if state is not None:
            return state
    raise AssertionError("a parameter without an optimizer")


def _sharded_state(leaf: Any, param: Tensor, group: Any) -> dict[str, Tensor] | None:
    """Ranges are disjoint, so that their sum is the whole."""
    if not any(param in index for buffer in leaf.buffers for index in [buffer.param_index_map]):
        return None
    masters = param.dtype != torch.float32
    kinds = ["exp_avg", "exp_avg_sq", *(["master"] if masters else [])]
    whole = {kind: torch.zeros(param.numel()) for kind in kinds}
    if param in leaf.model_param_gbuf_map:
        place = leaf._get_model_param_range_map(param)["param"]
        half = leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups
        full = leaf.model_fp32_groups, leaf.shard_fp32_groups
        pairs = [
            pair
            for params, mains in (half, full)
            for ps, ms in zip(params, mains, strict=True)
            for pair in zip(ps, ms, strict=True)
        ]
        main = next(m for p, m in pairs if p is param)
        for kind in kinds:
            values = main if kind == "master" else leaf.optimizer.state[main][kind]
            whole[kind][place.start : place.end] = values.detach()
    for values in whole.values():
        torch.distributed.all_reduce(values, group=group)
    return {kind: values.view(param.shape) for kind, values in whole.items()}


def _replicated_state(leaf: Any, param: Tensor) -> dict[str, Tensor] | None:
    main = getattr(param, "main_param", param) if param.dtype != torch.float32 else param
    if main not in leaf.optimizer.state:
        return None
    state = {k: v for k, v in leaf.optimizer.state[main].items() if k != "step"}
    return {**state, **({"master": main.detach()} if main is not param else {})}


def cut_parameters(rank: int, world_size: int, *, case: Case) -> int:
    """Parameters of which this rank's optimizer holds an inner or last part."""
    run = build(case)
    ranges = [
        leaf._get_model_param_range_map(param)["param"]
        for leaf in run.optimizer.chained_optimizers
        for param in leaf.model_param_gbuf_map
    ]
    return sum(place.start > 0 for place in ranges)


def start(rank: int, world_size: int, *, case: Case, directory: Any) -> Any:
    """Two steps, a save, and what a third step gives."""
    run = build(case)
    step(run, 1)
    step(run, 2)
    before = gathered(run)
    save(run, directory)
    step(run, 3)
    return before, gathered(run)


def save(run: Run, directory: Any) -> None:
    save_checkpoint(directory, STATE, **run.parts())


def load(run: Run, directory: Any, **options: Any) -> TrainState:
    return load_checkpoint(directory, **{**run.parts(), **options})


def move(rank: int, world_size: int, *, case: Case, source: Any, target: Any = None) -> Any:
    """Load, save again, take a third step."""
    run = build(case)
    spoil(run)
    state = load(run, source)
    assert state.iteration == 2 and state.consumed_train_samples == 16
    before = gathered(run)
    if target is not None:
        save(run, target)
    step(run, 3)
    return before, gathered(run)
