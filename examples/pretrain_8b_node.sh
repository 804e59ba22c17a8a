#!/usr/bin/env bash
# OpenMoE 8B/32E with torchrun, without a scheduler: on one node with 8 GPUs of 80 GB, or on several.
#
#   DATA_PATH=/data/corpus_document TOKENIZER=/data/tokenizer.model SAVE=/ckpt \
#     examples/pretrain_8b_node.sh [more flags of pretrain_openmoe.py]
#
# On several nodes, the same on each, with the address of one of them:
#
#   NODES=4 RENDEZVOUS=node1:29400 DATA_PATH=... examples/pretrain_8b_node.sh
#
# DATA_ARGS_PATH names a file instead of DATA_PATH. Other variables: examples/common.sh.
#
# Layout: experts over the 8 ranks of a node (EP 8), everything else data parallel. On one node a rank
# holds 1.07e9 expert parameters at 18 bytes (bf16 weight, fp32 gradient, main weight, two moments) and
# 3.27e9 others at 7.5 bytes (optimizer state sharded over 8): 44 GB; the rest is for activations.
#
# SIGTERM saves and ends the run with status 75; the same command resumes it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

: "${TOKENIZER:?SentencePiece model file}"
: "${SAVE:?directory for checkpoints}"

# shellcheck source=examples/common.sh
source examples/common.sh
data_flags

LAYOUT=(
  --expert-model-parallel-size 8
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --recompute-granularity selective --recompute-modules core_attn
)
# AdamW instead of the preset's Adafactor: its state is sharded over all replicas, at the price of two
# moments for every parameter. Its warm-up starts at 0; the preset's at its own, higher rate. For
# Adafactor as published, remove this and the distributed optimizer.
OPTIMIZER=(
  --optimizer adam --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 2000
  --lr-warmup-init 0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95
)
RUN=(
  --bf16 --micro-batch-size 1 --global-batch-size 1024 --train-iters 50000
  --exit-signal-handler --save "$SAVE" --load "$SAVE" --allow-missing-load --save-interval 500
  --eval-interval 500 --eval-iters 20 --log-interval 10 --tensorboard-dir "$SAVE/tensorboard"
)

if [[ "${NODES:-1}" == 1 ]]; then
  # The address, because a machine's own host name may not resolve.
  WHERE=(--standalone --local-addr 127.0.0.1)
else
  WHERE=(
    --nnodes "$NODES" --rdzv-backend c10d --rdzv-id openmoe-8b
    --rdzv-endpoint "${RENDEZVOUS:?host:port of one of the nodes}"
  )
fi

exec_torchrun() { python tools/torchrun.py "${WHERE[@]}" --nproc-per-node 8 "$@"; }
if [[ "${NODE_CHECK:-1}" != 0 ]]; then
  exec_torchrun tools/check_environment.py --cluster "${CLUSTER:-h100}" \
    --preset openmoe-8b-32e-released "${LAYOUT[@]}" "${DATA[@]}" "${OPTIMIZER[@]}" "${RUN[@]}" "$@"
fi
exec_torchrun --max-restarts 0 --shutdown-timeout 240 pretrain_openmoe.py \
  --preset openmoe-8b-32e-released "${LAYOUT[@]}" "${DATA[@]}" "${OPTIMIZER[@]}" "${RUN[@]}" "$@"
