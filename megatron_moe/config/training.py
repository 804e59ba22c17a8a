"""What a run does: its data, objective, steps, optimizer, checkpoints and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_moe.config.fields import (
    AtLeastOne,
    BelowOne,
    Flag,
    NonNegative,
    OmittedAtDefault,
    Positive,
    Range,
)

Objective = Literal["causal", "prefix-lm", "ul2", "sft"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens, in which order."""

    data_path: tuple[str, ...] = ()
    """Prefixes of indexed data sets (`PREFIX.bin`, `PREFIX.idx`), or weight and prefix pairs."""
    data_args_path: str | None = None
    """File with the words of `--data-path`, for lists too long for a command line."""
    mixture: str | None = None
    """Sources by name instead of `--data-path`: `v1`, `v2` or `v3` of the paper, or a TOML file."""
    data_root: str | None = None
    """Directory of the prefixes of `--mixture`; `None` means that of the TOML file, and for `v1`,
    `v2` and `v3` the working directory."""
    train_data_path: tuple[str, ...] = ()
    """Like `--data-path`, for training alone; then `--split` does not apply."""
    valid_data_path: tuple[str, ...] = ()
    """Like `--data-path`, for validation alone."""
    test_data_path: tuple[str, ...] = ()
    """Like `--data-path`, for the final test alone."""
    mock_data: Annotated[bool, OmittedAtDefault] = False
    """Synthetic documents instead of data: ids that count up. Written once to `--data-cache-path`,
    else to a folder for temporary files."""
    split: str = "969,30,1"
    """Shares of documents of `--data-path` for training, validation and test."""
    data_cache_path: str | None = None
    """Directory for sample indices; `None` means a `cache` folder next to the data."""
    mmap_bin_files: bool = True
    """Map `.bin` files into memory instead of reading them."""
    num_workers: Annotated[int, NonNegative] = 1
    """Background threads or processes that prepare batches; 0 reads in the training process."""
    data_loader_timeout: Annotated[float, NonNegative, OmittedAtDefault] = 300.0
    """Seconds that a step waits for a micro-batch of these processes before the run is aborted;
    0 waits for ever."""
    seq_length: Annotated[int, AtLeastOne] = 256
    """Tokens S of one sample."""
    tokenizer_type: Literal[
        "SentencePieceTokenizer",
        "HuggingFaceTokenizer",
        "GPT2BPETokenizer",
        "ByteTokenizer",
        "NullTokenizer",
    ] = "NullTokenizer"
    """Tokenizer family. `NullTokenizer` has no text, only `--vocab-size` ids."""
    tokenizer_model: str | None = None
    """File of the tokenizer: a SentencePiece model, or a `tokenizer.json` or its folder."""
    vocab_file: Annotated[str | None, OmittedAtDefault] = None
    """`vocab.json` of `GPT2BPETokenizer`."""
    merge_file: Annotated[str | None, OmittedAtDefault] = None
    """`merges.txt` of `GPT2BPETokenizer`."""
    allow_special_tokens: Annotated[bool, OmittedAtDefault] = False
    """Give a text that spells a special token, such as `<|endoftext|>`, the token's id. Otherwise
    such a text is encoded like any other. For `HuggingFaceTokenizer`."""
    vocab_size: Annotated[int | None, AtLeastOne] = None
    """Vocabulary V before padding; `None` takes the tokenizer's."""
    vocab_extra_ids: Annotated[int, NonNegative] = 0
    """Ids after the tokenizer's own, for the sentinels of span corruption; umT5 has 300."""
    make_vocab_size_divisible_by: Annotated[int, AtLeastOne] = 128
    """V is padded to a multiple of this, whatever the layout; tensor parallelism must divide it."""
    padded_vocab_size: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """V after padding, as it is, instead of `--make-vocab-size-divisible-by`."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How tokens become inputs, targets and a loss mask; examples in `docs/objectives.md`."""

    objective: Objective = "causal"
    """`causal`: the next token, everywhere. `prefix-lm`: the same after a random split. `ul2`: a
    mixture of denoisers. `sft`: the assistant's turns of conversations (JSON Lines)."""
    ul2_mixture: str | None = None
    """TOML file of the denoisers; `None` takes the six of OpenMoE."""
    ul2_inputs_length: Annotated[int | None, AtLeastOne] = None
    """Most tokens of a row for the inputs of a denoiser, the rest being for its targets; `None`
    means half of `--seq-length`, as in the paper."""
    ul2_fill_rows: bool = False
    """Take as much text as fits into the whole row, instead of fixed parts for inputs and targets
    (which leave up to half of a row empty)."""
    eod_mask_loss: bool = False
    """Do not count what is predicted right after an end of document (causal and prefix LM)."""
    reset_position_ids: bool = False
    """Count rotary positions from the start of each document (of each conversation, with `sft`)."""
    reset_attention_mask: bool = False
    """Let no position see another document (another conversation, with `sft`)."""
    decoder_start_token_id: Annotated[int | None, NonNegative, OmittedAtDefault] = None
    """Input token at the start of each row, and of each document or conversation that
    `--reset-position-ids` or `--reset-attention-mask` separates; its target is the first token of
    the text. 0 as released (seqio's shift of the targets by one). `None`: a row starts with text,
    whose first token is no target."""
    sft_key: str = "messages"
    """Where a line of a conversation file is an object: its key that holds the list of turns."""
    sft_pack: bool = True
    """Put several conversations into a row where they fit; otherwise one a row."""
    sft_data_path: Annotated[tuple[str, ...], OmittedAtDefault] = ()
    """Files of conversations, or weight and file pairs, for `--sft-share`."""
    sft_share: Annotated[float, BelowOne, OmittedAtDefault] = 0.0
    """Share of training rows that hold conversations of `--sft-data-path`, spread evenly among
    those of another objective: packed, with the template and the loss of `--objective sft`."""

    @property
    def has_padding(self) -> bool:
        """Whether rows may end with padding."""
        return self.objective in ("ul2", "sft") or self.sft_share > 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How many steps of what size."""

    micro_batch_size: Annotated[int, AtLeastOne] = 4
    """Sequences B in one forward pass of one data-parallel rank."""
    global_batch_size: Annotated[int | None, AtLeastOne] = None
    """Sequences of one optimizer step; `None` means micro batch x data-parallel size."""
    rampup_batch_size: Annotated[tuple[int, int, int] | None, AtLeastOne] = None
    """START INCREMENT SAMPLES: the global batch grows from START, by INCREMENT at a time, to
    `--global-batch-size` over the first SAMPLES sequences."""
    train_iters: Annotated[int | None, AtLeastOne] = None
    """Optimizer steps of the whole run, including those before a restart."""
    train_samples: Annotated[int | None, AtLeastOne] = None
    """The same, in sequences; give one of the two."""
    stages: Annotated[str | None, Flag("--phases")] = None
    """TOML file of the phases of the run: objective, data, batch size, sequence length, learning
    rate or dropout that change during training. `--stages` is accepted as well."""
    eval_interval: Annotated[int, AtLeastOne] = 1000
    """Steps between evaluations on validation data."""
    eval_iters: Annotated[int, NonNegative] = 100
    """Global batches of one evaluation; 0 disables evaluation."""
    domain_eval_iters: Annotated[int | None, NonNegative] = None
    """Global batches of each domain's own evaluation, where held-out data has several; 0 for none.
    `None` divides `--eval-iters` among them, so that together they cost as much as the evaluation
    of the whole."""
    exit_interval: Annotated[int | None, AtLeastOne] = None
    """Save and end once the iteration is a multiple of this."""
    exit_duration_in_mins: Annotated[float | None, Positive, OmittedAtDefault] = None
    """Save and exit after the step in which a process has run for this long, with code 0."""
    exit_signal_handler: bool = False
    """On `--exit-signal` to any rank, save after the current step and exit on all ranks with code
    0. Signals within 10 seconds, or while a save is in progress, are the same request; a later one
    ends the rank at once."""
    exit_signal: Annotated[Literal["TERM", "USR1", "INT"], OmittedAtDefault] = "TERM"
    """The signal of `--exit-signal-handler`."""
    hang_timeout: Annotated[float | None, Positive, OmittedAtDefault] = None
    """Seconds without a completed step, evaluation or save after which the run is aborted, with the
    stacks of all ranks in its failure report. Choose more than the longest of them takes."""
    kill_switch_file: Annotated[str | None, OmittedAtDefault] = None
    """Save and exit on all ranks after the step during which this file appears."""
    seed: Annotated[int, NonNegative] = 1234
    """Seed of initialisation, data order and dropout."""
    loss_spike_policy: Annotated[
        Literal["continue", "skip", "stop", "rollback"] | None, OmittedAtDefault
    ] = None
    """What happens at a step whose loss or gradient norm is far above those of the steps before.
    `continue`: only a warning. `skip`: its update is not applied. `stop`: the run ends with code 1.
    `rollback`: the weights of the newest checkpoint in `--save` come back, and the batches since
    then are not used again. `None`: no step is judged. One small all-reduce a step."""
    loss_spike_sigma: Annotated[float, Positive, OmittedAtDefault] = 6.0
    """Standard deviations above the mean of the window at which a step is a spike."""
    loss_spike_window: Annotated[int, Range(4), OmittedAtDefault] = 128
    """Steps that a step is compared with; none is judged before half of them were taken."""
    loss_spike_limit: Annotated[int, AtLeastOne, OmittedAtDefault] = 10
    """Skipped or rolled back steps within a window, after which one more ends the run."""
    check_weight_hash_across_dp_replicas_interval: Annotated[
        int | None, AtLeastOne, OmittedAtDefault
    ] = None
    """Steps between comparisons of the weights that data-parallel replicas hold; a difference ends
    the run with an error on every rank."""
    deterministic_mode: Annotated[bool, OmittedAtDefault] = False
    """Select deterministic algorithms in PyTorch, cuBLAS and NCCL, and reject operations without
    one: the same run twice gives the same bits, on a GPU as well. Slower."""
    manual_gc: Annotated[bool, OmittedAtDefault] = False
    """Turn Python's automatic garbage collector off and collect on all ranks at the same steps, so
    that no rank waits for the collection of another."""
    manual_gc_interval: Annotated[int, NonNegative, OmittedAtDefault] = 0
    """With `--manual-gc`, steps between collections; 0 collects around evaluations only."""
    manual_gc_eval: Annotated[bool, OmittedAtDefault] = True
    """With `--manual-gc`, collect before and after each evaluation."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; otherwise fp32."""

    def used_domain_eval_iters(self, domains: int) -> int:
        """`domain_eval_iters` with its default, for so many domains."""
        default = -(-self.eval_iters // max(domains, 1))
        return default if self.domain_eval_iters is None else self.domain_eval_iters


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a step changes the weights."""

    optimizer: Literal["adam", "sgd", "adafactor", "muon"] = "adam"
    """`adam` is AdamW (decoupled weight decay); `adafactor` is what OpenMoE was trained with;
    `muon` orthogonalizes the updates of matrices, with AdamW for embeddings, routers and norms."""
    lr: Annotated[float, NonNegative] = 3e-4
    """Learning rate at its peak."""
    min_lr: Annotated[float, NonNegative] = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after warm-up; `WSD` stays at the peak and decays at the end."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of `WSD`."""
    lr_wsd_decay_iters: Annotated[int | None, AtLeastOne] = None
    """Steps of the decay at the end of `WSD`."""
    lr_decay_iters: Annotated[int | None, AtLeastOne] = None
    """Steps until the decay ends; `None` means the length of the run."""
    lr_warmup_iters: Annotated[int, NonNegative] = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: Annotated[float | None, BelowOne, OmittedAtDefault] = None
    """Warm-up as a share of the decay (`--lr-decay-iters`, or `--lr-decay-samples` with
    `--train-samples`), instead of a number of steps or sequences."""
    lr_decay_samples: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """With `--train-samples`: sequences until the decay ends; `None` means those of the run. This,
    `--lr-warmup-samples` and `--lr-wsd-decay-samples` let the learning rate count consumed
    sequences instead of steps, which differs during a batch-size ramp-up."""
    lr_warmup_samples: Annotated[int, NonNegative, OmittedAtDefault] = 0
    """With `--train-samples`: sequences of linear warm-up."""
    lr_wsd_decay_samples: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """With `--train-samples`: sequences of the decay at the end of `WSD`."""
    lr_warmup_init: Annotated[float, NonNegative] = 0.0
    """Learning rate at the first step of warm-up."""
    weight_decay: Annotated[float | None, NonNegative] = None
    """Weight decay of matrices; norms have none. `None` means 0.01; with Adafactor, 0."""
    adam_beta1: Annotated[float, BelowOne] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, BelowOne] = 0.999
    """Decay of the second moment."""
    adam_eps: Annotated[float, Positive] = 1e-8
    """Added to the root of the second moment."""
    sgd_momentum: Annotated[float, BelowOne] = 0.9
    """Momentum of `--optimizer sgd`."""
    adafactor_decay_rate: Annotated[float, Positive] = 0.8
    """Adafactor's second moments decay by 1 - t^-RATE at step t."""
    adafactor_clip_threshold: Annotated[float, Positive] = 1.0
    """Root mean square above which Adafactor scales a matrix's update down."""
    adafactor_min_dim: Annotated[int, AtLeastOne] = 128
    """Adafactor factors the second moments of matrices whose two sizes are both >= this."""
    muon_momentum: Annotated[float, BelowOne, OmittedAtDefault] = 0.95
    """Decay of Muon's mean of gradients."""
    muon_use_nesterov: Annotated[bool, OmittedAtDefault] = False
    """Add the gradient to Muon's mean once more before it is orthogonalized."""
    muon_split_qkv: Annotated[bool, OmittedAtDefault] = True
    """Orthogonalize query, key and value separately, rather than as one matrix."""
    muon_scale_mode: Annotated[
        Literal["spectral", "unit_rms_norm", "shape_scaling"], OmittedAtDefault
    ] = "spectral"
    """Factor of the update of a matrix [out, in]: `spectral` sqrt(max(out, in)), `unit_rms_norm`
    sqrt(out / in), `shape_scaling` sqrt(max(1, out / in))."""
    muon_extra_scale_factor: Annotated[float, Positive, OmittedAtDefault] = 1.0
    """A further factor; with `spectral`, 0.2 lets Muon and AdamW share a learning rate (Moonlight,
    arXiv 2502.16982)."""
    muon_num_ns_steps: Annotated[int, AtLeastOne, OmittedAtDefault] = 5
    """Newton-Schulz steps that orthogonalize an update."""
    muon_coefficient_type: Annotated[
        Literal["simple", "quintic", "polar_express"], OmittedAtDefault
    ] = "quintic"
    """Polynomials of these steps; see `training/optim/orthogonalize.py`."""
    muon_fp32_matmul_prec: Annotated[Literal["medium", "high", "highest"], OmittedAtDefault] = (
        "medium"
    )
    """Precision of their products on a GPU: bf16, TF32 or fp32. On a CPU always fp32, which is
    faster there."""
    muon_tp_mode: Annotated[Literal["duplicated", "distributed", "blockwise"], OmittedAtDefault] = (
        "duplicated"
    )
    """How a matrix that tensor parallelism splits is orthogonalized: gathered, by every rank; or
    with products summed over ranks. `blockwise` (Megatron-LM's default) takes each rank's block as
    a matrix: no communication, but results depend on the layout."""
    clip_grad: Annotated[float | None, NonNegative] = None
    """Global gradient norm above which gradients are scaled down; 0 disables clipping. `None` means
    1; with Adafactor, 0."""
    freeze_params: tuple[str, ...] = ()
    """Parameters that are not updated: patterns (`*`, `?`, `[...]`) of logical names."""
    freeze_router_after: Annotated[int | None, NonNegative] = None
    """Steps after which router weights are no longer updated."""

    @property
    def lr_in_samples(self) -> bool:
        """Whether a length of the learning rate is given in sequences."""
        lengths = (self.lr_decay_samples, self.lr_warmup_samples, self.lr_wsd_decay_samples)
        return any(lengths)

    @property
    def used_weight_decay(self) -> float:
        """`weight_decay` with its default, which depends on the optimizer."""
        default = 0.0 if self.optimizer == "adafactor" else 0.01
        return default if self.weight_decay is None else self.weight_decay

    @property
    def used_clip_grad(self) -> float:
        """`clip_grad` with its default, which depends on the optimizer."""
        default = 0.0 if self.optimizer == "adafactor" else 1.0
        return default if self.clip_grad is None else self.clip_grad


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and what a run starts from."""

    save: str | None = None
    """Directory to save checkpoints in."""
    load: str | None = None
    """Directory of checkpoints to resume from."""
    save_overwrite: Annotated[bool, OmittedAtDefault] = False
    """Start a new run although `--save` has checkpoints of another one, which are deleted once the
    first checkpoint of this run is complete. Without it, that is an error."""
    save_interval: Annotated[int | None, AtLeastOne] = None
    """Steps between saves; a run with `--save` always saves at its end."""
    async_save: bool = False
    """Write checkpoints in the background: training waits for the copy to host memory alone. Needs
    as much host memory as a rank saves."""
    keep_last: Annotated[int | None, AtLeastOne] = None
    """Checkpoints to keep in `--save`, the newest; older ones are deleted after a complete save.
    `None` keeps all."""
    keep_every: Annotated[int | None, AtLeastOne] = None
    """With `--keep-last`, checkpoints of steps that are multiples of this are kept as well."""
    ckpt_step: Annotated[int | None, NonNegative] = None
    """Step to load; `None` means the newest."""
    checkpoint_fallback: bool = False
    """If the newest checkpoint of `--load` is damaged, load the newest earlier one that is not."""
    finetune: bool = False
    """Load only the weights of `--load`: step, optimizer, RNG and data start anew."""
    use_checkpoint_opt_param_scheduler: Annotated[bool, OmittedAtDefault] = False
    """Take the learning rate's schedule and the weight decay from the checkpoint of `--load`, not
    from the flags, which otherwise take effect at once."""
    no_load_optim: bool = False
    """Do not load optimizer state."""
    no_load_rng: bool = False
    """Do not load random states."""
    no_save_optim: bool = False
    """Do not save optimizer state."""
    no_save_rng: bool = False
    """Do not save random states."""
    allow_missing_load: bool = False
    """Start from step 0 if `--load` holds no checkpoint. Without it, that is an error."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports."""

    log_interval: Annotated[int, AtLeastOne] = 100
    """Steps between progress lines and TensorBoard points."""
    tensorboard_dir: str | None = None
    """Directory of TensorBoard events."""
    device_peak_tflops: Annotated[float | None, Positive] = None
    """Peak TFLOP/s of one device for MFU; `None` looks the GPU up, or measures a GEMM on a CPU."""
    metrics_file: str | None = None
    """JSON Lines file with exact per-step loss and gradient norm (hexadecimal floats as well)."""
    routing_log_file: Annotated[str | None, OmittedAtDefault] = None
    """JSON Lines file with the routing statistics of all MoE layers, a line at every
    `--log-interval` and for every probe."""
    routing_log_interval: Annotated[int, NonNegative, OmittedAtDefault] = 100
    """Steps between probes of the routing: fixed rows of the validation data, or else of the
    training data, through the model as in an evaluation; 0 for none."""
    routing_probe_rows: Annotated[int, AtLeastOne, OmittedAtDefault] = 8
    """Rows of a probe, spread over the domains of the data; at least one for each."""
    routing_trace_dir: Annotated[str | None, OmittedAtDefault] = None
    """Directory for traces of the steps of `--routing-trace-steps`: every choice of every token, as
    Parquet; needs the extra `[data]`."""
    routing_trace_steps: Annotated[tuple[str, ...], OmittedAtDefault] = ()
    """Steps that are traced, from 1: `STEP`, `FIRST:LAST` or `FIRST:LAST:EVERY`."""
    routing_replay_dir: Annotated[str | None, OmittedAtDefault] = None
    """Directory with traces of a run of the same data: the steps that it has traces of make their
    choices."""
    log_failure_policy: Annotated[Literal["continue", "stop"], OmittedAtDefault] = "continue"
    """What happens if a metrics file, a trace, TensorBoard or a board cannot be written any more,
    e.g. because the disk is full: `continue` warns once and goes on without it, `stop` saves after
    the step and exits with code 1."""
    log_params_norm: Annotated[bool, OmittedAtDefault] = False
    """Log the norm of all parameters after each step."""
    log_num_zeros_in_grad: Annotated[bool, OmittedAtDefault] = False
    """Log how many elements of each step's gradient are exactly 0."""
    timing_log_level: Annotated[Literal[0, 1, 2], OmittedAtDefault] = 0
    """What is timed besides the step: 0 nothing, 1 what happens once in a step (forward-backward,
    all-grads-sync, optimizer, ...), 2 also what happens for each micro-batch. Above 0, steps are
    slower: each measurement waits for the device."""
    log_timers_to_tensorboard: Annotated[bool, OmittedAtDefault] = False
    """Write the times of `--timing-log-level` to TensorBoard and W&B, in seconds of a step, the
    most and the least over all ranks. The time of the whole step is there in any case."""
    log_straggler: Annotated[bool, OmittedAtDefault] = False
    """Name the slowest and the fastest ranks at every `--log-interval`, by what waits for no other
    rank: a matrix product of fixed size, and reading data."""
    straggler_minmax_count: Annotated[int, AtLeastOne, OmittedAtDefault] = 1
    """With `--log-straggler`, how many of the slowest and of the fastest ranks."""
    log_memory_to_tensorboard: Annotated[bool, OmittedAtDefault] = False
    """Write allocated and reserved memory besides its peak, which is there in any case."""
    tensorboard_log_interval: Annotated[int, AtLeastOne, OmittedAtDefault] = 1
    """Steps between points of values that every step has, in TensorBoard and W&B."""
    tensorboard_queue_size: Annotated[int, AtLeastOne, OmittedAtDefault] = 10
    """Events that TensorBoard's writer holds back before it writes them."""
    profile: Annotated[bool, OmittedAtDefault] = False
    """Record the steps after `--profile-step-start` up to `--profile-step-end`: for nsys, whose
    range it starts and stops on a GPU, or with `--use-pytorch-profiler`."""
    use_pytorch_profiler: Annotated[bool, OmittedAtDefault] = False
    """With `--profile`, write a trace of `torch.profiler` into `--tensorboard-dir`."""
    profile_step_start: Annotated[int, NonNegative, OmittedAtDefault] = 10
    """Completed steps of the run when a profile begins."""
    profile_step_end: Annotated[int, AtLeastOne, OmittedAtDefault] = 12
    """Last step of a profile."""
    profile_ranks: Annotated[tuple[int, ...], NonNegative, OmittedAtDefault] = ()
    """Ranks that are profiled; none named means all."""
    pytorch_profiler_collect_shapes: Annotated[bool, OmittedAtDefault] = False
    """With `--use-pytorch-profiler`, record the shapes of operands."""
    pytorch_profiler_collect_callstack: Annotated[bool, OmittedAtDefault] = False
    """With `--use-pytorch-profiler`, record Python's call stack."""
    record_memory_history: Annotated[bool, OmittedAtDefault] = False
    """Record every allocation of a GPU with its stack, on `--profile-ranks`, and write a snapshot
    after step `--profile-step-end`, and when memory runs out."""
    memory_snapshot_path: Annotated[str, OmittedAtDefault] = "snapshot.pickle"
    """File of `--record-memory-history`; the rank is added to its name. PyTorch's format, which
    its viewer reads (pytorch.org/memory_viz) and this program never does."""
    log_boards: Annotated[tuple[str, ...], OmittedAtDefault] = ()
    """Further boards with the values of TensorBoard, as `NAME=PROJECT`: `mlflow=EXPERIMENT`,
    `trackio=PROJECT`, or another file of `megatron_moe/training/boards/`; each needs the extra of
    its name."""
    log_run_name: Annotated[str | None, OmittedAtDefault] = None
    """Name of the run on `--log-boards`; `None`: the board chooses one."""
    wandb_project: Annotated[str | None, OmittedAtDefault] = None
    """Project of Weights & Biases to log to; needs `--wandb-exp-name` and the extra `[wandb]`."""
    wandb_exp_name: Annotated[str | None, OmittedAtDefault] = None
    """Name of the run in that project."""
    wandb_entity: Annotated[str | None, OmittedAtDefault] = None
    """User or team that the project belongs to."""
    wandb_save_dir: Annotated[str | None, OmittedAtDefault] = None
    """Directory of W&B's files; `None` means `wandb` in `--save`, else the working directory."""
