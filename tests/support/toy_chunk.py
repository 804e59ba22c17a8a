"""The parallel side of `tests.support.toy`: one model chunk. Needs `activate` first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_moe.parallel.context import ParallelContext
from tests.support.toy import INNER, NUM_LAYERS, E, H, Shard, V, expert_of, weight


def megatron_settings(
    ctx: ParallelContext, dtype: torch.dtype = torch.float32
) -> TransformerConfig:
    layout = ctx.layout
    return TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=H,
        ffn_hidden_size=INNER,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_moe_experts=E,
        sequence_parallel=layout.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        # What a caller might well leave as it is; `forward_backward` has to know better.
        overlap_p2p_comm=False,
        batch_p2p_comm=True,
    )


class ToyChunk(MegatronModule):
    """Some consecutive layers, with the embedding before and the loss after them if due."""

    def __init__(
        self,
        config: TransformerConfig,
        ctx: ParallelContext,
        layers: range,
        vp_stage: int | None,
        dropout: float,
        recompute: bool,
    ) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.vp_stage = vp_stage
        self.pre_process = layers.start == 0
        self.post_process = layers.stop == NUM_LAYERS
        self.tp = ctx.pgs.tp
        self.sequence_parallel = ctx.layout.sequence_parallel
        self.recompute = recompute
        self.input_tensor: Tensor | None = None
        self.shards: dict[str, Shard] = {}
        if self.pre_process:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                V,
                H,
                init_method=nn.init.zeros_,
                reduce_scatter_embeddings=self.sequence_parallel,
                config=config,
                tp_group=self.tp,
            )
            self._fill("embedding.weight", Shard("embedding", 0, ctx.tp_rank), (V, H))
        self.layers = nn.ModuleList(ToyLayer(config, ctx, dropout) for _ in layers)
        for position, number in enumerate(layers):
            self._fill_layer(f"layers.{position}", number, ctx)
        if self.post_process:
            self.output = _column(config, V, self.tp)
            self._fill("output.weight", Shard("output", 0, ctx.tp_rank), (V, H))

    def _fill_layer(self, path: str, number: int, ctx: ParallelContext) -> None:
        self._fill(f"{path}.up.weight", Shard(f"{number}.up", 0, ctx.tp_rank), (INNER, H))
        self._fill(f"{path}.down.weight", Shard(f"{number}.down", 1, ctx.tp_rank), (H, INNER))
        self._fill(f"{path}.expert", Shard(f"{number}.expert", 0, ctx.ep_rank), (E, H, H))
        self.shards[f"{path}.norm"] = Shard(f"{number}.norm")

    def _fill(self, local: str, shard: Shard, shape: tuple[int, ...]) -> None:
        self.shards[local] = shard
        param = self.get_parameter(local)
        size = param.shape[shard.dim or 0]
        param.data.copy_(shard.of(weight(shard.name, *shape), size))
        # Otherwise Megatron-Core's gradient norm takes shards for copies and counts only the first.
        param.tensor_model_parallel = True  # type: ignore[attr-defined]

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, rows: Tensor) -> Tensor:
        ids_SB = rows[:, :-1].T.contiguous()
        if self.pre_process:
            x = self.embedding(ids_SB.T)
            x = x if self.sequence_parallel else x.transpose(0, 1).contiguous()
        else:
            assert self.input_tensor is not None
            x = self.input_tensor
        local_ids = self._own_part(ids_SB)
        for layer in self.layers:
            if self.recompute:
                x = tensor_parallel.checkpoint(layer, False, x, local_ids)
            else:
                x = layer(x, local_ids)
        if not self.post_process:
            return x
        logits, _ = self.output(x)
        labels_SB = rows[:, 1:].T.contiguous()
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels_SB)

    def _own_part(self, ids_SB: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return ids_SB
        return ids_SB.chunk(self.tp.size())[self.tp.rank()].contiguous()


class ToyLayer(nn.Module):
    """x + down(gelu(up(norm x))) + expert(norm x), with the expert chosen by the token's id."""

    def __init__(self, config: TransformerConfig, ctx: ParallelContext, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.Parameter(torch.ones(H, dtype=config.params_dtype))
        self.norm.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.up = _column(config, INNER, ctx.pgs.tp)
        self.down = tensor_parallel.RowParallelLinear(
            INNER,
            H,
            config=config,
            init_method=nn.init.zeros_,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=ctx.pgs.tp,
        )
        local = E // ctx.layout.ep
        self.expert = nn.Parameter(torch.zeros(local, H, H, dtype=config.params_dtype))
        self.expert.allreduce = False  # type: ignore[attr-defined]
        self.ep_group = ctx.pgs.ep
        self.first_expert = local * ctx.ep_rank

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = F.rms_norm(x, (H,), self.norm)
        inner, _ = self.up(y)
        inner = F.gelu(inner)
        if self.dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                inner = F.dropout(inner, self.dropout, self.training)
        out, _ = self.down(inner)
        return x + out + self._experts(y, ids)

    def _experts(self, y: Tensor, ids: Tensor) -> Tensor:
        """All tokens of the expert-parallel ranks meet all experts there; each keeps its own."""
        group = self.ep_group
        everyone = tensor_parallel.gather_from_sequence_parallel_region(y, group=group)
        experts = ids.new_empty(ids.shape[0] * group.size(), ids.shape[1])
        torch.distributed.all_gather_into_tensor(experts, expert_of(ids).contiguous(), group=group)
        parts = torch.zeros_like(everyone)
        for index in range(self.expert.shape[0]):
            mine = (experts == self.first_expert + index).unsqueeze(-1)
            parts = parts + (everyone * mine) @ self.expert[index].T
        return tensor_parallel.reduce_scatter_to_sequence_parallel_region(parts, group=group)


def _column(config: TransformerConfig, size: int, group: Any) -> Any:
    return tensor_parallel.ColumnParallelLinear(
        H,
        size,
        config=config,
        init_method=nn.init.zeros_,
        bias=False,
        gather_output=False,
        skip_bias_add=True,
        tp_group=group,
    )
