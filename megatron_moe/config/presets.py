"""The published sizes, and a tiny one for a laptop.

Sizes: OpenMoE paper, table of model configurations, and the released `config.json` files. The paper
variant has three-matrix FFNs, the shared expert parallel to the others and one embedding matrix;
the released one four-matrix FFNs, the shared expert after the others and untied embeddings.

The `-plus` presets are the paper variant with the changes to experts and routing that did better
in the experiments of docs/experiments.md, at sizes that are far from these.

The published released sizes assume groups of one row for capacity and balance loss. The groups of
the released runs, of up to 4096 tokens by the number of TPUs, are in `docs/routing.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.shorthand import split_experts
from megatron_moe.config.training import DataConfig, OptimizerConfig, TrainConfig

OPENMOE_VOCAB = 256384
"""umT5 SentencePiece: 256000 pieces, 300 sentinels, padded."""


@dataclass(frozen=True)
class _Size:
    layers: int
    every: int
    hidden: int
    ffn: int
    heads: int
    head_dim: int
    experts: int
    batch: int
    z_loss: float = 1e-4


_SIZES = {
    "base-16e": _Size(12, 4, 768, 3072, 12, 64, 16, 128),
    "8b-32e": _Size(24, 6, 2048, 8192, 24, 128, 32, 1024),
    "34b-32e": _Size(32, 4, 3072, 12288, 24, 128, 32, 1024, z_loss=1e-3),
}
_RELEASED_FFN = {"base-16e": 2048}
"""Base was released with a narrower FFN than the paper's table says."""


def _run(size: _Size, released: bool, published: bool = True) -> RunConfig:
    model = ModelConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        kv_channels=size.head_dim,
        ffn_variant="gated-swiglu" if released else "swiglu",
        untie_embeddings_and_output_weights=released,
        zero_padding_activations=released and published,
    )
    moe = MoEConfig(
        num_experts=size.experts,
        moe_layer_freq=f"([0]*{size.every - 1}+[1])*{size.layers // size.every}",
        moe_shared_expert_intermediate_size=size.ffn,
        moe_shared_expert_placement="sequential" if released else "parallel",
        moe_z_loss_coeff=size.z_loss,
        moe_ignore_padding_tokens=not (released and published),
    )
    if released and published:
        # Equal to the default while a group is a row; follows --moe-capacity-group-size.
        moe = replace(moe, moe_router_load_balancing_type="group_aux_loss")
    # 1 / sqrt(max(step, 10000)): flat at 0.01 for 10000 steps.
    optimizer = OptimizerConfig(
        optimizer="adafactor",
        lr=0.01,
        lr_decay_style="inverse-square-root",
        lr_warmup_iters=10000,
        lr_warmup_init=0.01,
    )
    return RunConfig(
        model=model,
        moe=moe,
        data=DataConfig(seq_length=2048, vocab_size=OPENMOE_VOCAB),
        train=TrainConfig(micro_batch_size=1, global_batch_size=size.batch),
        optimizer=optimizer,
    )


def _plus(run: RunConfig) -> RunConfig:
    """One choice in place of two, split in four; the variant `plus` of docs/experiments.md."""
    moe = replace(
        run.moe,
        moe_router_topk=1,
        moe_router_type="contextual",
        moe_token_drop_policy="probs",
    )
    return replace(run, moe=split_experts(moe, 4, run.model.ffn_hidden_size))


def _tiny(released: bool) -> RunConfig:
    # As in the published sizes, FFNs are four times as wide as the model.
    size = _Size(4, 2, 256, 1024, 4, 64, 8, 8)
    run = _run(size, released, published=False)
    return replace(
        run,
        data=DataConfig(seq_length=256),
        train=TrainConfig(micro_batch_size=4, global_batch_size=8),
        optimizer=OptimizerConfig(lr=1e-3, lr_decay_style="cosine", lr_warmup_iters=10),
    )


PRESETS: dict[str, RunConfig] = {
    "openmoe-tiny": _tiny(released=False),
    "openmoe-tiny-released": _tiny(released=True),
    "openmoe-tiny-plus": _plus(_tiny(released=False)),
}
for _name, _size in _SIZES.items():
    PRESETS[f"openmoe-{_name}"] = _run(_size, released=False)
    PRESETS[f"openmoe-{_name}-plus"] = _plus(PRESETS[f"openmoe-{_name}"])
    PRESETS[f"openmoe-{_name}-released"] = _run(
        replace(_size, ffn=_RELEASED_FFN.get(_name, _size.ffn)), released=True
    )
