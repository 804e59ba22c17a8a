"""Profiles of some steps (`--profile`).

With `--use-pytorch-profiler` a trace of `torch.profiler`, in the folder of TensorBoard, for its
plugin or Perfetto. Without it, the range of `cudaProfilerStart` and `cudaProfilerStop`, for
`nsys profile --capture-range cudaProfilerApi`. The steps after `--profile-step-start`, up to
`--profile-step-end`, are recorded.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from megatron_moe.config import LoggingConfig
from megatron_moe.errors import UsageError
from megatron_moe.platform import Platform
from megatron_moe.training.step_hook import Hook


class StepProfiler(Hook):
    """Records the steps of a range.

    Args:
        logging: the range, and what a trace contains.
        rank: this rank, for the name of its file.
        platform: the device.
    """

    def __init__(self, logging: LoggingConfig, rank: int, platform: Platform) -> None:
        self._logging, self._platform, self._rank = logging, platform, rank
        self._running: Any = None

    def before_step(self, completed: int) -> None:
        """Begin to record after `--profile-step-start` steps."""
        if completed != self._logging.profile_step_start:
            return
        self._platform.synchronize()
        self._running = self._trace() if self._logging.use_pytorch_profiler else _CudaRange()
        self._running.start()

    def after_step(self, iteration: int) -> None:
        """End after step `--profile-step-end`, and write the trace."""
        if iteration == self._logging.profile_step_end:
            self.close()

    def close(self) -> None:
        """Write a trace that has begun: the run may end before the range does."""
        if self._running is not None:
            self._platform.synchronize()
            running, self._running = self._running, None
            try:
                running.stop()
            except OSError as error:
                # Of one rank, while the others go on; and a trace is not worth a run.
                message = f"the profile of rank {self._rank} cannot be written: {error}"
                warnings.warn(message, stacklevel=2)

    def _trace(self) -> torch.profiler.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._platform.kind == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        directory = str(self._logging.tensorboard_dir)
        return torch.profiler.profile(
            activities=activities,
            on_trace_ready=torch.profiler.tensorboard_trace_handler(
                directory, worker_name=f"rank-{self._rank}", use_gzip=True
            ),
            record_shapes=self._logging.pytorch_profiler_collect_shapes,
            with_stack=self._logging.pytorch_profiler_collect_callstack,
        )


class _CudaRange:
    """What Nsight Systems records with `--capture-range cudaProfilerApi`."""

    def start(self) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())

    def stop(self) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStop())


def build_profiler(logging: LoggingConfig, rank: int, platform: Platform) -> StepProfiler | None:
    """The profiler of this rank, if it records.

    Raises:
        UsageError: on every rank: there is no GPU whose profiler could be started.
    """
    if not logging.profile:
        return None
    if platform.kind == "cpu" and not logging.use_pytorch_profiler:
        expected = "used with --use-pytorch-profiler on a CPU"
        fix = "alone it starts the profiler of a GPU, for nsys"
        raise UsageError("--profile", True, expected, fix)
    if logging.profile_ranks and rank not in logging.profile_ranks:
        return None
    return StepProfiler(logging, rank, platform)
