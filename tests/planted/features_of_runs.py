"""Faults for the features that protect a run: what happens around its steps."""

from __future__ import annotations

from tests.planted.entry import Planted

_FINITE = "tests/training/test_finite.py::"
_SPIKES = "tests/training/test_spikes.py::"
_LOCK = "tests/checkpoint/test_lock.py::"
_DIRECTORY = "tests/training/test_save_directory.py::"
_REPORT = "tests/parallel/test_failure_report.py::"
_LOGS = "tests/faults/test_log_destinations.py::"

SIGNALS = (
    Planted(
        row="feature 1",
        fault="data-loader workers receive exit signals",
        file="megatron_moe/data/loader.py",
        old="with exit_signals_blocked():  # starts the workers",
        new="with contextlib.nullcontext():",
        test="tests/platform/test_signals.py::test_workers_go_on_when_every_process_of_a_rank_is_signalled",
    ),
    Planted(
        row="feature 1",
        fault="the second of two signals ends a rank, however close",
        file="megatron_moe/training/exit_request.py",
        old="if now - self._first > REPEAT_SECONDS and",
        new="if now > self._first and",
        test="tests/training/test_signals.py::test_signals_close_together_are_one_request",
    ),
    Planted(
        row="feature 1",
        fault="a rank that fails after its save counts as preempted",
        file="tools/torchrun.py",
        old="if launcher == FAILED and noted != USAGE_EXIT_CODE:",
        new="if launcher == FAILED and noted == 0:",
        test="tests/parallel/test_launch.py::test_a_failure_counts_more_than_what_ranks_noted_before",
    ),
)

FINITE = (
    Planted(
        row="feature 2",
        fault="moments are not checked for NaN before a save",
        file="megatron_moe/checkpoint/finite.py",
        old="    for part in parts:\n        by_dtype",
        new="    for part in (p for p in parts if p.kind == 'model'):\n        by_dtype",
        test=_FINITE
        + "test_the_last_good_checkpoint_stays_the_newest[1-flags0-moment-exp_avg_sq of ]",
    ),
    Planted(
        row="feature 2",
        fault="a finite number counts as infinite if its square is",
        file="megatron_moe/checkpoint/finite.py",
        old="int((~part.values.isfinite()).sum())",
        new="int((~part.values.square().isfinite()).sum())",
        test=_FINITE + "test_large_finite_numbers_are_no_error",
    ),
    Planted(
        row="feature 2",
        fault="a spike must be one of loss and of norm",
        file="megatron_moe/training/spikes.py",
        old="return lm_loss > self._limit(self.losses) or grad_norm",
        new="return lm_loss > self._limit(self.losses) and grad_norm",
        test=_SPIKES + "test_limits_are_mean_and_deviations_of_the_window",
    ),
    Planted(
        row="feature 2",
        fault="the policy is asked after the update",
        file="megatron_moe/training/step.py",
        old="""        if taken:
            _update(run, learning_rate, norm, iteration)
""",
        new="""        _update(run, learning_rate, norm, iteration)
""",
        test=_SPIKES + "test_a_skipped_step_changes_no_bit_of_weights_and_moments",
    ),
)

SAVES = (
    Planted(
        row="feature 3",
        fault="the last evaluation comes before the last save",
        file="megatron_moe/training/trainer.py",
        old="""        self.save()
        self.checkpoints.finish()
        if last := self.run.timers.collect(1):  # of the save, after the last report
            self.reporter.log(timers_line(last))
        if self.finished:
            self.evaluate("validation")
            self.evaluate("test")
""",
        new="""        if self.finished:
            self.evaluate("validation")
            self.evaluate("test")
        self.save()
        self.checkpoints.finish()
""",
        test="tests/faults/test_killed_runs.py::test_a_run_killed_in_its_last_evaluation_has_its_last_step",
    ),
    Planted(
        row="feature 4",
        fault="a living owner whose heartbeat is old is replaced",
        file="megatron_moe/checkpoint/lock.py",
        old="if alive is False or (not alive and watched",
        new="if alive is False or (watched",
        test=_LOCK + "test_a_stopped_owner_on_this_host_lives",
    ),
    Planted(
        row="feature 4",
        fault="a process number alone is compared, without its start",
        file="megatron_moe/checkpoint/owner.py",
        old='return stat is None or (stat[0] not in "ZX" and int(stat[_TICKS]) == ticks)',
        new='return stat is None or stat[0] not in "ZX"',
        test=_LOCK + "test_a_number_that_another_process_has_now_is_no_owner",
    ),
    Planted(
        row="feature 4",
        fault="a process number alone is compared, without its container and boot",
        file="megatron_moe/checkpoint/owner.py",
        old="if place == (here.host, here.boot, here.namespace):",
        new="if self.host == here.host:",
        test=_LOCK + "test_the_same_number_in_another_container_or_before_a_reboot_says_nothing",
    ),
    Planted(
        row="feature 4",
        fault="a zombie counts as living",
        file="megatron_moe/checkpoint/owner.py",
        old='stat[0] not in "ZX"',
        new='stat[0] not in "X"',
        test=_LOCK + "test_a_killed_owner_on_this_host_is_replaced_at_once",
    ),
    Planted(
        row="feature 4",
        fault="heartbeats are ignored",
        file="megatron_moe/checkpoint/lock.py",
        old="self._beat, self._since, self._renewed = found[1], time.monotonic(), True",
        new="self._beat = found[1]",
        test=_LOCK + "test_heartbeats_from_another_host_are_a_living_owner",
    ),
    Planted(
        row="feature 4",
        fault="silence is not waited for",
        file="megatron_moe/checkpoint/lock.py",
        old="if alive is False or (not alive and watched.silence() >= self._timing.lease):",
        new="if not alive:",
        test=_LOCK + "test_silence_of_another_host_is_waited_for",
    ),
    Planted(
        row="feature 4",
        fault="a contender does not look again before it replaces the lock",
        file="megatron_moe/checkpoint/lock.py",
        old="            if self._read() != found:\n                return None\n",
        new="",
        test=_LOCK + "test_a_lock_that_another_run_took_over_a_moment_ago_is_not_replaced",
    ),
    Planted(
        row="feature 4",
        fault="a run that was replaced deletes the other's lock at its end",
        file="megatron_moe/checkpoint/lock.py",
        old="if found is not None and found[0] is not None and found[0].key == self._here.key:",
        new="if found is not None:",
        test=_LOCK + "test_an_owner_that_was_replaced_finds_out_and_leaves_the_other_alone",
    ),
    Planted(
        row="feature 4",
        fault="the writer is checked at the start of a save alone",
        file="megatron_moe/checkpoint/save.py",
        old="            self._check_writer()\n            return directories.commit(",
        new="            return directories.commit(",
        test="tests/checkpoint/test_manager.py::test_a_run_whose_directory_was_taken_over_ends_and_deletes_nothing",
    ),
    Planted(
        row="feature 4",
        fault="ranks ask for SIGTERM at the death of their launcher",
        file="megatron_moe/processes.py",
        old="prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)",
        new="prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)",
        test="tests/faults/test_orphans.py::test_a_rank_ends_with_its_launcher",
    ),
    Planted(
        row="feature 4",
        fault="workers do not watch their rank",
        file="megatron_moe/data/loader.py",
        old="            self.worker_init_fn = functools.partial(_end_with, os.getpid())",
        new="            pass",
        test="tests/faults/test_orphans.py::test_a_run_ends_with_torchrun_and_a_stopped_worker_with_its_rank",
    ),
    Planted(
        row="feature 5",
        fault="without --load, nobody looks for existing checkpoints",
        file="megatron_moe/training/save_directory.py",
        old="    if not has_checkpoint(directory):",
        new="    if settings.load is None or not has_checkpoint(directory):",
        test=_DIRECTORY + "test_a_restart_without_load_changes_nothing[1]",
    ),
    Planted(
        row="feature 5",
        fault="a finetuning counts as a resume",
        file="megatron_moe/training/save_directory.py",
        old="if settings.save is None or settings.load is None or settings.finetune:",
        new="if settings.save is None or settings.load is None:",
        test=_DIRECTORY + "test_a_run_from_other_checkpoints_changes_nothing",
    ),
    Planted(
        row="feature 5",
        fault="--save-overwrite deletes before its first save is complete",
        file="megatron_moe/checkpoint/manager.py",
        old="        self.finish()\n        self.saving = True\n",
        new="        self.finish()\n        _remove_old(settings, step, self._replaced)\n        self.saving = True\n",
        test="tests/checkpoint/test_manager.py::test_checkpoints_of_another_run_go_once_the_first_save_is_complete",
    ),
    Planted(
        row="feature 5",
        fault="--save-overwrite is accepted with a resume",
        file="megatron_moe/training/save_directory.py",
        old="        if settings.save_overwrite:\n            expected",
        new="        if settings.save_overwrite and settings.load is None:\n            expected",
        test=_DIRECTORY + "test_save_overwrite_contradicts_resuming",
    ),
)

NORMS = (
    Planted(
        row="feature 6",
        fault="blocks of squares are added in fp32",
        file="megatron_moe/training/optim/squares.py",
        old="norms = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1).double()",
        new="norms = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1)",
        test="tests/training/optim/test_squares.py::test_a_large_tensor_has_the_sum_of_fp64",
    ),
    Planted(
        row="feature 6",
        fault="a whole dimension is one block",
        file="megatron_moe/training/optim/squares.py",
        old="return min(size & -size, BLOCK) if size else 1",
        new="return size or 1",
        test="tests/training/optim/test_squares.py::test_sums_over_dimensions_are_those_of_fp64",
    ),
    Planted(
        row="feature 6",
        fault="the norm of a tensor is PyTorch's, in fp32",
        file="megatron_moe/training/optim/squares.py",
        old="return torch.stack([_flat_square(tensor.reshape(-1)) for tensor in tensors]).sum()",
        new="return torch.stack([tensor.norm().double().square() for tensor in tensors]).sum()",
        test="tests/training/optim/test_squares.py::test_norms_and_clipping_are_those_of_fp64_in_every_layout[EP2]",
    ),
    Planted(
        row="feature 6",
        fault="Adafactor's sums are not added in blocks",
        file="megatron_moe/training/optim/squares.py",
        old="block = _divisor(tensor.shape[longest])",
        new="block = tensor.shape[longest]",
        test="tests/training/optim/test_adafactor.py::test_the_scale_of_a_large_matrix_is_exact",
    ),
)

FAILURES = (
    Planted(
        row="feature 7",
        fault="a rank that did not answer is named before one that ended",
        file="megatron_moe/parallel/failure_report.py",
        old="        (ENDED, [rank for rank in missing",
        new="        (_NO_ANSWER, missing),\n        (ENDED, [rank for rank in missing",
        test=_REPORT + "test_the_cause_comes_before_its_consequences",
    ),
    Planted(
        row="feature 7",
        fault="the errors that follow from the first are printed too",
        file="megatron_moe/parallel/failure_report.py",
        old="if text and (self.cause != EXCEPTION or rank in self.culprits):",
        new="if text:",
        test=_REPORT + "test_the_original_traceback_is_last_and_others_are_not_printed",
    ),
    Planted(
        row="feature 7",
        fault="runs of ranks end after two",
        file="megatron_moe/parallel/waiting.py",
        old="if runs and rank == runs[-1][-1] + 1:",
        new="if runs and rank == runs[-1][0] + 1:",
        test=_REPORT + "test_equal_texts_of_a_thousand_ranks_are_printed_once",
    ),
    Planted(
        row="feature 7",
        fault="a group is named by its number",
        file="megatron_moe/parallel/waiting.py",
        old="name = group.group_desc or group.group_name",
        new="name = group.group_name",
        test=_REPORT + "test_the_collective_and_the_group_of_a_thread_that_waits",
    ),
    Planted(
        row="feature 7",
        fault="a rank that is no process any more is not reported",
        file="megatron_moe/processes.py",
        old="if r != mine and states.get(r, ENDED)}",
        new="if r != mine and states.get(r)}",
        test="tests/faults/test_orphans.py::test_ranks_of_this_node_that_cannot_answer",
    ),
    Planted(
        row="feature 7",
        fault="the workers that run are named instead of the stopped one",
        file="megatron_moe/data/loader.py",
        old="for pid, state in states.items() if state in _HELD]",
        new="for pid, state in states.items() if state not in _HELD]",
        test="tests/data/test_worker_timeout.py::test_a_stopped_worker_is_an_error_that_names_its_process",
    ),
)

LOGS = (
    Planted(
        row="feature 8",
        fault="a destination that failed is tried again at every event",
        file="megatron_moe/training/reporting.py",
        old="        self._sinks.pop(name, None)\n",
        new="",
        test=_LOGS + "test_the_run_goes_on_without_them_and_says_so_once[full]",
    ),
    Planted(
        row="feature 8",
        fault="an OSError of a destination ends the run",
        file="megatron_moe/training/reporting.py",
        old="                event(sink)\n            except OSError as error:",
        new="                event(sink)\n            except BlockingIOError as error:",
        test=_LOGS + "test_the_run_goes_on_without_them_and_says_so_once[gone]",
    ),
    Planted(
        row="feature 8",
        fault="a run that stops for its log ends with code 0",
        file="megatron_moe/training/trainer.py",
        old="failure = reason if reason == LOG_FAILURE else None",
        new="failure = None",
        test=_LOGS + "test_or_it_saves_and_stops_on_every_rank",
    ),
    Planted(
        row="feature 8",
        fault="the metrics file is rewritten in place at a restart",
        file="megatron_moe/training/outputs.py",
        old='scratch = path.with_name(path.name + ".tmp")',
        new="scratch = path",
        test=_LOGS + "test_a_restart_on_a_full_disk_keeps_the_file_of_the_steps_before",
    ),
    Planted(
        row="feature 8",
        fault="errors of TensorBoard's thread are printed",
        file="megatron_moe/training/tensorboard.py",
        old="if not (of_writer and isinstance(arguments.exc_value, OSError)):",
        new="if not (of_writer and isinstance(arguments.exc_value, TimeoutError)):",
        test=_LOGS + "test_tensorboards_thread_prints_no_traceback",
    ),
    Planted(
        row="feature 8",
        fault="lines that cannot be written are tried once more at the exit",
        file="megatron_moe/training/log.py",
        old="            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())",
        new="            pass",
        test=_LOGS + "test_a_log_that_cannot_be_written_ends_nothing",
    ),
)

FEATURES_OF_RUNS = (*SIGNALS, *FINITE, *SAVES, *NORMS, *FAILURES, *LOGS)
