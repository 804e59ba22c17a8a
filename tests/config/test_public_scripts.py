"""Flags of three public launch scripts of Megatron-LM, from the command line to the model.

The flags are those of `examples/mixtral/train_mixtral_8x7b_distributed.sh` (Megatron-LM), of its
Qwen3-30B-A3B configuration with flags of a training run, and of public DeepSeek-V2-Lite scripts.
"""

from __future__ import annotations

import json

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageErrors
from megatron_moe.model.counting import count_parameters
from megatron_moe.planning.describe import describe

BASE = (
    "--use-mcore-models --disable-bias-linear --normalization RMSNorm --position-embedding-type "
    "rope --swiglu --untie-embeddings-and-output-weights --no-masked-softmax-fusion --bf16 "
    "--micro-batch-size 1 --seq-length 4096 "
)
MIXTRAL = BASE + (
    "--max-position-embeddings 32768 --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 "
    "--num-attention-heads 32 --attention-dropout 0.0 --hidden-dropout 0.0 "
    "--group-query-attention --num-query-groups 8 --no-position-embedding --rotary-base 1000000 "
    "--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall "
    "--overlap-param-gather --overlap-grad-reduce --data-path my_data --split 99990,8,2 "
    "--global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 "
    "--lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1 --lr-warmup-iters 500 "
    "--clip-grad 1.0 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 "
    "--expert-model-parallel-size 8 --use-distributed-optimizer --sequence-parallel "
    "--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save c --load c "
    "--tensorboard-dir t --no-load-optim --no-load-rng "
)
QWEN = BASE + (
    "--no-rope-fusion --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 "
    "--num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128 "
    "--qk-layernorm --num-experts 128 --moe-ffn-hidden-size 768 --moe-router-topk 8 "
    "--moe-router-dtype fp32 --moe-aux-loss-coeff 1e-3 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --max-position-embeddings 40960 "
    "--make-vocab-size-divisible-by 1187 --rotary-percent 1.0 --rotary-base 1000000 "
    "--no-bias-swiglu-fusion --sequence-parallel --moe-permute-fusion --lr 1e-4 "
)
DEEPSEEK = BASE + (
    "--num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 --num-attention-heads 16 "
    "--multi-latent-attention --kv-lora-rank 512 --v-head-dim 128 --qk-head-dim 128 "
    "--qk-pos-emb-head-dim 64 --qk-layernorm --rotary-scaling-factor 40 --mscale 0.707 "
    "--num-experts 64 --moe-layer-freq ([0]+[1]*26) --moe-router-topk 6 --moe-ffn-hidden-size 1408 "
    "--moe-shared-expert-intermediate-size 2816 --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 --mtp-num-layers 1 "
    "--max-position-embeddings 4096 --lr 1e-4 "
)


def config_of(script: str) -> RunConfig:
    config = parse_args(["--preset", "megatron", *script.split()]).config
    validate(config)
    return config


@pytest.mark.parametrize(
    ("script", "vocabulary", "total", "activated"),
    [
        # Published: 46.7 and 12.9 billion parameters (arXiv 2401.04088).
        (MIXTRAL, 32000, 46_702_792_704, 12_879_925_248),
        # Published: 30.5 and 3.3 billion (model card of Qwen3-30B-A3B).
        (QWEN, 151936, 30_532_122_624, 3_353_032_704),
    ],
)
def test_a_public_script_is_the_published_model(
    script: str, vocabulary: int, total: int, activated: int
) -> None:
    config = config_of(script)
    counts = count_parameters(config.model, config.moe, vocabulary)
    assert (counts.total, counts.activated) == (total, activated)


def test_mixtral_is_described_as_published() -> None:
    flags = ["--preset", "megatron", *MIXTRAL.split(), "--vocab-size", "32000", "--describe"]
    command = parse_args(flags)
    found = json.loads(describe(command.config, "json", 32))
    assert "46702792704" in json.dumps(found)
    text = describe(command.config, "text", 32)
    assert "46,702,792,704" in text
    assert "12,879,925,248" in text


def test_what_mixtral_leaves_unsaid_is_listed_without_the_preset() -> None:
    notes = parse_args(MIXTRAL.split()).notes
    listed = [line.split(":")[0].strip() for line in notes[2:]]
    for flag in (
        "--softmax-scale",
        "--moe-shared-expert-intermediate-size",
        "--moe-expert-capacity-factor",
        "--moe-layer-freq",
        "--moe-router-pre-softmax",
        "--moe-loss-convention",
        "--norm-epsilon",
        "--kv-channels",
    ):
        assert flag in listed


def test_deepseek_fails_with_a_line_for_each_feature() -> None:
    with pytest.raises(UsageErrors) as error:
        config_of(DEEPSEEK)
    lines = [str(one) for one in error.value.errors]
    (mla,) = [line for line in lines if "multi-latent attention (MLA" in line]
    assert mla.startswith("--multi-latent-attention, --kv-lora-rank, --v-head-dim, --qk-head-dim")
    assert len(lines) == 2
    assert any("(MTP) is not built" in line for line in lines)
