#!/usr/bin/env bash
# Chat tuning of the quickstart's model on two CPU ranks: after `make quickstart`,
#
#   examples/chat_tuning.sh [more flags of pretrain_openmoe.py]
#
# 1. conversations  questions about Python answered by its own documentation, one JSON Lines file
# 2. before         held-out loss of the answers, of the model before tuning
# 3. tuning         starts from the weights only; with dropout; the loss counts answers only
# 4. sample         an answer, by the single-device model
#
# Everything is written to quickstart/chat/, which is emptied first. QUICKSTART_DIR and CHAT_ITERS
# set another quickstart and length. Exit code 1 if the held-out loss did not fall by 5%.
#
# OpenMoE's own tuning used Adafactor, constant rate 1e-3, batch 128, dropout 0.05.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
# Two CPU ranks, also where there are GPUs.
export CUDA_VISIBLE_DEVICES=""

FROM="${QUICKSTART_DIR:-quickstart}"
ITERS="${CHAT_ITERS:-100}"
OUT="$FROM/chat"

say() { printf '\n== %s\n' "$*"; }
held_out() { sed -n 's/^ validation at iteration [0-9]* | lm loss \([^ ]*\) .*/\1/p' "$1" | tail -n 1; }

if [[ ! -e "$FROM/checkpoint/latest_checkpointed_iteration.txt" ]]; then
  echo "chat_tuning: QUICKSTART_DIR must be a folder with the checkpoint of make quickstart" \
    "(got '$FROM'); try: make quickstart" >&2
  exit 2
fi
rm -rf "$OUT"
mkdir -p "$OUT"

say "1/4 Conversations: docstrings and help topics, as questions and answers"
python tools/make_demo_chat.py --output "$OUT/chat.jsonl"

RUN=(
  --preset openmoe-tiny-released --expert-model-parallel-size 2
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$FROM/tokenizer.model"
  --objective sft --data-path "$OUT/chat.jsonl" --split "95,5,0"
  --load "$FROM/checkpoint" --finetune
  --micro-batch-size 4 --global-batch-size 8 --eval-iters 4
)
TUNING=(
  --lr 5e-4 --lr-decay-style constant --lr-warmup-iters 0
  --hidden-dropout 0.05 --attention-dropout 0.05
  --train-iters "$ITERS" --eval-interval 50 --log-interval 10
  --save "$OUT/checkpoint" --tensorboard-dir "$OUT/tensorboard"
  --metrics-file "$OUT/metrics.jsonl"
)
export OMP_NUM_THREADS=1 # two ranks on two cores
# The address, because a machine's own host name may not resolve.
TORCHRUN=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2)

say "2/4 Held-out loss before tuning: one step at rate 0"
"${TORCHRUN[@]}" pretrain_openmoe.py "${RUN[@]}" --train-iters 1 --lr 0 --lr-decay-style constant \
  --lr-warmup-iters 0 2>&1 | tee "$OUT/before.log"

say "3/4 Tuning: $ITERS steps on 2 ranks, expert parallel 2, dropout 0.05"
"${TORCHRUN[@]}" pretrain_openmoe.py "${RUN[@]}" "${TUNING[@]}" "$@" 2>&1 | tee "$OUT/tuning.log"

say "4/4 An answer"
python tools/generate.py --load "$OUT/checkpoint" --temperature 0 --max-new-tokens 32 \
  --prompt "<s>[INST] What does shutil.copytree(src, dst) do? [/INST]" | tee "$OUT/sample.txt"

BEFORE="$(held_out "$OUT/before.log")"
AFTER="$(held_out "$OUT/tuning.log")"
say "Held-out loss of the answers: $BEFORE before, $AFTER after"
awk -v before="$BEFORE" -v after="$AFTER" 'BEGIN { exit !(after + 0 > 0 && after < 0.95 * before) }'
