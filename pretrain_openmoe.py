r"""Pretrain OpenMoE: configuration -> platform -> layout -> data -> model -> training.

    torchrun --nproc-per-node 2 pretrain_openmoe.py --preset openmoe-tiny \
        --expert-model-parallel-size 2 --data-path corpus_text_document --train-iters 100
    python pretrain_openmoe.py --preset openmoe-8b-32e --describe

All flags: --help. What happens in a step, and what is reported: docs/training.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import Command, parse_args
from megatron_moe.config.validate import validate
from megatron_moe.parallel.launch import ended_reader_is_fine, run_or_exit


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: describe or train."""
    run_or_exit(lambda: execute(parse_args(argv, examples=__doc__ or "")))


def execute(command: Command) -> None:
    """Do what the command line asks for, once the configuration is known to be valid."""
    validate(command.config)
    if command.describe is None:
        pretrain(command.config)
    else:
        from megatron_moe.planning.describe import describe

        text = describe(command.config, command.describe, command.world_size)
        with ended_reader_is_fine():
            print(text, flush=True)


def pretrain(config: RunConfig) -> None:
    """Train on the ranks that the launcher started."""
    from megatron_moe.platform import activate

    # Before anything imports the engine: on a CPU that import is half as long once patched.
    platform = activate(config.parallel.distributed_backend)
    from megatron_moe.model.build import build_model
    from megatron_moe.parallel.collectives import launch_rank_group
    from megatron_moe.parallel.context import destroy_parallel, initialize_parallel
    from megatron_moe.parallel.launch import launched
    from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size
    from megatron_moe.training.kernels import unequal_kernels
    from megatron_moe.training.loop import train
    from megatron_moe.training.outputs import check_outputs
    from megatron_moe.training.phases import resolve_run_schedule
    from megatron_moe.training.placement import check_coordinates
    from megatron_moe.training.reporting import Reporter
    from megatron_moe.training.resume import changed_settings, load_run, resolve_resume_point
    from megatron_moe.training.run import prepare_run
    from megatron_moe.training.supply import build_dataloaders

    here = launched()
    vocab_size = padded_vocab_size(config.data, build_tokenizer(config.data))
    schedule = resolve_run_schedule(config, here.world_size, vocab_size)
    check_outputs(config)
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    ranks = launch_rank_group(here, timeout)
    unequal = unequal_kernels(config, platform.device.type, ranks)
    start = resolve_resume_point(schedule, ranks)
    supply, data = build_dataloaders(schedule, here.rank, start)
    stage = schedule.at(start.state.iteration)
    ctx = initialize_parallel(stage.layout, config.parallel, platform, config.train.seed)
    check_coordinates(stage.layout, ctx)
    chunks = build_model(stage.config, stage.layout, ctx.pgs, vocab_size, platform.device)
    run = prepare_run(stage.config, stage.plan, ctx, chunks, vocab_size)
    reporter = Reporter(config.logging, schedule.iterations, ctx.rank == 0, start.state.iteration)
    reporter.start(run, schedule, data, start.state)
    for line in [*unequal, *start.skipped]:
        reporter.say(f" WARNING: {line}")
    for change in changed_settings(schedule, start):
        reporter.say(f" since the checkpoint: {change}")
    load_run(run, data, schedule, start)
    summary = train(run, schedule, supply, data, start, reporter)
    reporter.end(summary)
    destroy_parallel(default_group=True)
    if summary.failure is not None:
        sys.exit(1)


if __name__ == "__main__":
    main()
