#!/usr/bin/env bash
# Runs examples/preprocess_slurm.sbatch under a real Slurm of one node, this machine:
#
#   sudo tests/examples/one_node_slurm.sh
#
# Needs Debian's packages slurm-wlm and munge, two processors, and root, as whom slurmd runs. Not
# part of the test suite, which runs the script with Slurm's variables instead
# (test_preprocess_slurm.py). Daemons listen on the loopback address, keep everything in a temporary
# folder and are stopped at the end. Shown:
#
#   1. an array of four tasks, one of them requeued, then the merge: the files of one process
#   2. a task that refuses its input: exit code 2, and a merge that is cancelled, not run
#   3. training that scancel signals, each process of the step at once: one save, then the end
#
# `tests/examples/one_node_slurm.sh 3` runs that part alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

DIR="$(mktemp -d)"
NODE="$(hostname -s)"
SCRIPT=examples/preprocess_slurm.sbatch
export SLURM_CONF="$DIR/slurm.conf"
say() { printf '\n== %s\n' "$*"; }

stop() {
  for name in slurmd slurmctld munge/munged; do
    if [[ -e "$DIR/$name.pid" ]]; then kill "$(cat "$DIR/$name.pid")" || true; fi
  done
  rm -rf "$DIR"
}
trap stop EXIT

chmod 755 "$DIR"
mkdir "$DIR"/{munge,spool,state}
head -c 1024 /dev/urandom >"$DIR/munge/key"
chmod 400 "$DIR/munge/key"
chown -R munge "$DIR/munge"
runuser -u munge -- munged --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" \
  --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed"

cat >"$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthInfo=socket=$DIR/munge/socket
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.pid
SlurmdSpoolDir=$DIR/spool
StateSaveLocation=$DIR/state
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$NODE Default=YES State=UP
END
slurmctld
slurmd -N "$NODE"
sinfo --version

# A task has both processors, so that tasks wait for each other.
submit() { sbatch --parsable --cpus-per-task=2 --mem-per-cpu=0 --output="$DIR/%A-%a.log" "$@"; }
merge() {
  submit --dependency="afterok:$1" --kill-on-invalid-dep=yes --array=0 "$SCRIPT" merge
}
wait_for() {
  for _ in {1..300}; do
    if [[ -z "$(squeue --noheader --jobs "$1" 2>/dev/null)" ]]; then return; fi
    sleep 1
  done
  echo "job $1 is still there" >&2
  exit 1
}

training() {
  local prefix="$DIR/corpus_text_document" run="$DIR/$1" tasks
  mkdir "$run"
  # shellcheck disable=SC2016
  printf '#!/bin/bash\nexec srun --ntasks=1 --cpus-per-task=2 "$@"\n' >"$run/job"
  tasks="$(sbatch --parsable --cpus-per-task=2 --mem-per-cpu=0 --output="$run/log" "$run/job" \
    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 --shutdown-timeout 120 \
    pretrain_openmoe.py --preset openmoe-tiny --hidden-size 32 --ffn-hidden-size 48 --seq-length 32 \
    --expert-model-parallel-size 2 --tokenizer-type ByteTokenizer --data-path "$prefix" \
    --data-cache-path "$DIR/cache" --split 1,0,0 --eval-iters 0 --train-iters 1000000 \
    --metrics-file "$run/metrics" --save "$run/ckpt" --exit-signal-handler "${@:2}")"
  until [[ -e "$run/metrics" && "$(wc -l <"$run/metrics")" -ge 5 ]]; do
    if [[ -z "$(squeue --noheader --jobs "$tasks" 2>/dev/null)" ]]; then cat "$run/log"; exit 1; fi
    sleep 1
  done
  scancel --signal=TERM "$tasks"
  wait_for "$tasks"
  grep -a -e " exiting at iteration" -e " saved iteration .* to" "$run/log" | tail -n 2
  local step
  step="$(sed -n 's/.* exiting at iteration \([0-9]*\): SIGTERM/\1/p' "$run/log")"
  [[ "$(cat "$run/ckpt/latest_checkpointed_iteration.txt")" == "$step" ]]
  python tools/inspect_checkpoint.py "$run/ckpt" --verify >"$run/verified"
  [[ "$(grep -ac " saved iteration $step to" "$run/log")" == 1 ]]
}
signals() {
  say "3/3 scancel --signal=TERM to training with 0, 1 and 2 workers for data, sync and async saves"
  printf '{"text": "a few words %d"}\n' {1..500} >"$DIR/few.jsonl"
  python tools/preprocess_data.py --input "$DIR/few.jsonl" --output-prefix "$DIR/corpus" \
    --tokenizer-type ByteTokenizer --append-eod 2>"$DIR/log"
  training none --num-workers 0
  training one --num-workers 1
  training two --num-workers 2
  training async --num-workers 2 --async-save --save-interval 3
  echo "each saved once and ended"
}
if [[ "${1:-}" == 3 ]]; then
  signals
  exit
fi

python tools/make_demo_corpus.py --output-dir "$DIR/text"
python tools/train_tokenizer.py --input "$DIR"/text/*.jsonl --output "$DIR/t.model" --vocab-size 2000
split -n l/3 --additional-suffix=.jsonl "$DIR/text/code.jsonl" "$DIR/text/code-"
gzip "$DIR/text/code.jsonl"
export INPUT="$DIR/text/*.jsonl*" PREFIX="$DIR/out" TOKENIZER="$DIR/t.model"

say "1/3 four tasks, the first requeued as soon as it runs, then the merge"
job="$(submit --array=0-3 "$SCRIPT")"
last="$(merge "$job")"
until squeue --noheader --jobs "${job}_0" --states=running 2>/dev/null | grep -q .; do sleep 0.2; done
scontrol requeue "${job}_0"
wait_for "$last"
tail -n 1 "$DIR/$last-0.log"
python tools/preprocess_data.py --input "$DIR"/text/*.jsonl* --output-prefix "$DIR/one" \
  --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" --append-eod 2>"$DIR/log"
for suffix in bin idx json; do cmp "$DIR"/{one,out}_text_document."$suffix"; done
echo "the same bytes as one process"

say "2/3 a line that is no JSON"
echo '{' >>"$DIR/text/code-ac.jsonl"
export PREFIX="$DIR/bad"
job="$(submit --array=0-3 "$SCRIPT")"
last="$(merge "$job")"
wait_for "$job"
wait_for "$last"
grep -h "error: " "$DIR/$job"-*.log
if [[ -e "$DIR/$last-0.log" || -e "$DIR/bad_text_document.bin" ]]; then
  echo "the merge ran" >&2
  exit 1
fi
echo "the merge did not run"
signals
