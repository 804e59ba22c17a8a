#!/usr/bin/env bash
# Runs the Slurm scripts of examples/ under a real Slurm of one node, this machine:
#
#   sudo tests/examples/one_node_slurm.sh
#
# Needs Debian's packages slurm-wlm and munge, two processors, and root, as whom slurmd runs. Not
# part of the test suite, which runs the scripts with Slurm's variables instead
# (test_preprocess_slurm.py, test_launch_scripts.py). Daemons listen on the loopback address, keep everything in a temporary
# folder and are stopped at the end. Shown:
#
#   1. an array of four tasks, one of them requeued, then the merge: the files of one process
#   2. a task that refuses its input: exit code 2, and a merge that is cancelled, not run
#   3. training that scancel signals, each process of the step at once: one save, then the end
#   4. examples/pretrain_base_slurm.sbatch with a tiny model on two tasks: signalled in the middle, at
#      its time limit, cancelled; requeued after the first two, and bit for bit as an undisturbed run
#   5. the same with torchrun, and an end before the time limit that the run knows itself
#
# `tests/examples/one_node_slurm.sh 4 5` runs these parts alone.
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
  say "3/5 scancel --signal=TERM to training with 0, 1 and 2 workers for data, sync and async saves"
  printf '{"text": "a few words %d"}\n' {1..500} >"$DIR/few.jsonl"
  python tools/preprocess_data.py --input "$DIR/few.jsonl" --output-prefix "$DIR/corpus" \
    --tokenizer-type ByteTokenizer --append-eod 2>"$DIR/log"
  training none --num-workers 0
  training one --num-workers 1
  training two --num-workers 2
  training async --num-workers 2 --async-save --save-interval 3
  echo "each saved once and ended"
}
# A job of the script for OpenMoE Base with a tiny model: name, more options of sbatch, --, more flags.
submit_base() {
  local run="$DIR/$1" options=() flags=(--save "$DIR/$1/ckpt" --load "$DIR/$1/ckpt")
  shift
  while [[ "$1" != -- ]]; do options+=("$1"); shift; done
  shift
  mkdir -p "$run"
  printf '[[stage]]\nname = "causal"\nuntil-iteration = 1000000\nobjective = "causal"\n' >"$DIR/phases.toml"
  DATA_PATH="$DIR/sp_text_document" TOKENIZER="$DIR/sp.model" SAVE="$run" RANKS_PER_NODE=2 \
    STAGES="$DIR/phases.toml" OMP_NUM_THREADS=1 CLUSTER="$DIR/cpu.toml" GLOO_SOCKET_IFNAME=lo \
    sbatch --parsable --nodes=1 --gpus-per-node=0 --output="$run/out" --error="$run/err" "${options[@]}" \
    examples/pretrain_base_slurm.sbatch --preset openmoe-tiny --no-bf16 --hidden-size 32 \
    --ffn-hidden-size 48 --moe-shared-expert-intermediate-size 48 --seq-length 32 --num-workers 0 \
    --expert-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8 --eval-iters 0 \
    --save-interval 1000000 --data-cache-path "$DIR/cache" --metrics-file "$run/metrics" \
    "${flags[@]}" "$@"
}
show() { tail -n 20 "$DIR/$1"/{out,err} "$DIR/$1"/logs/* >&2 || true; }
lines() { if [[ -e "$1" ]]; then wc -l <"$1"; else echo 0; fi; }
# Until the run has done so many more steps. A requeued job need not wait for its two minutes, but slurmd
# does not start a job again in the second in which it ended.
run_steps() {
  local until=$(($(lines "$DIR/$1/metrics") + $3))
  sleep 5
  for _ in {1..300}; do
    if (($(lines "$DIR/$1/metrics") >= until)); then return; fi
    if [[ "$(squeue --noheader --jobs "$2" --format %T)" == PENDING ]]; then
      scontrol update JobId="$2" StartTime=now
    fi
    sleep 1
  done
  show "$1"
  echo "job $2 does not run" >&2
  exit 1
}
restarts() { scontrol show job "$1" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p'; }
until_requeued() {
  for _ in {1..300}; do
    if [[ "$(restarts "$2")" == "$3" ]]; then return; fi
    sleep 1
  done
  show "$1"
  echo "job $2 is not requeued" >&2
  exit 1
}
saved_step() { cat "$DIR/$1/ckpt/latest_checkpointed_iteration.txt"; }

# Disturbed three times, then compared: name, launcher, options of sbatch.
requeueing() {
  local job step end
  job="$(LAUNCHER="$2" submit_base "$1" "${@:3}" --)"
  run_steps "$1" "$job" 20
  scancel --signal=TERM "$job"
  until_requeued "$1" "$job" 1
  echo "SIGTERM to the step: saved step $(saved_step "$1"), requeued"
  step="$(saved_step "$1")"
  run_steps "$1" "$job" 20
  until_requeued "$1" "$job" 2
  (($(saved_step "$1") > step))
  echo "time limit: saved step $(saved_step "$1"), requeued"
  step="$(saved_step "$1")"
  run_steps "$1" "$job" 20
  scancel "$job"
  wait_for "$job"
  end="$(saved_step "$1")"
  ((end > step))
  [[ "$(restarts "$job")" == 2 ]]
  echo "scancel: saved step $end, not requeued"

  # The same steps in one piece.
  job="$(REQUEUE=0 NODE_CHECK=0 submit_base "$1-whole" --time=60 -- --exit-interval "$end")"
  wait_for "$job"
  [[ "$(saved_step "$1-whole")" == "$end" ]]
  cmp "$DIR/$1/metrics" "$DIR/$1-whole/metrics"
  local files=0 file
  while read -r file; do
    cmp "$file" "${file/"$DIR/$1/"/"$DIR/$1-whole/"}"
    files=$((files + 1))
  done < <(find "$DIR/$1/ckpt" -path "*$end*" -name '*.safetensors')
  ((files > 0))
  echo "$end steps and $files files of weights and optimizer state: bit for bit as an undisturbed run"
}
prepare_base() {
  if [[ -e "$DIR/sp.model" ]]; then return; fi
  python tools/make_demo_corpus.py --output-dir "$DIR/demo" >/dev/null
  python tools/train_tokenizer.py --input "$DIR/demo/text.jsonl" --output "$DIR/sp.model" --vocab-size 600
  head -n 200 "$DIR/demo/text.jsonl" >"$DIR/sp.jsonl"
  python tools/preprocess_data.py --input "$DIR/sp.jsonl" --output-prefix "$DIR/sp" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DIR/sp.model" --append-eod 2>"$DIR/log"
}
rank_by_rank() {
  say "4/5 a task for each rank: SIGTERM, time limit, scancel"
  prepare_base
  NODE_CHECK=0 requeueing by-srun srun --time=3 --signal=B:USR1@60
  grep -q "only its signal ends the run" "$DIR/by-srun/err"
}
with_torchrun() {
  say "5/5 torchrun: SIGTERM, --exit-duration-in-mins from the time limit, scancel"
  prepare_base
  # A profile that any machine reaches: the check of the nodes runs before each start.
  sed -e 's/^\(intra\|inter\)_bandwidth = .*/\1_bandwidth = 0.001/' \
    megatron_moe/planning/clusters/h100.toml >"$DIR/cpu.toml"
  CHECK_FLAGS="--slowest 0 --megabytes 1" EXIT_MARGIN_MINUTES=2 \
    requeueing by-torchrun torchrun --time=5 --signal=B:USR1@30
  grep -aq "no problem found" "$DIR"/by-torchrun/logs/*
  grep -aq "exiting at iteration .*: --exit-duration-in-mins" "$DIR"/by-torchrun/logs/*
}
if (($#)); then
  for part in "$@"; do
    case "$part" in
      3) signals ;;
      4) rank_by_rank ;;
      5) with_torchrun ;;
      *) echo "parts: 3, 4, 5 (got $part)" >&2; exit 2 ;;
    esac
  done
  exit
fi

python tools/make_demo_corpus.py --output-dir "$DIR/text"
python tools/train_tokenizer.py --input "$DIR"/text/*.jsonl --output "$DIR/t.model" --vocab-size 2000
split -n l/3 --additional-suffix=.jsonl "$DIR/text/code.jsonl" "$DIR/text/code-"
gzip "$DIR/text/code.jsonl"
export INPUT="$DIR/text/*.jsonl*" PREFIX="$DIR/out" TOKENIZER="$DIR/t.model"

say "1/5 four tasks, the first requeued as soon as it runs, then the merge"
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

say "2/5 a line that is no JSON"
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
rank_by_rank
with_torchrun
