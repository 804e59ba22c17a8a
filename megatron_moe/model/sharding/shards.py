"""The table of shards: which blocks of which logical tensors each local parameter consists of.

The logical model (`megatron_moe/model/logical.py`) has unfused weights without any notion of ranks.
A local parameter is one block, or a few interleaved ones, of logical tensors: heads of q, k and v;
blocks of a gate and the up projection; some experts. The table is a list of `ParamShard`, one for
each parameter, and each has a `Piece` for each logical tensor in it.

    tp=2, N=4 heads, D=8, H=32, rank 1: linear_qkv.weight [2 * 3 * 8, 32] is
        query  heads 2..3 of [4, 8, 32]   select: view(2, 24, 32)[:, 0:8]
        key    heads 2..3 of [4, 8, 32]   select: view(2, 24, 32)[:, 8:16]
        value  heads 2..3 of [4, 8, 32]   select: view(2, 24, 32)[:, 16:24]

Shapes: V vocabulary, H hidden, N heads, G key and value heads (N without grouped-query attention),
D head dimension, F feed-forward width, E experts, M input blocks of a feed-forward (2 or 3); a
suffix _l means this rank's share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.model.logical import initial_expert, initial_tensor, logical_parameters
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.model.sharding.blocks import Shape


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One block of one logical tensor, and where it is in a local parameter.

    Args:
        name: the logical tensor.
        logical_shape: its shape.
        view_shape: a shape with as many elements, in which this rank's part is a rectangle.
        offsets: first index of the rectangle in each dimension of the view.
        sizes: its length in each dimension of the view.
        select: maps a tensor shaped like the local parameter to the view of it that is this block,
            shaped ``sizes``.
    """

    name: str
    logical_shape: Shape
    view_shape: Shape
    offsets: Shape
    sizes: Shape
    select: Callable[[Tensor], Tensor]

    def block_of(self, logical: Tensor) -> Tensor:
        """This block, as a view of the whole logical tensor."""
        return logical.reshape(self.view_shape)[self.index]

    @property
    def index(self) -> tuple[slice, ...]:
        """The block as an index into the view."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, kw_only=True)
class ParamShard:
    """A local parameter and its blocks.

    Args:
        param: the parameter.
        local_name: its name in the chunk, prefixed with the chunk's number.
        pieces: its blocks, which together cover it.
        writer: whether this rank saves it, of the ranks with the same block because of tensor
            parallelism or tied embeddings. Data-parallel replicas are not considered here.
        expert: whether its data-parallel group is `pgs.expt_dp` rather than `pgs.dp_cp`.
    """

    param: Tensor
    local_name: str
    pieces: tuple[Piece, ...]
    writer: bool
    expert: bool


@dataclass(frozen=True)
class _Rank:
    """This rank's coordinates in the layout, and sizes of the model."""

    tp: int
    tp_rank: int
    ep: int
    ep_rank: int
    etp: int
    etp_rank: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    blocks: int
    splits_qk_norms: bool


def model_shards(chunks: Sequence[Any], model: ModelConfig, moe: MoEConfig) -> list[ParamShard]:
    """The table of all parameters of this rank, in the order of the chunks and their parameters.

    Args:
        chunks: the model chunks of this rank, in Megatron-Core's wrappers or bare.
        model: the dense part of the configuration they were built from.
        moe: the expert part.

    Raises:
        KeyError: a parameter is not in the table.
    """
    shards = []
    for number, wrapped in enumerate(chunks):
        chunk = unwrap(wrapped)
        rank = _coordinates(chunk, model)
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, param in chunk.named_parameters():
            own = moe
            if name.startswith("decoder.layers."):
                own = moe.of_layer(layers[int(name.split(".")[2])], model.num_layers)
            shards.append(_shard(f"{number}.{name}", name, param, layers, rank, own, chunk))
    return shards


def unwrap(chunk: Any) -> OpenMoEModel:
    """A model chunk without Megatron-Core's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    found: OpenMoEModel = chunk
    return found


def _coordinates(chunk: OpenMoEModel, model: ModelConfig) -> _Rank:
    pgs = chunk.pg_collection
    return _Rank(
        pgs.tp.size(),
        pgs.tp.rank(),
        pgs.ep.size(),
        pgs.ep.rank(),
        pgs.expt_tp.size(),
        pgs.expt_tp.rank(),
        model.num_attention_heads,
        model.key_value_heads,
        model.kv_channels,
        model.hidden_size,
        model.input_blocks,
        model.qk_layernorm_scope == "projection",
    )


def _shard(
    local_name: str,
    name: str,
    param: Tensor,
    layers: list[int],
    rank: _Rank,
    moe: MoEConfig,
    chunk: OpenMoEModel,
) -> ParamShard:
    prefix, suffix = "", name
    if name.startswith("decoder.layers."):
        index, suffix = name.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"layers.{layers[int(index)]}."
    expert = ".experts." in name
    replicated, pieces = _pieces(prefix, suffix, param, rank, moe)
    writer = rank.tp_rank == 0 if replicated else True
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        writer = False
        # The last pipeline stage's copy of a tied embedding: loaded, but saved by the first stage.
        pieces = tuple(replace(piece, name="embedding.weight") for piece in pieces)
    return ParamShard(
        param=param, local_name=local_name, pieces=pieces, writer=writer, expert=expert
    )


_REPLICATED = {
    "input_layernorm.weight": "attention_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "shared_norm.weight": "shared_norm.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "moe.router.weight": "moe.router.weight",
    "moe.router.context_weight": "moe.router.context_weight",
    "moe.router.expert_bias.weight": "moe.router.expert_bias",
}


_QK_NORMS = {
    "self_attention.q_layernorm.weight": "attention.query_norm.weight",
    "self_attention.k_layernorm.weight": "attention.key_norm.weight",
}


def _pieces(
    prefix: str, suffix: str, param: Tensor, rank: _Rank, moe: MoEConfig
) -> tuple[bool, tuple[Piece, ...]]:
    """Whether all tensor-parallel ranks hold the same values, and the parameter's blocks."""
    if suffix in _REPLICATED:
        return True, (_whole(prefix + _REPLICATED[suffix], param),)
    if suffix in ("embedding.word_embeddings.weight", "output_layer.weight"):
        name = "output.weight" if suffix.startswith("output") else "embedding.weight"
        return rank.tp == 1, (_split(name, param, 0, rank.tp, rank.tp_rank),)
    if suffix == "self_attention.linear_qkv.weight":
        return False, _qkv(prefix + "attention.", param, rank)
    if suffix in _QK_NORMS:
        name = prefix + _QK_NORMS[suffix]
        if rank.splits_qk_norms:
            return False, (_split(name, param, 0, rank.tp, rank.tp_rank),)
        return True, (_whole(name, param),)
    if suffix == "self_attention.linear_proj.weight":
        return False, (_split(f"{prefix}attention.output.weight", param, 1, rank.tp, rank.tp_rank),)
    kind, _, matrix = suffix.partition(".")
    if kind in ("ffn", "shared") and matrix == "linear_fc1.weight":
        return False, _dense_input(f"{prefix}{kind}.", param, rank)
    if kind in ("ffn", "shared") and matrix == "linear_fc2.weight":
        return False, (_split(f"{prefix}{kind}.down.weight", param, 1, rank.tp, rank.tp_rank),)
    if suffix == "moe.experts.weight_in":
        return False, _expert_input(f"{prefix}moe.experts.", param, rank, moe)
    if suffix == "moe.experts.weight_out":
        return False, (_expert_output(f"{prefix}moe.experts.", param, rank, moe),)
    if suffix.startswith("moe.experts.linear_fc"):
        return False, _grouped_expert(f"{prefix}moe.experts.", suffix, param, rank, moe)
    raise KeyError(f"parameter {prefix}{suffix} has no logical name")


def _whole(name: str, param: Tensor) -> Piece:
    """A parameter that is a whole logical tensor."""
    shape = tuple(param.shape)
    zeros = (0,) * len(shape)
    return Piece(
        name=name,
        logical_shape=shape,
        view_shape=shape,
        offsets=zeros,
        sizes=shape,
        select=lambda t: t,
    )


def _split(name: str, param: Tensor, dim: int, parts: int, part: int) -> Piece:
    """A parameter that is part ``part`` of ``parts`` equal ones of a logical tensor, along dim."""
    sizes = tuple(param.shape)
    logical = tuple(s * parts if i == dim else s for i, s in enumerate(sizes))
    offsets = tuple(part * s if i == dim else 0 for i, s in enumerate(sizes))
    return Piece(
        name=name,
        logical_shape=logical,
        view_shape=logical,
        offsets=offsets,
        sizes=sizes,
        select=lambda t: t,
    )


def _qkv(prefix: str, param: Tensor, rank: _Rank) -> tuple[Piece, ...]:
    """[G_l * (N / G + 2) * D, H]: for each key head its queries' rows, then its own, then v's."""
    groups, dim, hidden = rank.groups // rank.tp, rank.head_dim, rank.hidden
    queries = rank.heads // rank.groups * dim
    starts = {"query": (0, queries), "key": (queries, dim), "value": (queries + dim, dim)}
    total = queries + 2 * dim
    return tuple(
        Piece(
            name=f"{prefix}{name}.weight",
            logical_shape=(rank.groups * rows, hidden),
            view_shape=(rank.groups, rows, hidden),
            offsets=(rank.tp_rank * groups, 0, 0),
            sizes=(groups, rows, hidden),
            select=lambda t, start=start, rows=rows: (  # type: ignore[misc]
                t.view(groups, total, hidden)[:, start : start + rows]
            ),
        )
        for name, (start, rows) in starts.items()
    )


def _dense_input(prefix: str, param: Tensor, rank: _Rank) -> tuple[Piece, ...]:
    """[M * F_l, H]: the gate's M - 1 blocks, then the up block."""
    # Each block is split over tensor-parallel ranks by itself. M = 3, F = 4, tp = 2: rank 1 holds
    # rows 2..3 of each block, so the logical gate [8, H] is a rectangle only in the view [2, 4, H],
    # with offsets (0, 2, 0) and sizes (2, 2, H).
    blocks, hidden = rank.blocks, rank.hidden
    width_l = param.shape[0] // blocks
    width, start = width_l * rank.tp, width_l * rank.tp_rank
    gates = blocks - 1
    return (
        Piece(
            name=f"{prefix}gate.weight",
            logical_shape=(gates * width, hidden),
            view_shape=(gates, width, hidden),
            offsets=(0, start, 0),
            sizes=(gates, width_l, hidden),
            select=lambda t: t.view(blocks, width_l, hidden)[:gates],
        ),
        Piece(
            name=f"{prefix}up.weight",
            logical_shape=(width, hidden),
            view_shape=(width, hidden),
            offsets=(start, 0),
            sizes=(width_l, hidden),
            select=lambda t: t.view(blocks, width_l, hidden)[gates],
        ),
    )


def _expert_input(prefix: str, param: Tensor, rank: _Rank, moe: MoEConfig) -> tuple[Piece, ...]:
    """[E_l, H, M * F_l]: along each expert's columns the gate's M - 1 blocks, then the up block."""
    # As for dense layers, but transposed: the gate's view splits its columns, [E, H, M - 1, F].
    blocks, hidden, gates = rank.blocks, rank.hidden, rank.blocks - 1
    experts_l, width_l = param.shape[0], param.shape[2] // blocks
    width = width_l * rank.etp
    first, start = experts_l * rank.ep_rank, width_l * rank.etp_rank
    return (
        Piece(
            name=f"{prefix}gate",
            logical_shape=(moe.num_experts, hidden, gates * width),
            view_shape=(moe.num_experts, hidden, gates, width),
            offsets=(first, 0, 0, start),
            sizes=(experts_l, hidden, gates, width_l),
            select=lambda t: t.view(experts_l, hidden, blocks, width_l)[:, :, :gates],
        ),
        Piece(
            name=f"{prefix}up",
            logical_shape=(moe.num_experts, hidden, width),
            view_shape=(moe.num_experts, hidden, width),
            offsets=(first, 0, start),
            sizes=(experts_l, hidden, width_l),
            select=lambda t: t.view(experts_l, hidden, blocks, width_l)[:, :, gates],
        ),
    )


def _expert_output(prefix: str, param: Tensor, rank: _Rank, moe: MoEConfig) -> Piece:
    """[E_l, F_l, H]."""
    experts_l, width_l, hidden = param.shape
    shape = (moe.num_experts, width_l * rank.etp, hidden)
    return Piece(
        name=f"{prefix}down",
        logical_shape=shape,
        view_shape=shape,
        offsets=(experts_l * rank.ep_rank, width_l * rank.etp_rank, 0),
        sizes=(experts_l, width_l, hidden),
        select=lambda t: t,
    )


def _grouped_expert(
    prefix: str, suffix: str, param: Tensor, rank: _Rank, moe: MoEConfig
) -> tuple[Piece, ...]:
    """One expert's weight in Transformer Engine's grouped layer, [out, in] as `torch.nn.Linear`.

    `linear_fc1.weight3` [M * F_l, H] and `linear_fc2.weight3` [H, F_l] are those of the fourth
    expert of this rank: the transposes of its parts of the stacked weights.
    """
    linear, _, name = suffix.removeprefix("moe.experts.").partition(".")
    expert, hidden = int(name.removeprefix("weight")), rank.hidden
    stacked_l = moe.num_experts // rank.ep
    if linear == "linear_fc2":
        stacked = param.new_empty(stacked_l, param.shape[1], hidden, device="meta")
        piece = _expert_output(prefix, stacked, rank, moe)
        return (_of_expert(piece, expert, lambda t: t.t().unsqueeze(0)),)
    blocks = rank.blocks
    stacked = param.new_empty(stacked_l, hidden, param.shape[0], device="meta")
    gate, up = _expert_input(prefix, stacked, rank, moe)

    def by_block(weight: Tensor) -> Tensor:  # [M * F_l, H] -> [1, H, M, F_l]
        return weight.view(blocks, -1, hidden).permute(2, 0, 1).unsqueeze(0)

    return (
        _of_expert(gate, expert, lambda t: by_block(t)[:, :, : blocks - 1]),
        _of_expert(up, expert, lambda t: by_block(t)[:, :, blocks - 1]),
    )


def _of_expert(piece: Piece, expert: int, select: Callable[[Tensor], Tensor]) -> Piece:
    """The part of a piece of stacked weights that belongs to one of this rank's experts."""
    return replace(
        piece,
        offsets=(piece.offsets[0] + expert, *piece.offsets[1:]),
        sizes=(1, *piece.sizes[1:]),
        select=select,
    )


def fill(shards: Iterable[ParamShard], read: Callable[[Piece], Tensor]) -> None:
    """Overwrite each piece of each parameter with ``read(piece)``, shaped ``piece.sizes``."""
    with torch.no_grad():
        for shard in shards:
            for piece in shard.pieces:
                piece.select(shard.param.data).copy_(read(piece))


def initialise(chunks: Sequence[OpenMoEModel], config: RunConfig, vocab_size: int) -> None:
    """Set the initial weights, a function of the seed and the logical name alone.

    Args:
        chunks: the model chunks of this rank, without wrappers.
        config: of the run.
        vocab_size: V, padded.
    """
    seed = config.train.seed
    table = logical_parameters(config.model, config.moe, vocab_size)

    def read(piece: Piece) -> Tensor:
        parameter = table[piece.name]
        if parameter.kind == "expert":
            # Each expert has its own seed, so that a rank draws only the experts it holds.
            first, count = piece.offsets[0], piece.sizes[0]
            experts = [
                initial_expert(piece.name, parameter, seed, e) for e in range(first, first + count)
            ]
            block = torch.stack(experts).reshape(count, *piece.view_shape[1:])
            index = (slice(None), *piece.index[1:])
            return block[index]
        return piece.block_of(initial_tensor(piece.name, parameter, seed))

    fill(model_shards(chunks, config.model, config.moe), read)
