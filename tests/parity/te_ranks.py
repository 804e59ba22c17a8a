"""What the ranks of `test_transformer_engine.py` do: they have Transformer Engine's Python."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config import MoEConfig, PrecisionConfig, RunConfig
from megatron_moe.model import build as building
from megatron_moe.model.build import build_model
from megatron_moe.model.fp8 import delayed_scales
from megatron_moe.model.sharding.shards import model_shards, unwrap
from megatron_moe.model.te_scales import te_scales
from megatron_moe.moe.layer import MoELayer, RoutingDecision
from megatron_moe.parallel.context import initialize_parallel
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.linear_inputs import weight_copies
from megatron_moe.planning.step_memory import step_memory
from megatron_moe.platform import activate
from megatron_moe.training.optim.build import wrap_chunks
from tests.checkpoint import layouts
from tests.checkpoint.layouts import Case
from tests.parity.cases import ROWS, SEQ, VOCAB, run_config
from tests.parity.compare import Block
from tests.parity.harness import build, gradient_blocks, micro_batch
from tests.support.saved import saved_bytes

TE, LOCAL = {"transformer_impl": "transformer_engine"}, {"transformer_impl": "local"}
MARKS = ("allreduce", "tensor_model_parallel", "partition_dim", "sequence_parallel")
FACTORY = (
    "transformer_engine.pytorch.custom_recipes.quantization_current_scaling."
    "current_scaling_ref_quantizer_factory"
)
"""Transformer Engine's reference quantizers in plain PyTorch: one scale a tensor."""

Described = dict[str, tuple[tuple[int, ...], dict[str, Any]]]


def describe_parameters(
    rank: int, world_size: int, flags: dict[str, Any]
) -> tuple[Described, dict[str, str]]:
    """Shape and marks of each parameter by name, and the classes of modules with weights."""
    chunks, ctx, config = build("released", flags, world_size)
    wrap_chunks(config, chunks, ctx.pgs)
    found, classes = {}, {}
    for shard in model_shards(chunks, config.model, config.moe):
        marks = {name: getattr(shard.param, name, None) for name in MARKS}
        found[shard.local_name] = (tuple(shard.param.shape), marks)
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                classes[name] = type(module).__name__
    return found, classes


def fp8_config(flags: dict[str, Any]) -> RunConfig:
    """The small model with widths that FP8 GEMMs take, multiples of 16."""
    config = run_config("released", flags, bf16=True)
    model = replace(config.model, ffn_hidden_size=48, kv_channels=16)
    sizes = {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 64}
    return replace(config, model=model, moe=replace(config.moe, **sizes))


@contextmanager
def in_fp8() -> Iterator[None]:
    """Models that are built in it run in FP8 with `FACTORY`, which no flag selects."""

    def with_custom_recipe(*args: Any, **kwargs: Any) -> Any:
        core = original(*args, **kwargs)
        core.fp8, core.fp8_recipe, core.fp8_quantizer_factory = "hybrid", "custom", FACTORY
        return core

    original = building.transformer_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "transformer_config", with_custom_recipe)
        yield


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of one micro-batch; plain data."""

    loss: float
    gradients: list[Block]
    padded: int
    """Passes of experts whose GEMMs have padded rows."""
    checkpoints: int
    """Uses of Transformer Engine's checkpoint function."""


def loss_and_gradients(rank: int, world_size: int, flags: dict[str, Any], fp8: bool) -> Pass:
    """One pass, with rows of an expert that no FP8 GEMM takes unpadded."""
    from transformer_engine.pytorch import distributed

    config = fp8_config(flags)
    platform, layout = activate(), resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    arguments = (config, layout, ctx.pgs, VOCAB, platform.device)
    if fp8:
        with in_fp8():
            chunks = build_model(*arguments)
    else:
        chunks = build_model(*arguments)
    (chunk,) = chunks
    padded = count_padding(chunk)
    for param in chunk.parameters():
        param.main_grad = None  # type: ignore[attr-defined]
    batch, checkpoints = micro_batch(0), []
    original = distributed.checkpoint

    def checkpoint(*args: Any, **kwargs: Any) -> Any:
        checkpoints.append(args[0])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "checkpoint", checkpoint)
        loss = chunk(batch.tokens_BS, batch.labels_BS)[0].mean()
    loss.backward()
    for param in chunk.parameters():
        assert param.grad is not None
        param.main_grad = param.grad  # type: ignore[attr-defined]
    gradients = gradient_blocks(chunks, config)
    return Pass(float(loss.detach()), gradients, len(padded), len(checkpoints))


def count_padding(model: torch.nn.Module) -> list[int]:
    """A list that grows by one with each pass of experts whose GEMMs have padded rows."""
    found: list[int] = []
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        linear = getattr(layer.experts, "linear_fc1", None)
        if linear is None:
            continue

        def note(module: Any, args: tuple[Tensor, list[int]], layer: MoELayer = layer) -> None:
            rows, splits = args
            assert sum(splits) == rows.shape[0] and len(set(splits)) == 1
            if not rows[splits[0] - 1].any() and splits[0] % 16 == 0:
                found.append(splits[0])

        linear.register_forward_pre_hook(note)
    return found


def one_layer(
    rank: int, world_size: int, capacity_factor: float, recipe: str | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Output of a layer of experts, what it kept, and the rows of its GEMMs."""
    from transformer_engine.common.recipe import CustomRecipe
    from transformer_engine.pytorch import autocast
    from transformer_engine.pytorch.custom_recipes.quantization_current_scaling import (
        current_scaling_ref_quantizer_factory,
    )

    chunks, _, _ = build("released", TE, world_size)
    layer = next(m for m in chunks[0].modules() if isinstance(m, MoELayer))
    assert isinstance(layer.moe, MoEConfig)
    layer.moe = replace(layer.moe, moe_expert_capacity_factor=capacity_factor)
    layer.dispatcher.moe = layer.moe
    layer.experts.row_multiple = {"mxfp8": 32, "blockwise": 128}.get(recipe or "", 16)
    kept: list[Tensor] = []
    rows: list[int] = []

    def observe(decision: RoutingDecision) -> None:
        kept.append(decision.kept_TK)

    layer.on_routing = observe
    linear = layer.experts.linear_fc2
    assert isinstance(linear, torch.nn.Module)
    linear.register_forward_pre_hook(lambda module, args: rows.extend(args[1]))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SEQ, ROWS, layer.model.hidden_size, generator=generator)
    custom = CustomRecipe(qfactory=current_scaling_ref_quantizer_factory)
    with autocast(enabled=recipe is not None, recipe=custom):
        out = layer(x)
    return out.detach(), kept[0], rows


def saved_memory(rank: int, world_size: int, flags: dict[str, Any], fp8: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps, weights and their copies apart, and the planned bytes."""
    small = fp8_config(flags)
    model = replace(small.model, hidden_size=128, ffn_hidden_size=256)
    sizes = {"moe_ffn_hidden_size": 192, "moe_shared_expert_intermediate_size": 256}
    data = replace(small.data, seq_length=256)
    config = replace(small, model=model, moe=replace(small.moe, **sizes), data=data)
    platform, layout = activate(), resolve_layout(config, world_size, VOCAB)
    ctx = initialize_parallel(layout, config.parallel, platform, config.train.seed)
    with in_fp8() if fp8 else nullcontext():
        (chunk,) = build_model(config, layout, ctx.pgs, VOCAB, platform.device)
    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    ids = torch.randint(VOCAB, (layout.micro_batch_size, layout.seq_length))
    held = saved_bytes(lambda: chunk(ids, ids)[0].mean(), besides=weights)
    if fp8:
        config = replace(config, precision=PrecisionConfig(fp8_format="hybrid"))
    (stage,) = step_memory(config, layout, VOCAB, device="cpu")
    copies = sum(weight_copies(config, layout, VOCAB))
    return held, stage.chunks[0].saved.total + copies


HISTORY = 3
Scales = dict[str, tuple[float, tuple[float, ...]]]


def moved_scales(
    rank: int,
    world_size: int,
    flags: dict[str, Any],
    emulated: bool,
    recipe: str | None = "delayed",
    source: Any = None,
    target: Any = None,
) -> tuple[Scales, dict[str, float]]:
    """Scale and history of every operand after a load, or of made-up ones; some by place.

    Args:
        rank: of the pool.
        world_size: of the pool.
        flags: of the layout.
        emulated: whether FP8 is emulated in local layers.
        recipe: of FP8; `None` for bf16.
        source: checkpoint to load; `None` makes values up.
        target: where to save then.
    """
    config = fp8_config({**flags, **(LOCAL if emulated else TE)})
    if recipe is not None:
        precision = PrecisionConfig(
            fp8_format="hybrid",
            fp8_recipe=recipe,  # type: ignore[arg-type]
            fp8_amax_history_len=HISTORY,
            fp8_emulate=emulated,
        )
        config = replace(config, precision=precision)
    run = layouts.build(Case(world_size, flags), config)
    chunks = [unwrap(chunk) for chunk in run.wrapped]
    kept = [*delayed_scales(chunks), *te_scales(chunks)]
    if source is None:
        layouts.step(run, 1)
        layouts.step(run, 2)
        for scale in kept:
            own = scale.state.scale.view(-1)
            for place in range(len(own)):
                own[place] = made_up(scale.name, (scale.first or 0) + place)
                rows = scale.state.amax_history.view(HISTORY, -1)[:, place]
                rows.copy_(own[place] + torch.arange(HISTORY))
    else:
        layouts.load(run, source)
    if target is not None:
        layouts.save(run, target)
    found: Scales = {}
    for scale in kept:
        rows = scale.state.amax_history.view(HISTORY, -1)
        for place, value in enumerate(scale.state.scale.view(-1).tolist()):
            name = scale.name if scale.first is None else f"{scale.name}.{scale.first + place}"
            found[name] = value, tuple(rows[:, place].tolist())
    return found, {} if emulated or recipe != "delayed" else _by_place(chunks[0])


def made_up(name: str, place: int) -> float:
    """A scale that no other operand has."""
    return 1.0 + zlib.crc32(f"{name}.{place}".encode()) % 2**20 / 2**10


def _by_place(chunk: Any) -> dict[str, float]:
    """Some scales from where Transformer Engine's layers look for them."""
    layers = chunk.decoder.layers
    qkv = layers[0].self_attention.linear_qkv.fp8_meta
    down = layers[1].moe.experts.linear_fc2.fp8_meta
    return {
        "layers.0.attention.qkv.input": float(qkv["scaling_fwd"].scale[0]),
        "layers.0.attention.qkv.weight": float(qkv["scaling_fwd"].scale[1]),
        "layers.0.attention.qkv.gradient": float(qkv["scaling_bwd"].scale[0]),
        "layers.1.moe.experts.down.weight, second": float(down["scaling_fwd"].scale[4]),
        "layers.1.moe.experts.down.gradient, second": float(down["scaling_bwd"].scale[2]),
    }
