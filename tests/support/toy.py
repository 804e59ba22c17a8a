"""A small model on Megatron-Core's parallel layers, and the same model in plain torch.

It has what layouts can get wrong: a vocabulary-parallel embedding and loss, tensor-parallel layers,
norms whose gradients are sums over the sequence, weights that each expert-parallel rank has alone,
and dropout. The twin knows nothing of layouts and is differentiated by autograd alone.
Shapes: S sequence, B batch, H width, F inner width, V vocabulary, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.parallel.context import ParallelContext, initialize_parallel
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.platform import activate

H, INNER, V, S, B, E = 16, 32, 64, 8, 2, 4
NUM_LAYERS, GLOBAL_BATCH = 4, 16


def run_config(**parallel: Any) -> RunConfig:
    """A configuration with these fields of the parallel section."""
    base = RunConfig()
    return replace(
        base,
        model=replace(
            base.model,
            num_layers=NUM_LAYERS,
            hidden_size=H,
            ffn_hidden_size=INNER,
            num_attention_heads=4,
        ),
        moe=replace(
            base.moe,
            num_experts=E,
            moe_layer_freq="[1]*4",
            moe_shared_expert_intermediate_size=INNER,
        ),
        data=replace(base.data, seq_length=S),
        train=replace(base.train, micro_batch_size=B, global_batch_size=GLOBAL_BATCH),
        parallel=replace(base.parallel, **parallel),
    )


def context(world_size: int, **parallel: Any) -> ParallelContext:
    """Process groups for such a configuration."""
    config = run_config(**parallel)
    layout = resolve_layout(config, world_size, V)
    return initialize_parallel(layout, config.parallel, activate(), config.train.seed)


def weight(name: str, *shape: int) -> Tensor:
    """The logical weight of that name, the same in every process."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def tokens() -> Tensor:
    """[GLOBAL_BATCH, S + 1] token ids of one step."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, V, (GLOBAL_BATCH, S + 1), generator=generator)


def micro_batches(layout: Layout, dp_rank: int) -> list[Tensor]:
    """[B, S + 1] for each micro-batch of one data-parallel rank."""
    rows = tokens().view(layout.num_microbatches, layout.dp, B, S + 1)
    return [rows[m, dp_rank] for m in range(layout.num_microbatches)]


def expert_of(tokens_SB: Tensor) -> Tensor:
    """A fixed routing: the token's id says which expert."""
    return tokens_SB % E


class Twin:
    """The model in plain torch on one process, with its weights by logical name."""

    def __init__(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {"embedding": (V, H), "output": (V, H)}
        for i in range(NUM_LAYERS):
            shapes |= {f"{i}.up": (INNER, H), f"{i}.down": (H, INNER), f"{i}.expert": (E, H, H)}
        self.weights = {n: weight(n, *shape).requires_grad_() for n, shape in shapes.items()}
        self.weights |= {f"{i}.norm": torch.ones(H).requires_grad_() for i in range(NUM_LAYERS)}

    def loss(self) -> Tensor:
        """Mean cross entropy over the step's tokens."""
        w, ids_SB = self.weights, tokens()[:, :-1].T
        x = w["embedding"][ids_SB]
        for i in range(NUM_LAYERS):
            y = F.rms_norm(x, (H,), w[f"{i}.norm"])
            inner = F.gelu(y @ w[f"{i}.up"].T)
            routed = torch.einsum("sbh,sbgh->sbg", y, w[f"{i}.expert"][expert_of(ids_SB)])
            x = x + inner @ w[f"{i}.down"].T + routed
        logits = x @ w["output"].T
        return F.cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].T.flatten())


def twin() -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by logical name."""
    model = Twin()
    loss = model.loss()
    loss.backward()
    grads = {name: w.grad for name, w in model.weights.items() if w.grad is not None}
    return loss.item(), grads


@dataclass(frozen=True)
class Shard:
    """Which part of a logical tensor a local parameter is: index of the part along a dimension."""

    name: str
    dim: int | None = None
    index: int = 0

    def of(self, full: Tensor, size: int) -> Tensor:
        return full if self.dim is None else full.narrow(self.dim, self.index * size, size)


def build_chunks(
    ctx: ParallelContext,
    *,
    dropout: float = 0.0,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """The chunks of this rank, without gradient buffers."""
    from tests.support.toy_chunk import ToyChunk, megatron_settings

    config = megatron_settings(ctx, dtype)
    chunks = []
    for index in range(ctx.layout.num_chunks):
        layers = ctx.layout.layers_of_chunk(ctx.pp_rank, index)
        vp_stage = index if ctx.layout.vp else None
        chunks.append(ToyChunk(config, ctx, layers, vp_stage, dropout, recompute))
    return chunks


def wrap(ctx: ParallelContext, chunks: list[Any], **ddp: Any) -> list[Any]:
    """Megatron-Core's gradient buffers around each chunk."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp),
            chunk,
            disable_bucketing=index > 0,
            pg_collection=ctx.pgs,
        )
        for index, chunk in enumerate(chunks)
    ]


def forward_step(batches: Iterator[Tensor], chunk: Any) -> tuple[Tensor, Any]:
    """What the schedule calls; reports each micro-batch's mean loss."""
    rows = next(batches)

    def loss(losses_SB: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = losses_SB.mean()
        return mean, {"loss": mean.detach().clone()}

    return chunk(rows), loss


def gradients(chunks: list[Any]) -> list[tuple[Shard, Tensor]]:
    """Reduced gradients of this rank with the parts they are."""
    found = []
    for chunk in chunks:
        module = getattr(chunk, "module", chunk)
        for name, param in module.named_parameters():
            found.append((module.shards[name], param.main_grad.clone()))
    return found
