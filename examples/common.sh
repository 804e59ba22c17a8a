#!/usr/bin/env bash
# What the launch scripts share, sourced by them: the environment of the ranks, flags of the data, and
# a job under Slurm. Variables that are already set keep their values.
#
# Data, one of:
#   DATA_PATH       your own: prefix of .bin/.idx files, or weights and prefixes in turn
#   DATA_ARGS_PATH  your own: a file with the words of DATA_PATH
#   DATA_ROOT       directory of the sources of the paper's mixtures (not for all scripts)
#
# Under Slurm:
#   SBATCH_PARTITION, SBATCH_ACCOUNT  are read by sbatch itself
#   RANKS_PER_NODE  ranks of a node (the GPUs that Slurm gives to it)
#   LAUNCHER        torchrun (one task a node, which starts its ranks) or srun (a task for each rank)
#   LOGS            directory of the logs, one file a node ($SAVE/logs)
#   NODE_CHECK      0 leaves out tools/check_environment.py before the job
#   CHECK_FLAGS     flags of it, e.g. --tolerance 0.7
#   CLUSTER         profile of the planner with which it compares (h100)
#   REQUEUE         0 ends the job at its time limit instead of requeueing it
#   EXIT_MARGIN_MINUTES  end the run so long before the time limit (10)
#   CONTAINER_IMAGE, CONTAINER_MOUNTS  Enroot/Pyxis: image, and /host:/container pairs by commas
#   APPTAINER_IMAGE, CONTAINER_MOUNTS  Apptainer: .sif file, and the same

# --- Memory and kernels of a GPU ---------------------------------------------------------------------

# Segments that grow: activations of changing sizes otherwise leave holes that no tensor fits into.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# One hardware queue: kernels start in the order in which they were issued, so that a collective issued
# before a GEMM really overlaps it. Tensor parallelism needs it, up to Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# The ranks of a node share its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# --- NCCL and gloo ------------------------------------------------------------------------------------

# Adapters that carry data: a prefix of their names (`ibstat -l`), `=` for exact ones. One per GPU
# is usual. Without this, NCCL may take a slow management adapter.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"

# Interface for the bootstrap traffic of NCCL and torchrun (addresses, no tensors): any that all nodes
# share. `^` excludes: this is any interface that is neither loopback nor a container bridge.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}"

# The interface of gloo, whose groups carry asynchronous saves and the question whether a rank was
# signalled. gloo knows no `^` and takes what the host name resolves to, which may be loopback: so the
# interface of the default route, if NCCL's is not named. It must have the same name on all nodes.
if [[ -z "${GLOO_SOCKET_IFNAME:-}" ]]; then
  GLOO_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME%%,*}"
  GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME#=}"
  if [[ "$GLOO_SOCKET_IFNAME" == ^* ]]; then
    GLOO_SOCKET_IFNAME="$(ip -o -4 route show default 2>/dev/null | sed -n '1s/.* dev \([^ ]*\).*/\1/p' || true)"
  fi
  if [[ -n "$GLOO_SOCKET_IFNAME" ]]; then export GLOO_SOCKET_IFNAME; else unset GLOO_SOCKET_IFNAME; fi
fi

# How long an adapter waits for an acknowledgement: 4.096 us x 2^22, about 17 s before one retry.
# The default of 20 is too short for a switch to reroute.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# Queue pairs per connection: more than one spreads a flow over several paths of a fat tree.
export NCCL_IB_QPS_PER_CONNECTION="${NCCL_IB_QPS_PER_CONNECTION:-4}"

# GPUDirect RDMA between GPU and adapter on the same CPU (PHB); further apart, a copy through host memory
# is faster.
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"

# No reductions inside NVLink switches: their buffers take GPU memory in every communicator, and
# all-to-alls do not use them. 1 tries them, where memory is left.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

# A rank whose peer is lost exits with an error instead of waiting forever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# The flight recorder: the last 2000 collectives of each rank, with their stacks of Python. Those that
# are unfinished are in failure-report.json; it is all that is known of what a GPU waits for.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# Warnings only. INFO prints what NCCL selects.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# --- Limits of a process, which srun passes to its tasks --------------------------------------------

limit() { ulimit "$1" "$2" 2>/dev/null || echo "ulimit $1 $2 is not allowed here; it is $(ulimit "$1")" >&2; }
limit -l unlimited # memory that an adapter may pin, for RDMA
limit -n "$(ulimit -H -n)" # files and sockets: a communicator has several sockets for each peer
limit -c 0 # no core files: 8 ranks would write their whole memory to a shared file system

# --- Data ---------------------------------------------------------------------------------------------

wrong() { echo "$(basename "$0"): $*" >&2; exit 2; }

own_data() { [[ -n "${DATA_PATH:-}${DATA_ARGS_PATH:-}" ]]; }

# Sets DATA. `data_flags mixtures` accepts DATA_ROOT as well: the phases of the run name mixtures.
data_flags() {
  local given=() name
  for name in DATA_PATH DATA_ARGS_PATH DATA_ROOT; do
    if [[ -n "${!name:-}" ]]; then given+=("$name"); fi
  done
  local allowed="DATA_PATH (prefix of the .bin/.idx files of tools/preprocess_data.py) or DATA_ARGS_PATH"
  if [[ "${1:-}" == mixtures ]]; then
    allowed="DATA_PATH, DATA_ARGS_PATH or DATA_ROOT (directory of the indexed sources of the mixtures)"
  elif [[ -n "${DATA_ROOT:-}" ]]; then
    wrong "DATA_ROOT must not be set: this recipe has no mixture (got '$DATA_ROOT'); set $allowed"
  fi
  if ((${#given[@]} != 1)); then
    wrong "exactly one variable must be set of $allowed (got ${given[*]:-none})"
  fi
  DATA=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" --split "989,10,1")
  case "${given[0]}" in
    DATA_PATH) read -ra words <<<"$DATA_PATH"; DATA+=(--data-path "${words[@]}") ;;
    DATA_ARGS_PATH) DATA+=(--data-args-path "$DATA_ARGS_PATH") ;;
    DATA_ROOT) DATA+=(--data-root "$DATA_ROOT") ;;
  esac
}

# The table of phases of a published run; with your own data the one without mixtures.
phase_table() {
  local own=""
  if own_data; then own="_own_data"; fi
  echo "${STAGES:-examples/stages/$1$own.toml}"
}

# --- A job under Slurm --------------------------------------------------------------------------------

# Sets CONTAINER_FLAGS (of srun) and COMMAND_PREFIX. Without a container, ranks use .venv.
container() {
  CONTAINER_FLAGS=() COMMAND_PREFIX=()
  if [[ -n "${CONTAINER_IMAGE:-}${APPTAINER_IMAGE:-}" ]]; then
    : "${CONTAINER_MOUNTS:?pairs /host:/container by commas: this folder, data, tokenizer, SAVE}"
  else
    export PATH="$PWD/.venv/bin:$PATH"
  fi
  if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    CONTAINER_FLAGS=(
      --container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS"
      --container-workdir="$PWD"
    )
  elif [[ -n "${APPTAINER_IMAGE:-}" ]]; then
    # --nv: driver and GPUs of the host.
    COMMAND_PREFIX=(
      apptainer exec --nv --bind "$CONTAINER_MOUNTS" --pwd "$PWD" "$APPTAINER_IMAGE"
    )
  fi
}

# Minutes that a run may take: up to the time limit, less EXIT_MARGIN_MINUTES. Nothing without a limit.
minutes_to_run() {
  local end left
  end="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)"
  end="$(date -d "$end" +%s 2>/dev/null)" || return 0
  left=$(((end - $(date +%s)) / 60 - ${EXIT_MARGIN_MINUTES:-10}))
  if ((left > 0)); then
    echo "$left"
  else
    echo "the time limit is within EXIT_MARGIN_MINUTES (${EXIT_MARGIN_MINUTES:-10}): only its signal ends the run" >&2
  fi
}

# srun with what every step of a job needs.
#   --label            each line begins with the number of its task
#   --output           one log a node (%N); a requeued job continues in the same files
#   --kill-on-bad-exit a task that fails ends the others
#   --cpu-bind=none    a task starts all ranks of its node: Slurm would pin them to one core
step() {
  srun --label --output="$LOGS/%x-%j-%N.log" --open-mode=append --kill-on-bad-exit=1 --cpu-bind=none \
    "${CONTAINER_FLAGS[@]}" "$@"
}

# torchrun on every node. Its rendezvous is on the first one, at a port that follows from the job, so
# that two jobs on one node do not collide.
#   torchrun_step <number to add to the port> <program and its arguments>
torchrun_step() {
  step "${COMMAND_PREFIX[@]}" python tools/torchrun.py \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS_PER_NODE" \
    --max-restarts 0 --shutdown-timeout 240 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$1" \
    --rdzv-endpoint "$HEAD:$((20000 + (SLURM_JOB_ID + $1) % 20000))" "${@:2}"
}

# One task for each rank, without torchrun. Ranks note how the run ended, as they do for tools/torchrun.py.
srun_step() {
  local noted="$LOGS/.exit-status-$SLURM_JOB_ID"
  rm -f "$noted"
  OPENMOE_EXIT_STATUS_FILE="$noted" step --ntasks="$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))" \
    --ntasks-per-node="$RANKS_PER_NODE" "${COMMAND_PREFIX[@]}" python "$@"
  if [[ -e "$noted" ]]; then return "$(cat "$noted")"; fi
}

# The same flags for the check of the nodes as for the run: it knows from them where checkpoints go, and
# how large they are.
check_nodes() {
  local flags
  if [[ "${NODE_CHECK:-1}" == 0 ]]; then return; fi
  read -ra flags <<<"${CHECK_FLAGS:-}"
  torchrun_step 1 tools/check_environment.py --cluster "${CLUSTER:-h100}" "${flags[@]}" "$@" || {
    echo "tools/check_environment.py found problems: see $LOGS; NODE_CHECK=0 leaves it out" >&2
    exit 1
  }
}

# A background process to its end, through the signals that the batch script gets meanwhile.
wait_through_signals() {
  local status
  while true; do
    SIGNALLED="" status=0
    wait "$1" || status=$?
    if [[ -z "$SIGNALLED" ]]; then return "$status"; fi
  done
}

# Pretrain as this job: check the nodes, run, and requeue the job if it has saved before its end.
#
# Slurm signals the batch script alone before the time limit (`#SBATCH --signal=B:USR1@300`), which sends
# SIGTERM to the processes of the step. All ranks then save, and the status is 75: to be continued.
# scancel and preemption send SIGTERM to everything: all ranks save as well, but nothing is requeued here:
# a cancelled job shall end, and a preempted one is requeued by Slurm (`#SBATCH --requeue`).
slurm_pretrain() {
  local minutes status=0 more=(--exit-signal-handler)
  RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?Slurm gave no GPUs to this node; set RANKS_PER_NODE}}"
  LOGS="${LOGS:-$SAVE/logs}"
  mkdir -p "$LOGS"
  read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  container
  check_nodes "$@"
  minutes="$(minutes_to_run)"
  if [[ -n "$minutes" ]]; then more+=(--exit-duration-in-mins "$minutes"); fi

  ENDED_BY="" SIGNALLED=""
  trap 'SIGNALLED=1 ENDED_BY=limit; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  trap 'SIGNALLED=1 ENDED_BY=others' TERM
  case "${LAUNCHER:-torchrun}" in
    torchrun) torchrun_step 0 pretrain_openmoe.py "${more[@]}" "$@" & ;;
    srun) srun_step pretrain_openmoe.py "${more[@]}" "$@" & ;;
    *) wrong "LAUNCHER must be torchrun or srun (got '$LAUNCHER')" ;;
  esac
  wait_through_signals $! || status=$?
  if [[ "$status" == 75 && "$ENDED_BY" != others && "${REQUEUE:-1}" != 0 ]]; then
    echo "saved before its end; requeued"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}
