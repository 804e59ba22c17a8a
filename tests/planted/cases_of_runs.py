"""Faults for the cases in which nothing may be lost, changed or trained wrongly."""

from __future__ import annotations

from tests.planted.entry import Planted

_RESUME = "tests/training/test_resume.py::"
_FAULTS = "tests/faults/test_save_faults.py::"
_SAVE = "tests/checkpoint/test_save.py::"
_SELECT = "tests/checkpoint/test_select.py::"
_DIRECTORY = "tests/checkpoint/test_directory.py::"
_LOAD = "tests/checkpoint/test_load.py::"
_LAYOUTS = "tests/checkpoint/test_layouts.py::"
_STEP = "tests/training/test_step.py::"
_PIPELINE = "tests/data/test_pipeline.py::"
_FLAGS = "tests/training/test_checkpoint_flags.py::"
_LOADER = "megatron_moe/data/loader.py"

REPEATED = (
    Planted(
        row="case 1",
        fault="torch's generator is not seeded at the start of a run",
        file="megatron_moe/parallel/context.py",
        old="    torch.manual_seed(stage_seed)\n    model_parallel_cuda_manual_seed(stage_seed)\n",
        new="    model_parallel_cuda_manual_seed(torch.seed() % 2**31)\n",
        test=_RESUME + "test_twenty_steps_repeat",
    ),
    Planted(
        row="case 2",
        fault="every rank restores the random states of rank 0",
        file="megatron_moe/checkpoint/load.py",
        old="    file = rank_file(ctx.rank)",
        new="    file = rank_file(0)",
        test=_LOAD + "test_random_states_of_every_rank_come_back",
    ),
)

KILLED = (
    Planted(
        row="case 3",
        fault="the tracker is written before the rename",
        file="megatron_moe/checkpoint/directory.py",
        old="""    temporary.rename(final)
    sync_directory(directory)
    replace_text(directory / TRACKER, f"{step}\\n")
""",
        new="""    replace_text(directory / TRACKER, f"{step}\\n")
    temporary.rename(final)
    sync_directory(directory)
""",
        test=_FAULTS
        + "test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint[one file-save]",
    ),
    Planted(
        row="case 3",
        fault="the old checkpoint of a step is removed before the new one has its name",
        file="megatron_moe/checkpoint/directory.py",
        old="    temporary.rename(final)\n",
        new="    for path in older:\n        remove(path)\n    older = []\n    temporary.rename(final)\n",
        test=_FAULTS
        + "test_a_kill_while_a_step_is_saved_again_never_harms_the_old_one[one file-save]",
    ),
    Planted(
        row="case 3",
        fault="a checkpoint is removed under its own name",
        file="megatron_moe/checkpoint/directory.py",
        old='    doomed = path.with_name(f"{_REMOVING}{path.name}-{secrets.token_hex(4)}")',
        new="    doomed = path",
        test=_FAULTS
        + "test_a_kill_while_a_checkpoint_is_removed_leaves_it_whole_or_gone[one file]",
    ),
    Planted(
        row="case 3",
        fault="files are not synced",
        file="megatron_moe/checkpoint/disk.py",
        old="        os.fsync(file.fileno())\n",
        new="",
        test=_SAVE + "test_everything_is_on_the_disk_before_it_counts",
    ),
    Planted(
        row="case 4",
        fault="of files, sizes alone are compared",
        file="megatron_moe/checkpoint/disk.py",
        old="    if digest != record.sha256:",
        new="    if not digest:",
        test=_SAVE + "test_damage_to_any_file_is_an_error_that_names_it",
    ),
    Planted(
        row="case 4",
        fault="the first damaged file alone is named",
        file="megatron_moe/checkpoint/directory.py",
        old="for name, fault in zip(chosen, faults, strict=True) if fault]",
        new="for name, fault in zip(chosen, faults, strict=True) if fault][:1]",
        test=_SAVE + "test_every_damaged_file_is_named_at_once",
    ),
    Planted(
        row="case 4",
        fault="tensors are loaded before their files are verified",
        file="megatron_moe/checkpoint/load.py",
        old="""    if selected is None or not selected.verified:
        verify_tensors(opened, ranks)
    ranks.run_on_all(lambda: _fill(opened, parts))
""",
        new="""    ranks.run_on_all(lambda: _fill(opened, parts))
    if selected is None or not selected.verified:
        verify_tensors(opened, ranks)
""",
        test=_LOAD + "test_a_flipped_bit_is_rejected_on_every_rank_before_anything_changes",
    ),
    Planted(
        row="case 4",
        fault="a manifest is not compared with its own digest",
        file="megatron_moe/checkpoint/directory.py",
        old='    if content.get("digest") != (digest := _digest(content)):',
        new='    if (digest := _digest(content)) and "digest" not in content:',
        test=_DIRECTORY + "test_a_flipped_digit_in_the_manifest_is_noticed",
    ),
    Planted(
        row="case 5",
        fault="a missing tracker means the newest step",
        file="megatron_moe/checkpoint/directory.py",
        old='        text = "missing"',
        new="        text = str(max(steps, default=0))",
        test=_DIRECTORY + "test_a_missing_tracker_beside_checkpoints_is_an_error",
    ),
    Planted(
        row="case 5",
        fault="a broken tracker alone is an empty directory",
        file="megatron_moe/checkpoint/directory.py",
        old="return (path / TRACKER).exists() or bool(revisions(path))",
        new="return bool(revisions(path))",
        test=_DIRECTORY + "test_an_empty_tracker_alone_is_not_an_empty_directory",
    ),
    Planted(
        row="case 6",
        fault="a save that fails leaves its files",
        file="megatron_moe/checkpoint/save.py",
        old="            self._transaction.roll_back()\n            self._end()\n",
        new="            self._end()\n",
        test=_FAULTS
        + "test_a_write_that_fails_reports_step_and_bytes_and_leaves_nothing[one file-100-save]",
    ),
    Planted(
        row="case 6",
        fault="a short write counts as a whole one",
        file="megatron_moe/checkpoint/disk.py",
        old="    while data:\n        data = data[file.write(data) :]",
        new="    file.write(data)",
        test=_FAULTS
        + "test_a_write_that_fails_reports_step_and_bytes_and_leaves_nothing[one file-100-save]",
    ),
    Planted(
        row="case 6",
        fault="the bytes needed are named for an exceeded quota alone",
        file="megatron_moe/checkpoint/save.py",
        old="_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)",
        new="_NO_SPACE = (errno.EDQUOT,)",
        test=_FAULTS + "test_a_full_disk_is_an_error_and_the_old_checkpoint_stays[one file-save]",
    ),
    Planted(
        row="case 7",
        fault="a loader that resumes begins at sample 0",
        file=_LOADER,
        old="first = self.start + self.shard.dp_rank * size",
        new="first = self.shard.dp_rank * size",
        test=_PIPELINE + "test_resume_in_another_layout",
    ),
    Planted(
        row="case 7",
        fault="a position is rounded to whole steps",
        file=_LOADER,
        old="self.shard, self.start = shard, start",
        new="self.shard, self.start = shard, start // shard.global_batch_size * shard.global_batch_size",
        test=_PIPELINE + "test_resume_after_another_batch_size",
    ),
)

ELASTIC = (
    Planted(
        row="case 8",
        fault="a rank's part of the moments is written as if it began at 0",
        file="megatron_moe/model/sharding/parts.py",
        old="yield from _flat_parts(kind, shard, flat, state.start)",
        new="yield from _flat_parts(kind, shard, flat, 0)",
        test=_LAYOUTS + "test_every_layout_loads_and_saves_the_same_tensors[DP4 distributed]",
    ),
    Planted(
        row="case 8",
        fault="tied embeddings are written by both stages",
        file="megatron_moe/model/sharding/parts.py",
        old="        if not shard.writer:\n            continue\n",
        new="",
        test=_LAYOUTS + "test_tied_embeddings_are_written_once_and_read_on_both_stages",
    ),
    Planted(
        row="case 9",
        fault="each rank reads a block of all its micro-batches",
        file=_LOADER,
        old="            first += size * self.shard.dp_size",
        new="            first += size",
        test=_PIPELINE + "test_order_does_not_depend_on_the_layout",
    ),
    Planted(
        row="case 10",
        fault="the type of router is not compared",
        file="megatron_moe/checkpoint/compare.py",
        old='*("moe_router_topk", "moe_router_type", ',
        new='*("moe_router_topk", ',
        test=_LOAD + "test_a_run_resumes_only_with_the_router_and_the_padding_that_it_had",
    ),
    Planted(
        row="case 10",
        fault="shapes of tensors are compared, and dtypes are not",
        file="megatron_moe/checkpoint/compare.py",
        old="elif (tensor.shape, tensor.dtype) != (shape, dtype):",
        new="elif tensor.shape != shape:",
        test=_LOAD + "test_no_silent_cast",
    ),
)

WRONG = (
    Planted(
        row="case 11",
        fault="exchanged elements have the same hash",
        file="megatron_moe/training/replicas.py",
        old="(chunk * places).sum()",
        new="(chunk * chunk).sum()",
        test="tests/training/test_replicas.py::test_the_hash_sees_every_bit_and_every_exchange",
    ),
    Planted(
        row="case 12",
        fault="squares are added over all ranks, replicas included",
        file="megatron_moe/training/whole_model.py",
        old="torch.distributed.all_reduce(found, group=part.get_grad_stats_parallel_group())",
        new="torch.distributed.all_reduce(found)",
        test=_STEP + "test_loss_and_gradient_norm_are_the_reference_models[DP2]",
    ),
    Planted(
        row="case 13",
        fault="a choice more is kept than there are slots",
        file="megatron_moe/moe/plan.py",
        old="kept_GA = rank_GA < capacity.slots",
        new="kept_GA = rank_GA <= capacity.slots",
        test="tests/moe/test_plan.py::test_slots_are_full_before_anything_drops",
    ),
    Planted(
        row="case 13",
        fault="counts are not added over data-parallel ranks",
        file="megatron_moe/moe/statistics.py",
        old="    for group in (tp, dp, pp):",
        new="    for group in (tp, pp):",
        test="tests/training/test_reporting.py::test_every_choice_of_every_token_is_in_the_load_histogram",
    ),
    Planted(
        row="case 14",
        fault="a norm is checked for infinity alone",
        file="megatron_moe/training/step.py",
        old="        if not math.isfinite(norm):",
        new="        if math.isinf(norm):",
        test=_STEP + "test_a_nan_stops_every_rank_before_anything_changes[DP2-1-1]",
    ),
    Planted(
        row="case 14",
        fault="a rank's own gradients are looked at after they are reduced",
        file="megatron_moe/parallel/schedule.py",
        old="""        if before_reduction is not None:
            before_reduction()
        finalize_gradients(ctx, chunks)
""",
        new="""        finalize_gradients(ctx, chunks)
        if before_reduction is not None:
            before_reduction()
""",
        test=_STEP + "test_a_nan_stops_every_rank_before_anything_changes[DP2-1-1]",
    ),
    Planted(
        row="case 14",
        fault="the steps before a failed one are not reported",
        file="megatron_moe/training/trainer.py",
        old="            self.report(final=True)\n",
        new="",
        test="tests/training/test_trainer.py::test_a_non_finite_gradient_reports_the_steps_before_it_and_saves_nothing",
    ),
)

HANGS = (
    Planted(
        row="case 20",
        fault="a rank does not ask to end with its launcher",
        file="megatron_moe/processes.py",
        old="    if launcher is None or launcher.pid == os.getppid():",
        new="    if launcher is None or launcher.pid == os.getpid():",
        test="tests/faults/test_orphans.py::test_a_rank_ends_with_its_launcher",
    ),
    Planted(
        row="case 21",
        fault="a signal during a save ends the process",
        file="megatron_moe/training/exit_request.py",
        old=" and not self._saving() and",
        new=" and",
        test="tests/training/test_signals.py::test_no_signal_interrupts_a_save",
    ),
)

CASES_OF_RUNS = (*REPEATED, *KILLED, *ELASTIC, *WRONG, *HANGS)
