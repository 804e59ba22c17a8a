r"""Pretrain OpenMoE: configuration -> platform -> layout -> data -> model -> training.

    torchrun --nproc-per-node 2 pretrain_openmoe.py --preset openmoe-tiny \
        --expert-model-parallel-size 2 --data-path corpus_text_document --train-iters 100
    python pretrain_openmoe.py --preset openmoe-8b-32e --describe

All flags: --help. What happens in a step, and what is reported: docs/training.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import Command, parse_args
from megatron_moe.config.validate import validate
from megatron_moe.parallel.launch import ended_reader_is_fine, run_or_exit


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: describe or train."""
    run_or_exit(lambda: execute(parse(argv)))


def parse(argv: Sequence[str] | None) -> Command:
    """Read the command line, and the checkpoint that it refers to for settings."""

    def inherit(base: RunConfig, given: RunConfig) -> RunConfig | None:
        from megatron_moe.training.inherited import with_checkpoint_args

        return with_checkpoint_args(base, given)

    return parse_args(argv, examples=__doc__ or "", inherit=inherit)


def execute(command: Command) -> None:
    """Describe or train, as the command line requests, once the configuration is valid."""
    config, notes = command.config, [*command.notes]
    if config.checkpoint.load is not None:
        from megatron_moe.training.inherited import with_checkpoint_tokenizer

        config, lines = with_checkpoint_tokenizer(config)
        notes += lines
    validate(config)
    if command.describe is None:
        with ExitStack() as at_exit:
            pretrain(config, notes, at_exit)
    else:
        from megatron_moe.planning.describe import describe

        text = describe(config, command.describe, command.world_size)
        # Not on standard output, where programs read the description.
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
        with ended_reader_is_fine():
            print(text, flush=True)


def pretrain(config: RunConfig, notes: Sequence[str], at_exit: ExitStack) -> None:
    """Train on the ranks that the launcher started; ``notes`` are lines for the log."""
    from megatron_moe.platform import activate
    from megatron_moe.platform.determinism import make_deterministic

    # First: on a CPU, importing Megatron-Core takes half as long once it is patched.
    platform = activate(config.parallel.distributed_backend)
    if config.train.deterministic_mode:
        make_deterministic(os.environ)
    from megatron_moe.checkpoint.manager import CheckpointManager
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.collectives import launch_rank_group
    from megatron_moe.parallel.context import destroy_parallel, initialize_parallel
    from megatron_moe.parallel.failures import failures_watched
    from megatron_moe.parallel.launch import launched_to_train, note_end
    from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size
    from megatron_moe.training.dataloaders import build_dataloaders, check_coordinates
    from megatron_moe.training.exit_request import build_exit_request
    from megatron_moe.training.hooks import Progress, build_hooks, build_straggler_report
    from megatron_moe.training.metrics import Meter
    from megatron_moe.training.outputs import check_outputs
    from megatron_moe.training.phases import resolve_run_schedule
    from megatron_moe.training.reporting import build_reporter
    from megatron_moe.training.resume import (
        load_run,
        resolve_resume_point,
        resume_lines,
        with_saved_rates,
    )
    from megatron_moe.training.run import compare_kernels, prepare_run
    from megatron_moe.training.save_directory import check_save_directory, only_writer
    from megatron_moe.training.trainer import Trainer

    # Everything that can be wrong with flags, files and data is found before process groups exist.
    here = launched_to_train()
    monitor = at_exit.enter_context(failures_watched(here, config))
    tokenizer = build_tokenizer(config.data)
    vocab_size = padded_vocab_size(config.data, tokenizer)
    schedule = resolve_run_schedule(config, here.world_size, vocab_size)
    check_outputs(config)
    hooks = [*build_hooks(config, here.rank, platform), Progress(monitor)]
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    ranks = launch_rank_group(here, timeout)
    warnings = compare_kernels(config, platform.device.type, ranks)
    check_writer = at_exit.enter_context(only_writer(config.checkpoint, ranks))
    replaced = check_save_directory(config.checkpoint, ranks)
    resume = resolve_resume_point(schedule, ranks)
    schedule = with_saved_rates(schedule, resume, here.world_size, vocab_size)
    dataloaders = build_dataloaders(schedule, here.rank, resume)

    phase = schedule.at(resume.state.iteration)
    ctx = initialize_parallel(phase.layout, config.parallel, platform, config.train.seed)
    check_coordinates(phase.layout, ctx)
    chunks = build_model(phase.config, phase.layout, ctx.pgs, vocab_size, platform.device)
    run = prepare_run(phase.config, phase.plan, ctx, chunks, vocab_size)

    iteration = resume.state.iteration
    reporter = build_reporter(schedule.config, schedule.iterations, ctx.rank, iteration)
    reporter.start(run, schedule, dataloaders.current, resume.state)
    for line in [*notes, *warnings, *resume_lines(schedule, resume)]:
        reporter.log(line)
    load_run(run, dataloaders.current, schedule, resume)
    checkpoints = CheckpointManager(
        schedule.config, ctx, reporter.log, tokenizer.files, replaced, check_writer
    )
    summary = Trainer(
        run=run,
        schedule=schedule,
        dataloaders=dataloaders,
        resume=resume,
        meter=Meter(run),
        checkpoints=checkpoints,
        reporter=reporter,
        exit_request=build_exit_request(schedule, ctx, lambda: checkpoints.saving, reporter.failed),
        hooks=[*hooks, *build_straggler_report(config.logging, ctx, run.timers, reporter.log)],
    ).train()
    destroy_parallel(default_group=True)
    if summary.failure is not None:
        sys.exit(1)
    note_end(finished=summary.state.iteration == schedule.iterations)


if __name__ == "__main__":
    main()
