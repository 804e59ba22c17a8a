"""Ranges of numbers, and rules between flags, checked in one pass before anything is built.

`validate` runs once, right after the command line is read, for `--describe` and for training. It
checks the range of each number, then the rules between flags: first those of the whole run, then
those of each phase (a run without `--phases` is one phase).

Not here: all rules of parallelism, pipelining and recomputation, most of which depend on the number
of ranks (`parallel/layout_rules.py`); how many steps the run takes (`training/plan.py`); whether
the model's sizes are possible (`model/logical.py`); what is found in files.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moe.config.boards import boards_of
from megatron_moe.config.fields import fields_of
from megatron_moe.config.graph import check_graph
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.phases import PhaseSpec, errors_of_phase, read_phases
from megatron_moe.config.precision import PrecisionConfig
from megatron_moe.config.routing_rules import check_routing
from megatron_moe.config.run import RunConfig, flag_of
from megatron_moe.config.steps import StepSet
from megatron_moe.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_moe.errors import UsageError


def validate(config: RunConfig) -> None:
    """Check a configuration. Reads the table of `--phases`, if there is one.

    Raises:
        UsageError: the first rule that does not hold, by flag; for a setting of a phase, the name
            of the phase comes first.
    """
    check_ranges(config)
    _check_attention(config.model)
    _check_implementation(config)
    _check_fp8(config)
    _check_checkpoints(config.checkpoint)
    _check_length(config)
    _check_spikes(config)
    _check_wandb(config.logging)
    _check_profile(config.logging)
    _check_traces(config)
    boards = boards_of(config.logging.log_boards)
    _requires("log_run_name", config.logging.log_run_name, "--log-boards", bool(boards))
    train = config.train
    _requires(
        "manual_gc_interval", train.manual_gc_interval or None, "--manual-gc", train.manual_gc
    )
    if config.train.stages is None:
        _check_phase(config)
        return
    specs = read_phases(config.train.stages)
    _check_table(config, specs)
    for spec in specs:
        with errors_of_phase(spec.label):
            applied = spec.applied(config)
            check_ranges(applied)
            _check_phase(applied)


def check_ranges(config: RunConfig) -> None:
    """Check every number against the range of its field.

    Raises:
        UsageError: the first number outside its range.
    """
    for section in config.sections.values():
        for field in fields_of(type(section)).values():
            field.check(getattr(section, field.name))


def _check_phase(config: RunConfig) -> None:
    """Rules between settings that each phase may have for itself."""
    _check_data(config)
    check_routing(config)
    _check_buffer(config)
    _check_capacity(config)
    _check_overlap(config)
    check_graph(config)
    _check_objective(config)
    _check_learning_rate(config.optimizer)
    _check_rate_units(config)
    _check_optimizer(config)


def _check_capacity(config: RunConfig) -> None:
    """Capacity by layer, and by a target."""
    moe, layers = config.moe, len(config.moe_layers)
    factors, target = moe.moe_layer_capacity_factors, moe.moe_target_drop_rate
    flag, fixed = "--moe-layer-capacity-factors", moe.moe_expert_capacity_factor
    found = " ".join(map(str, factors or ()))
    if factors is not None and len(factors) != layers:
        expected = f"{layers} numbers, one for each MoE layer"
        raise UsageError(flag, found, expected)
    if factors is not None and fixed is None:
        raise UsageError(flag, found, "used with a --moe-expert-capacity-factor")
    if target is None:
        default = type(moe)().moe_capacity_factor_range
        given = moe.moe_capacity_factor_range != default
        _requires("moe_capacity_factor_range", given, "--moe-target-drop-rate", False)
        return
    if factors is not None:
        raise UsageError(flag, found, "used without --moe-target-drop-rate", "give one of the two")
    low, high = moe.moe_capacity_factor_range
    if not low < high:
        found = f"{low} {high}"
        raise UsageError("--moe-capacity-factor-range", found, "two numbers, the smaller one first")
    if fixed is None or not low <= fixed <= high:
        expected = f"from {low} to {high}, --moe-capacity-factor-range, of --moe-target-drop-rate"
        raise UsageError("--moe-expert-capacity-factor", fixed, expected)


def _requires(name: str, value: object, other: str, given: bool) -> None:
    """A flag that is used must come with another one."""
    if value not in (None, False) and not given:
        raise UsageError(flag_of(name), value, f"used with {other}")


def _check_attention(model: ModelConfig) -> None:
    scope = None if model.qk_layernorm_scope == "head" else model.qk_layernorm_scope
    _requires("qk_layernorm_scope", scope, "--qk-layernorm", model.qk_layernorm)


def _check_implementation(config: RunConfig) -> None:
    if config.parallel.transformer_impl != "transformer_engine":
        return
    if config.precision.fp8_emulate:
        expected = "unset with --transformer-impl transformer_engine"
        raise UsageError("--fp8-emulate", True, expected, "it rounds in local layers")
    experts = config.moe.moe_expert_impl
    if experts != "auto":
        expected = "auto with --transformer-impl transformer_engine"
        raise UsageError("--moe-expert-impl", experts, expected, "it has experts of its own")


def _check_fp8(config: RunConfig) -> None:
    fp8, default = config.precision, PrecisionConfig()
    changed = {
        name: getattr(fp8, name)
        for name in fields_of(PrecisionConfig)
        if getattr(fp8, name) != getattr(default, name)
    }
    used = changed.pop("fp8_format", None) is not None
    if changed and not used:
        name, value = next(iter(changed.items()))
        raise UsageError(flag_of(name), value, "used with --fp8-format")
    delayed = fp8.fp8_recipe == "delayed"
    for name in ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
        _requires(name, changed.get(name), "--fp8-recipe delayed", delayed)
    if not fp8.first_last_layers_bf16:
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            if name in changed:
                raise UsageError(flag_of(name), changed[name], "used with --first-last-layers-bf16")
    elif delayed:
        expected = "unset with --fp8-recipe delayed"
        fix = "Megatron-Core updates delayed scales for all layers together; use another recipe"
        raise UsageError("--first-last-layers-bf16", True, expected, fix)
    parallel = config.parallel
    selective = parallel.recompute_granularity == "selective"
    if used and delayed and selective and "layernorm" in parallel.recompute_modules:
        expected = "other modules with --fp8-recipe delayed"
        fix = "Megatron-Core does not recompute norms with delayed scales; use another recipe"
        raise UsageError("--recompute-modules", "layernorm", expected, fix)
    layers = config.model.num_layers
    if used and not any(fp8.in_fp8(layer, layers) for layer in range(layers)):
        kept = fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16
        expected = f"set for fewer than the {layers} layers of the model"
        raise UsageError("--first-last-layers-bf16", kept, expected, "no layer is left in FP8")


def _check_checkpoints(settings: CheckpointConfig) -> None:
    saves, loads = settings.save is not None, settings.load is not None
    _requires("save_interval", settings.save_interval, "--save", saves)
    _requires("async_save", settings.async_save, "--save", saves)
    _requires("save_overwrite", settings.save_overwrite, "--save", saves)
    _requires("keep_every", settings.keep_every, "--keep-last", settings.keep_last is not None)
    _requires("finetune", settings.finetune, "--load", loads)
    _requires("checkpoint_fallback", settings.checkpoint_fallback, "--load", loads)
    scheduler = settings.use_checkpoint_opt_param_scheduler
    _requires("use_checkpoint_opt_param_scheduler", scheduler, "--load", loads)
    if scheduler and settings.finetune:
        fix = "it starts the steps of the learning rate anew"
        raise UsageError(
            flag_of("use_checkpoint_opt_param_scheduler"), True, "used without --finetune", fix
        )
    if settings.checkpoint_fallback and settings.ckpt_step is not None:
        fix = "it selects the step itself"
        raise UsageError("--checkpoint-fallback", True, "used without --ckpt-step", fix)


def _check_spikes(config: RunConfig) -> None:
    policy, saves = config.train.loss_spike_policy, config.checkpoint
    for name in ("loss_spike_sigma", "loss_spike_window", "loss_spike_limit"):
        value = getattr(config.train, name)
        given = value if value != getattr(TrainConfig, name) else None
        _requires(name, given, "--loss-spike-policy", policy is not None)
    if policy == "rollback":
        if saves.save is None or saves.save_interval is None:
            expected = "used with --save and --save-interval"
            raise UsageError("--loss-spike-policy", policy, expected)
        if saves.no_save_optim:
            expected = "used without --no-save-optim"
            raise UsageError("--loss-spike-policy", policy, expected, "moments must come back too")


def _check_wandb(settings: LoggingConfig) -> None:
    used = bool(settings.wandb_project)
    for name in ("wandb_exp_name", "wandb_entity", "wandb_save_dir"):
        _requires(name, getattr(settings, name) or None, "--wandb-project", used)
    if used and not settings.wandb_exp_name:
        raise UsageError("--wandb-exp-name", settings.wandb_exp_name, "a name with --wandb-project")


def _check_traces(config: RunConfig) -> None:
    settings = config.logging
    directory, steps = settings.routing_trace_dir, settings.routing_trace_steps
    _requires("routing_trace_steps", steps or None, "--routing-trace-dir", directory is not None)
    if directory is not None and not steps:
        raise UsageError("--routing-trace-steps", None, "steps with --routing-trace-dir")
    StepSet.of("--routing-trace-steps", steps)
    for name in ("routing_trace_dir", "routing_replay_dir"):
        if getattr(settings, name) is not None and not config.moe_layers:
            raise UsageError(flag_of(name), getattr(settings, name), "unset without MoE layers")


def _check_profile(settings: LoggingConfig) -> None:
    defaults = LoggingConfig()
    for name, flag in (
        ("straggler_minmax_count", "log_straggler"),
        ("memory_snapshot_path", "record_memory_history"),
    ):
        value = getattr(settings, name)
        given = value if value != getattr(defaults, name) else None
        _requires(name, given, flag_of(flag), getattr(settings, flag))
    pytorch, start, end = (
        settings.use_pytorch_profiler,
        settings.profile_step_start,
        settings.profile_step_end,
    )
    _requires("use_pytorch_profiler", pytorch, "--profile", settings.profile)
    for name in ("pytorch_profiler_collect_shapes", "pytorch_profiler_collect_callstack"):
        _requires(name, getattr(settings, name), "--use-pytorch-profiler", pytorch)
    if settings.profile and end <= start:
        raise UsageError("--profile-step-end", end, f"> --profile-step-start ({start})")
    if pytorch and settings.tensorboard_dir is None:
        expected = "used with --tensorboard-dir"
        raise UsageError("--use-pytorch-profiler", True, expected, "traces are written there")


def _check_length(config: RunConfig) -> None:
    iterations, samples = config.train.train_iters, config.train.train_samples
    if iterations is not None and samples is not None:
        expected = "used without --train-samples"
        raise UsageError("--train-iters", iterations, expected, "give one of the two")


def _check_table(config: RunConfig, specs: Sequence[PhaseSpec]) -> None:
    """What the command line must leave to the table of phases."""
    phases = flag_of("stages")
    if config.train.rampup_batch_size is not None:
        found = " ".join(map(str, config.train.rampup_batch_size))
        expected = f"used without {phases}"
        raise UsageError("--rampup-batch-size", found, expected, "set it in the phase that ramps")
    if config.checkpoint.use_checkpoint_opt_param_scheduler:
        flag = flag_of("use_checkpoint_opt_param_scheduler")
        raise UsageError(flag, True, f"used without {phases}", "a phase has rates of its own")
    # The run ends with its last phase, or else where the command line says.
    for name in ("train_iters", "train_samples"):
        value, last = getattr(config.train, name), specs[-1]
        if value is not None and last.unit is not None:
            expected = f"unset: {last.label}, the last one, has an end"
            raise UsageError(flag_of(name), value, expected)


def _check_data(config: RunConfig) -> None:
    data = config.data
    # Each of these feeds training, validation and test; the flags after them feed one split each.
    shared = [name for name in ("data_path", "data_args_path", "mixture") if getattr(data, name)]
    own = ("train_data_path", "valid_data_path", "test_data_path")
    others = [*shared[1:], *(name for name in own if shared and getattr(data, name))]
    if others:
        value = getattr(data, others[0])
        found = " ".join(value) if isinstance(value, tuple) else value
        raise UsageError(flag_of(others[0]), found, f"used without {flag_of(shared[0])}")
    if data.mock_data and (shared or any(getattr(data, name) for name in own)):
        raise UsageError("--mock-data", True, "used without other data", "give one of the two")
    if data.mock_data and config.objective.objective == "sft":
        raise UsageError("--mock-data", True, "unset with --objective sft, which has conversations")
    _requires("data_root", data.data_root, "--mixture", bool(data.mixture))
    length, longest = config.data.seq_length, config.model.max_position_embeddings
    if length > longest:
        raise UsageError("--seq-length", length, f"<= --max-position-embeddings ({longest})")


def _check_buffer(config: RunConfig) -> None:
    moe = config.moe
    factor, flag = moe.moe_dropless_buffer_factor, "--moe-dropless-buffer-factor"
    if factor is not None and moe.moe_expert_capacity_factor is not None:
        fix = "with a capacity factor, capacity bounds the buffer"
        raise UsageError(flag, factor, "used with --moe-expert-capacity-factor None", fix)
    if factor is not None and moe.moe_expert_impl != "grouped":
        fix = "other experts do not compute packed rows everywhere"
        raise UsageError(flag, factor, "used with --moe-expert-impl grouped", fix)
    if factor is not None and moe.moe_token_drop_policy == "fair":
        expected = "another one with --moe-dropless-buffer-factor"
        fix = "fair divides the slots of an expert, and a bounded buffer has rows of a rank"
        raise UsageError("--moe-token-drop-policy", "fair", expected, fix)
    if moe.moe_expert_impl == "grouped" and config.precision.fp8_emulate:
        expected = "auto with --fp8-emulate"
        fix = "emulated FP8 has GEMMs of its own, over all slots"
        raise UsageError("--moe-expert-impl", "grouped", expected, fix)


def _check_overlap(config: RunConfig) -> None:
    moe, flag = config.moe, "--moe-a2a-overlap-chunks"
    chunks = moe.moe_a2a_overlap_chunks
    if chunks == 1:
        return
    if moe.moe_expert_impl != "batched":
        fix = "chunks are of slots, and only these experts compute them in local layers"
        raise UsageError(flag, chunks, "used with --moe-expert-impl batched", fix)
    if moe.moe_token_dispatcher_type != "alltoall":
        raise UsageError(flag, chunks, "used with --moe-token-dispatcher-type alltoall")
    if config.precision.fp8_emulate:
        fix = "scales of emulated FP8 are those of all slots"
        raise UsageError(flag, chunks, "1 with --fp8-emulate", fix)


def _check_objective(config: RunConfig) -> None:
    settings = config.objective
    name = settings.objective
    if settings.eod_mask_loss and name in ("ul2", "sft"):
        raise UsageError(
            "--eod-mask-loss",
            True,
            f"unset with --objective {name}",
            "rows of several parts have ends of their own and define their loss mask themselves",
        )
    _check_chat_rows(config)
    if name != "ul2":
        return
    for reset in ("reset_position_ids", "reset_attention_mask"):
        if getattr(settings, reset):
            raise UsageError(
                flag_of(reset),
                True,
                "unset with --objective ul2",
                "as in the paper, inputs and targets are one row with positions from its start",
            )
    row, inputs = config.data.seq_length, settings.ul2_inputs_length
    if inputs is not None and settings.ul2_fill_rows:
        raise UsageError("--ul2-inputs-length", inputs, "used without --ul2-fill-rows")
    if inputs is not None and not 2 <= inputs <= row - 2:
        expected = f">= 2 and <= --seq-length - 2 ({row - 2})"
        raise UsageError("--ul2-inputs-length", inputs, expected)


def _check_chat_rows(config: RunConfig) -> None:
    """`--sft-share` and `--sft-data-path`."""
    objective = config.objective
    if not objective.sft_share:
        # With phases, files of the command line may be for one of them.
        if objective.sft_data_path and config.train.stages is None:
            found = " ".join(objective.sft_data_path)
            raise UsageError("--sft-data-path", found, "used with --sft-share")
        return
    _requires("sft_share", objective.sft_share, "--sft-data-path", bool(objective.sft_data_path))
    if objective.objective == "sft":
        fix = "all rows hold conversations: name them with --data-path"
        raise UsageError("--sft-share", objective.sft_share, "0 with --objective sft", fix)


def _check_learning_rate(settings: OptimizerConfig) -> None:
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(settings, name)
        if value > settings.lr:
            raise UsageError(flag_of(name), value, f"<= --lr ({settings.lr})")
    decays, steps = settings.lr_decay_style == "WSD", settings.lr_wsd_decay_iters
    samples = settings.lr_wsd_decay_samples
    _requires("lr_wsd_decay_iters", steps, "--lr-decay-style WSD", decays)
    _requires("lr_wsd_decay_samples", samples, "--lr-decay-style WSD", decays)
    if decays and steps is None and samples is None:
        expected = "a number of steps with --lr-decay-style WSD"
        raise UsageError("--lr-wsd-decay-iters", steps, expected)


def _check_rate_units(config: RunConfig) -> None:
    """As in Megatron-LM, all lengths of the learning rate are in steps, or all in sequences."""
    settings = config.optimizer
    names = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")
    given = next((name for name in names if getattr(settings, name)), None)
    if given is not None and config.train.train_samples is None and config.train.stages is None:
        fix = "with --train-iters, lengths are in steps: --lr-decay-iters, --lr-warmup-iters"
        raise UsageError(flag_of(given), getattr(settings, given), "used with --train-samples", fix)
    if given is not None:
        for name in ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"):
            if steps := getattr(settings, name):
                expected = f"{'0' if name == 'lr_warmup_iters' else 'unset'} with {flag_of(given)}"
                fix = "lengths of the learning rate are in steps or in sequences, not both"
                raise UsageError(flag_of(name), steps, expected, fix)
    if settings.lr_warmup_fraction is not None:
        for name in ("lr_warmup_iters", "lr_warmup_samples"):
            if steps := getattr(settings, name):
                expected, fix = "0 with --lr-warmup-fraction", "give one of the two"
                raise UsageError(flag_of(name), steps, expected, fix)


def _check_optimizer(config: RunConfig) -> None:
    settings = config.optimizer
    reasons = {
        "sgd": "Megatron-Core shards the state of Adam only",
        "adafactor": "it cuts parameters at any element; Adafactor needs whole rows and columns",
        "muon": "it cuts parameters at any element; Muon needs whole matrices",
    }
    reason = reasons.get(settings.optimizer)
    if config.parallel.use_distributed_optimizer and reason is not None:
        expected = f"unset with --optimizer {settings.optimizer}"
        raise UsageError("--use-distributed-optimizer", True, expected, reason)
    if settings.optimizer == "adafactor" and settings.used_weight_decay > 0:
        expected = "0 with --optimizer adafactor, which has no weight decay"
        raise UsageError("--weight-decay", settings.used_weight_decay, expected)
