#!/usr/bin/env bash
# OpenMoE 8B/32E on one node with 8 GPUs of 80 GB.
#
#   DATA_PATH=/data/corpus_document TOKENIZER=/data/tokenizer.model SAVE=/ckpt \
#     examples/pretrain_8b_node.sh [more flags of pretrain_openmoe.py]
#
# Layout: experts over all 8 ranks (EP 8), everything else data parallel. A rank holds 1.07e9
# expert parameters at 18 bytes (bf16 weight, fp32 gradient, main weight, two moments) and 3.27e9
# others at 7.5 bytes (optimizer state sharded over 8): 44 GB; the rest is for activations.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

: "${DATA_PATH:?prefix of the .bin/.idx files made by tools/preprocess_data.py}"
: "${TOKENIZER:?SentencePiece model file}"
: "${SAVE:?directory for checkpoints}"

export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

LAYOUT=(
  --expert-model-parallel-size 8
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --recompute-granularity selective --recompute-modules core_attn
)
DATA=(
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER"
  --data-path "$DATA_PATH" --split "989,10,1"
)
# AdamW instead of the preset's Adafactor: its state is sharded over all replicas, at the price of two
# moments for every parameter. For Adafactor as published, remove this and the distributed optimizer.
OPTIMIZER=(
  --optimizer adam --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --clip-grad 1.0
  --weight-decay 0.1 --adam-beta2 0.95
)
RUN=(
  --bf16 --micro-batch-size 1 --global-batch-size 1024 --train-iters 50000
  --save "$SAVE" --load "$SAVE" --allow-missing-load --save-interval 500
  --eval-interval 500 --eval-iters 20 --log-interval 10 --tensorboard-dir "$SAVE/tensorboard"
)

# The address, because a machine's own host name may not resolve.
torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 8 pretrain_openmoe.py \
  --preset openmoe-8b-32e-released \
  "${LAYOUT[@]}" "${DATA[@]}" "${OPTIMIZER[@]}" "${RUN[@]}" "$@"
