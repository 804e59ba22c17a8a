"""A small model with a tokenizer of bytes, and its checkpoints in both layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_moe.config import DataConfig, ModelConfig, MoEConfig, RunConfig
from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.model import LogicalModel, of_tensor
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.simple import ByteTokenizer

PADDED = 384
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=32,
        num_attention_heads=2,
        kv_channels=16,
        max_position_embeddings=40,
    ),
    moe=MoEConfig(
        num_experts=4,
        moe_layer_freq="[0,1]",
        moe_shared_expert_intermediate_size=32,
        moe_eval_capacity_factor=0.25,
        moe_min_capacity=1,
    ),
    data=DataConfig(tokenizer_type="ByteTokenizer"),
)
DROPLESS = replace(CONFIG.moe, moe_eval_capacity_factor=None)
TOKENIZER = ByteTokenizer()


def model(moe: MoEConfig = DROPLESS) -> ReferenceOpenMoE:
    """A model that likes bytes of text, with experts that matter."""
    made = ReferenceOpenMoE(CONFIG.model, moe, PADDED, seed=2)
    with torch.no_grad():
        made.layers[1].moe.experts.down *= 50  # what experts do, and so drops, must show
        made.output.weight *= 8  # peaked enough for different texts to differ
        made.output.weight[[0, 1, 2]] = 0  # no special ids: an early end would hide the rest
        made.output.weight[259:] *= 8  # and padding that would win if it were allowed
    return made.eval()


def save(
    directory: Path,
    config: RunConfig = CONFIG,
    layout: str = "native",
    step: int = 7,
    made: ReferenceOpenMoE | None = None,
) -> Path:
    """A checkpoint of ``made``, or of `model()`, trained with the tokenizer of ``config``."""
    source = LogicalModel(
        source="the case",
        config=config,
        vocab_size=PADDED,
        tensors={name: of_tensor(t) for name, t in (made or model()).state_dict().items()},
        step=step,
        tokenizer_hash=build_tokenizer(config.data).identity,
    )
    write(source, ConversionTarget(format=layout, path=directory), lambda _: None)
    return directory


def greedy(made: ReferenceOpenMoE, prompt: list[int], tokens: int) -> list[int]:
    """The most probable continuation, from the logits of plain forward passes."""
    ids = list(prompt)
    for _ in range(tokens):
        logits = made(torch.tensor([ids]), training_capacity=False).logits[0, -1]
        ids.append(int(logits[: TOKENIZER.vocab_size].argmax()))
    return ids[len(prompt) :]
