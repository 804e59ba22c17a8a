"""Muon: the momentum of a matrix, orthogonalized, is its update. All else is updated by AdamW.

Jordan et al., "Muon: an optimizer for hidden layers" (2024), with the scale of Moonlight
(arXiv 2502.16982). For a matrix W [out, in] with gradient G:

    M <- m M + (1 - m) G                                 or m M + (1 - m) G once more, Nesterov's
    W <- (1 - lr decay) W - lr scale orthogonal(M)

A matrix is what multiplies a vector: q, k and v separately, each block of a gate, each expert.
Local parameters are otherwise: fused, stacked and split over ranks, so `Stack` says where matrices
lie in them. Of a matrix that tensor parallelism splits, the whole one is orthogonalized: gathered
and computed by each rank (`duplicated`), or with X X^T summed over ranks (`distributed`). Taking
each rank's block as a matrix (`blockwise`) needs no communication, and is another optimizer in
every layout. Nothing is read back by the host.

Example: up [F, H] over two ranks, each with [F / 2, H]. `duplicated` gathers [F, H] and keeps the
rank's rows of the result; `distributed` sums X^T X [H, H], to which each rank's rows contribute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.config import OptimizerConfig
from megatron_moe.model.logical import OF_GEMMS, ParameterKind
from megatron_moe.model.sharding.optimizer_state import replace_inner
from megatron_moe.model.sharding.shards import ParamShard, Piece
from megatron_moe.training.optim.factoring import Dims, split_dims
from megatron_moe.training.optim.orthogonalize import coefficients, orthogonalize


@dataclass(frozen=True)
class Stack:
    """Where equally shaped matrices lie in a local parameter.

    Args:
        select: maps a tensor shaped like the parameter to a view of it.
        batch: dimensions of the view that enumerate matrices.
        rows: those that a matrix's rows consist of.
        columns: those that its columns consist of.
        fan_out: outputs of the whole matrix.
        fan_in: inputs of the whole matrix.
        split: the dimension of [B, R, C] of which this rank has a part.
    """

    select: Callable[[Tensor], Tensor]
    batch: Dims
    rows: Dims
    columns: Dims
    fan_out: int
    fan_in: int
    split: int | None

    @classmethod
    def of(cls, piece: Piece, *, expert: bool) -> Stack:
        """Of a block of a logical tensor, [out, in], or [E, in, out] of experts."""
        groups = split_dims(piece.logical_shape, piece.view_shape)
        batch, (rows, columns) = (groups[0] if expert else ()), groups[-2:]
        out, sizes = (columns if expert else rows), piece.view_shape
        if "gate" in piece.name.split("."):  # [2, F]: two blocks, of which each is a matrix
            blocks, out = out[:-1], out[-1:]
            batch += blocks
            rows, columns = (rows, out) if expert else (out, columns)
        into = rows if expert else columns
        cut = [
            dim
            for dim, kept in ((1, rows), (2, columns))
            if any(piece.sizes[i] < sizes[i] for i in kept)
        ]
        fan_out, fan_in = (prod(sizes[i] for i in kept) for kept in (out, into))
        split = cut[0] if cut else None
        return cls(piece.select, batch, rows, columns, fan_out, fan_in, split)

    @classmethod
    def of_rows(cls, pieces: Sequence[Piece]) -> Stack:
        """Of a parameter [out, in] as one matrix: q, k and v below each other."""
        rows = sum(piece.logical_shape[0] for piece in pieces)
        split = 1 if any(piece.sizes[0] < piece.view_shape[0] for piece in pieces) else None
        return cls(lambda t: t, (), (0,), (1,), rows, pieces[0].logical_shape[1], split)

    def matrices(self, tensor: Tensor) -> Tensor:
        """[B, R, C] of a tensor shaped like the parameter."""
        view = self.select(tensor)
        order = (*self.batch, *self.rows, *self.columns)
        extents = [
            prod(view.shape[i] for i in dims) for dims in (self.batch, self.rows, self.columns)
        ]
        return view.permute(order).reshape(extents)

    def subtract(self, tensor: Tensor, update_BRC: Tensor, rate: float) -> None:
        """Tensor - rate x update, in place."""
        order = (*self.batch, *self.rows, *self.columns)
        view = self.select(tensor).permute(order)
        view.sub_(update_BRC.reshape(view.shape), alpha=rate)


class Muon(torch.optim.Optimizer):
    """Muon over this rank's matrices and AdamW over its other parameters.

    Args:
        param_groups: what Megatron-Core's wrapper updates: parameters, or their fp32 masters.
        shards: the logical tensors that each of these consists of.
        kinds: of each logical tensor.
        settings: of both optimizers.
        pgs: `tp` splits dense matrices, `expt_tp` splits experts.
    """

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        shards: Mapping[Tensor, ParamShard],
        kinds: Mapping[str, ParameterKind],
        settings: OptimizerConfig,
        pgs: ProcessGroupCollection,
    ) -> None:
        super().__init__(list(param_groups), {"lr": settings.lr, "step": 0, "weight_decay": 0.0})
        self._settings = settings
        self._stacks: dict[Tensor, list[Stack]] = {}
        self._groups: dict[Tensor, ProcessGroup] = {}
        for main in (main for group in self.param_groups for main in group["params"]):
            shard = shards[main]
            state: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
            if all(kinds[piece.name] in OF_GEMMS for piece in shard.pieces):
                self._stacks[main] = stacks_of(shard, settings)
                self._groups[main] = pgs.expt_tp if shard.expert else pgs.tp
                state = ("momentum_buffer",)
            self.state[main] = {kind: torch.zeros_like(main.detach()) for kind in state}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "gradients are ready when this is called"
        for group in self.param_groups:
            group["step"] += 1
            for main in group["params"]:
                if main.grad is None:
                    continue
                main.mul_(1.0 - group["lr"] * group["weight_decay"])
                if main in self._stacks:
                    self._orthogonal_step(main, group["lr"])
                else:
                    _adam_step(main, self.state[main], group, self._settings)

    def _orthogonal_step(self, main: Tensor, rate: float) -> None:
        settings, momentum = self._settings, self.state[main]["momentum_buffer"]
        momentum.lerp_(main.grad, 1.0 - settings.muon_momentum)
        update = momentum
        if settings.muon_use_nesterov:
            update = main.grad.lerp(momentum, settings.muon_momentum)  # type: ignore[union-attr]
        for stack in self._stacks[main]:
            orthogonal = _orthogonal(stack, stack.matrices(update), self._groups[main], settings)
            stack.subtract(main, orthogonal, rate * update_scale(stack, settings))


def install_muon(
    optimizer: Any,
    shards: Iterable[ParamShard],
    kinds: Mapping[str, ParameterKind],
    settings: OptimizerConfig,
    pgs: ProcessGroupCollection,
) -> None:
    """Replace the optimizer inside Megatron-Core's wrappers by Muon.

    Args:
        optimizer: Megatron-Core's, without sharding over data-parallel ranks.
        shards: the table of this rank's parameters.
        kinds: of each logical tensor.
        settings: of Muon and AdamW.
        pgs: this rank's groups.
    """
    replace_inner(
        optimizer, shards, lambda groups, table: Muon(groups, table, kinds, settings, pgs)
    )


def stacks_of(shard: ParamShard, settings: OptimizerConfig) -> list[Stack]:
    """The matrices of a local parameter."""
    names = {piece.name.split(".")[-2] for piece in shard.pieces}
    if names == {"query", "key", "value"} and not settings.muon_split_qkv:
        return [Stack.of_rows(shard.pieces)]
    return [Stack.of(piece, expert=shard.expert) for piece in shard.pieces]


def update_scale(stack: Stack, settings: OptimizerConfig) -> float:
    """Factor of the orthogonal matrix, whose elements have a root mean square of 1/sqrt(longer).

    `spectral`: sqrt(longer side), so that this is 1. `unit_rms_norm`: sqrt(out / in), so that
    outputs change alike whatever the shape (Bernstein). `shape_scaling`: the same, at least 1.
    """
    ratio = stack.fan_out / stack.fan_in
    scales = {
        "spectral": max(stack.fan_out, stack.fan_in) ** 0.5,
        "unit_rms_norm": ratio**0.5,
        "shape_scaling": max(1.0, ratio) ** 0.5,
    }
    return scales[settings.muon_scale_mode] * settings.muon_extra_scale_factor


def _orthogonal(
    stack: Stack, block_BRC: Tensor, group: ProcessGroup, settings: OptimizerConfig
) -> Tensor:
    """This rank's block of the orthogonalized matrices."""
    steps = coefficients(settings.muon_coefficient_type, settings.muon_num_ns_steps)
    with _products(block_BRC.device, settings.muon_fp32_matmul_prec) as dtype:
        if stack.split is None or settings.muon_tp_mode == "blockwise":
            return orthogonalize(block_BRC, steps, dtype=dtype)
        if settings.muon_tp_mode == "distributed":

            def total(tensor: Tensor) -> None:
                torch.distributed.all_reduce(tensor, group=group)

            return orthogonalize(block_BRC, steps, dtype=dtype, along=stack.split, total=total)
        whole = orthogonalize(_gathered(block_BRC, stack.split, group), steps, dtype=dtype)
        return whole.chunk(group.size(), dim=stack.split)[group.rank()]


@contextlib.contextmanager
def _products(device: torch.device, precision: str) -> Iterator[torch.dtype]:
    """The type of products in a precision of `--muon-fp32-matmul-prec`; sets TF32 meanwhile.

    Always fp32 on a CPU, where torch's bf16 products of [16, 256, 512] took 13.4 s on a core and
    those of fp32 0.4 s.
    """
    if device.type == "cpu":
        yield torch.float32
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "high"
    try:
        yield torch.bfloat16 if precision == "medium" else torch.float32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _gathered(block_BRC: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    blocks = [torch.empty_like(block_BRC) for _ in range(group.size())]
    torch.distributed.all_gather(blocks, block_BRC.contiguous(), group=group)
    return torch.cat(blocks, dim=dim)


def _adam_step(
    main: Tensor, state: dict[str, Tensor], group: dict[str, Any], settings: OptimizerConfig
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), after its weight decay."""
    assert main.grad is not None
    first, second = state["exp_avg"], state["exp_avg_sq"]
    beta1, beta2, count = settings.adam_beta1, settings.adam_beta2, group["step"]
    first.lerp_(main.grad, 1.0 - beta1)
    second.mul_(beta2).addcmul_(main.grad, main.grad, value=1.0 - beta2)
    root = (second.sqrt() / (1.0 - beta2**count) ** 0.5).add_(settings.adam_eps)
    main.addcdiv_(first, root, value=-group["lr"] / (1.0 - beta1**count))
