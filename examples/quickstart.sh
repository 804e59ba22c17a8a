#!/usr/bin/env bash
# From an empty folder to a trained OpenMoE on two CPU ranks, in minutes: `make quickstart`.
#
# 1. corpus     code and prose that every Python installation has, two JSON Lines files
# 2. tokenizer  SentencePiece unigram with byte fallback
# 3. data       tokenized .bin/.idx files
# 4. pretrain   the tiny preset under torchrun, experts spread over 2 ranks, held-out evaluation
# 5. resume     the same run from its checkpoint, in new processes
# 6. sample     text from the checkpoint, by the single-device model
# 7. report     what its experts do, on code against text, as one page for a browser
#
# Everything is written to quickstart/, which is emptied first. QUICKSTART_DIR and QUICKSTART_ITERS
# set another folder and length.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
# Two CPU ranks, also where there are GPUs.
export CUDA_VISIBLE_DEVICES=""

OUT="${QUICKSTART_DIR:-quickstart}"
ITERS="${QUICKSTART_ITERS:-200}"
MORE=20
VOCAB=4096

say() { printf '\n== %s\n' "$*"; }

if [[ -e "$OUT" && ! -e "$OUT/.quickstart" ]]; then
  echo "quickstart: QUICKSTART_DIR must be a new folder or the folder of a quickstart (got '$OUT')" >&2
  exit 2
fi
rm -rf "$OUT"
mkdir -p "$OUT/data" "$OUT/logs"
touch "$OUT/.quickstart"
TOKENIZER=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/tokenizer.model")

say "1/7 Corpus: standard-library sources (code), docstrings and help texts (text)"
python tools/make_demo_corpus.py --output-dir "$OUT/corpus"

say "2/7 Tokenizer: $VOCAB pieces"
python tools/train_tokenizer.py --input "$OUT"/corpus/{code,text}.jsonl \
  --output "$OUT/tokenizer.model" --vocab-size "$VOCAB"

say "3/7 Tokenized data"
for domain in code text; do
  python tools/preprocess_data.py --input "$OUT/corpus/$domain.jsonl" \
    --output-prefix "$OUT/data/$domain" "${TOKENIZER[@]}" --append-eod --workers 2
done

# Two sources, blended 60 : 40; 5% of the documents of each are held out.
DATA=(
  "${TOKENIZER[@]}" --split "95,5,0"
  --data-path 0.6 "$OUT/data/code_text_document" 0.4 "$OUT/data/text_text_document"
)
RUN=(
  --preset openmoe-tiny-released --expert-model-parallel-size 2
  "${DATA[@]}"
  --micro-batch-size 4 --global-batch-size 8
  --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 20
  --lr-decay-iters $((ITERS + MORE))
  --eval-interval 100 --eval-iters 16 --log-interval 20
  --save "$OUT/checkpoint" --tensorboard-dir "$OUT/tensorboard"
  --metrics-file "$OUT/logs/metrics.jsonl"
)
export OMP_NUM_THREADS=1 # two ranks on two cores
# The address, because a machine's own host name may not resolve.
TORCHRUN=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2)

say "4/7 Pretraining: $ITERS steps on 2 ranks, expert parallel 2"
"${TORCHRUN[@]}" pretrain_openmoe.py "${RUN[@]}" --train-iters "$ITERS" 2>&1 |
  tee "$OUT/logs/pretrain.log"

say "5/7 Resuming from the checkpoint: $MORE more steps in new processes"
"${TORCHRUN[@]}" pretrain_openmoe.py "${RUN[@]}" --train-iters $((ITERS + MORE)) \
  --load "$OUT/checkpoint" 2>&1 | tee "$OUT/logs/continue.log"

python tools/unigram_loss.py "${RUN[@]}" --train-iters "$ITERS" | tee "$OUT/logs/unigram.log"

say "6/7 A sample"
python tools/generate.py --load "$OUT/checkpoint" --prompt "def read(self, size):" \
  --max-new-tokens 64 --temperature 0.8 --top-p 0.9 | tee "$OUT/logs/sample.txt"

say "7/7 A report of its experts"
# One process now.
OMP_NUM_THREADS=2 python tools/analyze_moe.py --load "$OUT/checkpoint" --tokens 32768 \
  --data code="$OUT/data/code_text_document" text="$OUT/data/text_text_document" \
  --out "$OUT/report"

say "Done"
python examples/quickstart_summary.py "$OUT"
