"""Which part of the logical model each local parameter is: the bridge between layouts.

The logical model (`logical.py`) has unfused weights that know nothing of ranks. A local parameter
is one block, or a few interleaved ones, of logical tensors: heads of q, k and v; halves of a gate
and an up projection; some experts. Everything that must not depend on the layout - initial values,
checkpoints, parity with the reference model - goes through this table.

Shapes: V vocabulary, H hidden, N heads, D head dimension, F feed-forward width, E experts, M input
blocks of a feed-forward (2 or 3); a suffix _l means this rank's share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.model.logical import initial_expert, initial_tensor, logical_parameters
from megatron_moe.model.openmoe import OpenMoEModel

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One block of one logical tensor.

    Args:
        name: the logical tensor.
        logical_shape: its shape.
        view_shape: a shape of as many elements in which this rank's part is a rectangular block.
        offsets: where that block starts in the view.
        sizes: how large it is.
        select: takes a tensor shaped like the local parameter to the view of it that is this block.
    """

    name: str
    logical_shape: Shape
    view_shape: Shape
    offsets: Shape
    sizes: Shape
    select: Callable[[Tensor], Tensor]

    def block_of(self, logical: Tensor) -> Tensor:
        """This block, as a view of the whole logical tensor."""
        index = tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))
        return logical.reshape(self.view_shape)[index]


@dataclass(frozen=True, kw_only=True)
class ParamShard:
    """A local parameter and what it is.

    Args:
        param: the parameter.
        local_name: its name in the chunk, with the chunk's number in front.
        pieces: its blocks, which together cover it.
        writer: whether this rank writes it among those that hold the same block because of tensor
            parallelism or tied embeddings; data-parallel replicas are not counted here.
        expert: whether its replicas are `pgs.expt_dp` rather than `pgs.dp_cp`.
    """

    param: Tensor
    local_name: str
    pieces: tuple[Piece, ...]
    writer: bool
    expert: bool


@dataclass(frozen=True)
class _Rank:
    """This rank's coordinates and the sizes that the table needs."""

    tp: int
    tp_rank: int
    ep: int
    ep_rank: int
    etp: int
    etp_rank: int
    heads: int
    head_dim: int
    hidden: int
    blocks: int


def model_shards(
    chunks: Sequence[OpenMoEModel], model: ModelConfig, moe: MoEConfig
) -> list[ParamShard]:
    """The table of all parameters of this rank, in a fixed order.

    Args:
        chunks: the model chunks of this rank, without wrappers.
        model: the dense part of the configuration they were built from.
        moe: the expert part.

    Raises:
        KeyError: a parameter is not in the table.
    """
    shards = []
    for number, chunk in enumerate(chunks):
        rank = _coordinates(chunk, model)
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, param in chunk.named_parameters():
            shards.append(_shard(f"{number}.{name}", name, param, layers, rank, moe, chunk))
    return shards


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
        model.kv_channels,
        model.hidden_size,
        model.input_blocks,
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
        pieces = tuple(_renamed(piece, "embedding.weight") for piece in pieces)
    return ParamShard(
        param=param, local_name=local_name, pieces=pieces, writer=writer, expert=expert
    )


def _renamed(piece: Piece, name: str) -> Piece:
    return Piece(**{**vars(piece), "name": name})


_REPLICATED = {
    "input_layernorm.weight": "attention_norm.weight",
    "pre_mlp_layernorm.weight": "ffn_norm.weight",
    "shared_norm.weight": "shared_norm.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "moe.router.weight": "moe.router.weight",
}


def _pieces(
    prefix: str, suffix: str, param: Tensor, rank: _Rank, moe: MoEConfig
) -> tuple[bool, tuple[Piece, ...]]:
    """Whether all tensor-parallel ranks hold the same, and the blocks."""
    if suffix in _REPLICATED:
        return True, (_whole(prefix + _REPLICATED[suffix], param),)
    if suffix in ("embedding.word_embeddings.weight", "output_layer.weight"):
        name = "output.weight" if suffix.startswith("output") else "embedding.weight"
        return rank.tp == 1, (_split(name, param, 0, rank.tp, rank.tp_rank),)
    if suffix == "self_attention.linear_qkv.weight":
        return False, _qkv(prefix + "attention.", param, rank)
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
    raise KeyError(f"parameter {prefix}{suffix} has no logical name")


def _whole(name: str, param: Tensor) -> Piece:
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
    """The engine interleaves q, k, v head by head: [N_l, 3, D, H]."""
    heads, dim, hidden = rank.heads // rank.tp, rank.head_dim, rank.hidden
    return tuple(
        Piece(
            name=f"{prefix}{name}.weight",
            logical_shape=(rank.heads * dim, hidden),
            view_shape=(rank.heads, dim, hidden),
            offsets=(rank.tp_rank * heads, 0, 0),
            sizes=(heads, dim, hidden),
            select=lambda t, i=i: t.view(heads, 3, dim, hidden)[:, i],  # type: ignore[misc]
        )
        for i, name in enumerate(("query", "key", "value"))
    )


def _dense_input(prefix: str, param: Tensor, rank: _Rank) -> tuple[Piece, ...]:
    """[M * F_l, H]: the gate's blocks, then the up block."""
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
    """[E_l, H, M * F_l]: per expert the gate's blocks, then the up block, along the columns."""
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


def fill(shards: Iterable[ParamShard], read: Callable[[Piece], Tensor]) -> None:
    """Overwrite every local parameter with what ``read`` gives for each of its pieces."""
    with torch.no_grad():
        for shard in shards:
            for piece in shard.pieces:
                piece.select(shard.param.data).copy_(read(piece))


def initialise(chunks: Sequence[OpenMoEModel], config: RunConfig, vocab_size: int) -> None:
    """Initial weights, a function of the seed and the logical name alone."""
    seed = config.train.seed
    table = logical_parameters(config.model, config.moe, vocab_size)

    def read(piece: Piece) -> Tensor:
        parameter = table[piece.name]
        if parameter.kind == "expert":
            first, count = piece.offsets[0], piece.sizes[0]
            experts = [
                initial_expert(piece.name, parameter, seed, e) for e in range(first, first + count)
            ]
            block = torch.stack(experts).reshape(count, *piece.view_shape[1:])
            index = (slice(None), *_slices(piece)[1:])
            return block[index]
        return piece.block_of(initial_tensor(piece.name, parameter, seed))

    fill(model_shards(chunks, config.model, config.moe), read)


def _slices(piece: Piece) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))


def uncovered(shards: Iterable[ParamShard]) -> Iterator[str]:
    """Names of parameters whose pieces do not cover them exactly; for tests."""
    for shard in shards:
        if sum(prod(piece.sizes) for piece in shard.pieces) != shard.param.numel():
            yield shard.local_name
