"""What a run does: its data, steps, optimizer, checkpoints and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
    split: str = "969,30,1"
    """Shares of documents of `--data-path` for training, validation and test."""
    data_cache_path: str | None = None
    """Directory for sample indices; `None` means a `cache` folder beside the data."""
    mmap_bin_files: bool = True
    """Map `.bin` files into memory rather than reading them."""
    num_workers: int = 1
    """Background threads or processes that prepare batches; 0 reads in the training process."""
    seq_length: int = 256
    """Tokens S of one sample."""
    tokenizer_type: Literal[
        "SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer", "NullTokenizer"
    ] = "NullTokenizer"
    """Tokenizer family. `NullTokenizer` has no text, only `--vocab-size` ids."""
    tokenizer_model: str | None = None
    """File of the tokenizer: a SentencePiece model, or a `tokenizer.json` or its folder."""
    vocab_size: int | None = None
    """Vocabulary V before padding; `None` takes the tokenizer's."""
    vocab_extra_ids: int = 0
    """Ids after the tokenizer's own, for the sentinels of span corruption; umT5 has 300."""
    make_vocab_size_divisible_by: int = 128
    """V is padded to a multiple of this, whatever the layout; tensor parallelism must divide it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How many steps of what size."""

    micro_batch_size: int = 4
    """Sequences B in one forward pass of one data-parallel rank."""
    global_batch_size: int | None = None
    """Sequences of one optimizer step; `None` means micro batch x data-parallel size."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: the global batch grows from START, by INCREMENT at a time, to
    `--global-batch-size` over the first SAMPLES sequences."""
    train_iters: int | None = None
    """Optimizer steps of the whole run, over all its restarts."""
    train_samples: int | None = None
    """The same, in sequences; give one of the two."""
    stages: str | None = None
    """TOML file of stages: objective, data, batch, sequence length, learning rate or dropout that
    change in the middle of the run."""
    eval_interval: int = 1000
    """Steps between evaluations on validation data."""
    eval_iters: int = 100
    """Global batches of one evaluation; 0 evaluates never."""
    domain_eval_iters: int | None = None
    """Global batches of each domain's own evaluation, where held-out data has several; 0 for none.
    `None` divides `--eval-iters` among them, so that together they cost as much again."""
    exit_interval: int | None = None
    """Save and end once the iteration is a multiple of this."""
    exit_signal_handler: bool = False
    """On SIGTERM to any rank, save after the current step and end all ranks with exit code 0."""
    seed: int = 1234
    """Seed of initialisation, data order and dropout."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; otherwise fp32."""

    def used_domain_eval_iters(self, domains: int) -> int:
        """`domain_eval_iters` with its default, for so many domains."""
        default = -(-self.eval_iters // max(domains, 1))
        return default if self.domain_eval_iters is None else self.domain_eval_iters


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a step changes the weights."""

    optimizer: Literal["adam", "sgd", "adafactor"] = "adam"
    """`adam` is AdamW (decoupled weight decay); `adafactor` is what OpenMoE was trained with."""
    lr: float = 3e-4
    """Learning rate at its peak."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after warm-up; `WSD` stays at the peak and decays at the end."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of `WSD`."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the decay at the end of `WSD`."""
    lr_decay_iters: int | None = None
    """Steps until the decay ends; `None` means the length of the run."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first step of warm-up."""
    weight_decay: float | None = None
    """Weight decay of matrices; norms have none. `None` means 0.01; with Adafactor, 0."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    sgd_momentum: float = 0.9
    """Momentum of `--optimizer sgd`."""
    adafactor_decay_rate: float = 0.8
    """Adafactor's second moments decay by 1 - t^-RATE at step t."""
    adafactor_clip_threshold: float = 1.0
    """Root mean square above which Adafactor scales a matrix's update down."""
    adafactor_min_dim: int = 128
    """Adafactor keeps row and column means of matrices whose two sizes are at least this."""
    clip_grad: float | None = None
    """Global gradient norm above which gradients are scaled down; 0 never. `None` means 1; with
    Adafactor, 0."""

    freeze_params: tuple[str, ...] = ()
    """Parameters that stay as they are: patterns (`*`, `?`, `[...]`) of logical names."""
    freeze_router_after: int | None = None
    """Steps after which router weights stay as they are."""

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
    """What is saved and where a run starts from."""

    save: str | None = None
    """Directory to save checkpoints in."""
    load: str | None = None
    """Directory to continue from."""
    save_interval: int | None = None
    """Steps between saves; a run with `--save` always saves at its end."""
    async_save: bool = False
    """Train on while a save is written: only the copy to host memory is waited for. Takes as much
    host memory as a rank saves."""
    keep_last: int | None = None
    """Newest steps that stay in `--save`; older ones go after a complete save. `None` keeps all."""
    keep_every: int | None = None
    """With `--keep-last`, steps that are multiples of this stay as well."""
    ckpt_step: int | None = None
    """Step to load; `None` means the newest."""
    checkpoint_fallback: bool = False
    """If the newest checkpoint of `--load` is damaged, take the newest earlier whole one."""
    finetune: bool = False
    """Take only the weights of `--load`: step, optimizer, RNG and data start afresh."""
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
    """What a run tells."""

    log_interval: int = 100
    """Steps between progress lines and TensorBoard points."""
    tensorboard_dir: str | None = None
    """Directory of TensorBoard events."""
    device_peak_tflops: float | None = None
    """Peak TFLOP/s of one device for MFU; `None` looks the GPU up, or measures a GEMM on a CPU."""
    metrics_file: str | None = None
    """JSON Lines file with exact per-step loss and gradient norm (hexadecimal floats as well)."""
