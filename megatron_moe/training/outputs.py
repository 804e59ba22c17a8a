"""Where a run writes: checked before it starts, consistent after it resumes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from megatron_moe.config import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe.trace import require_pyarrow, traced_steps
from megatron_moe.text import printable
from megatron_moe.training.board_registry import check_boards
from megatron_moe.training.wandb_run import check_wandb, wandb_directory


def check_outputs(config: RunConfig) -> None:
    """Check that every output can be written, without leaving anything there.

    Otherwise the first save, hours later, would fail.

    Raises:
        UsageError: a directory or file that cannot be created or written.
    """
    for flag, directory in (
        ("--save", config.checkpoint.save),
        ("--tensorboard-dir", config.logging.tensorboard_dir),
        ("--routing-trace-dir", config.logging.routing_trace_dir),
    ):
        if directory is not None and printable(directory) != directory:
            fix = "the libraries that open its files support no other name"
            raise UsageError(flag, directory, "a path in UTF-8", fix)
        _directory(flag, directory)
    if config.logging.wandb_project:
        check_wandb()
        _directory("--wandb-save-dir", wandb_directory(config))
    check_boards(config)
    switch = config.train.kill_switch_file
    if switch is not None and os.path.exists(switch):
        fix = "the run would end after its first step; delete it to train"
        raise UsageError("--kill-switch-file", switch, "a file that does not exist yet", fix)
    _check_traces(config.logging.routing_trace_dir, config.logging.routing_replay_dir)
    _file("--metrics-file", config.logging.metrics_file)
    _file("--routing-log-file", config.logging.routing_log_file)


def _check_traces(written: str | None, replayed: str | None) -> None:
    if written is not None:
        require_pyarrow("--routing-trace-dir", written)
    if replayed is None:
        return
    require_pyarrow("--routing-replay-dir", replayed)
    if not traced_steps(replayed):
        expected = "a directory with files of --routing-trace-dir"
        raise UsageError("--routing-replay-dir", replayed, expected)
    if written is not None and os.path.realpath(written) == os.path.realpath(replayed):
        raise UsageError("--routing-trace-dir", written, "another than --routing-replay-dir")


def _file(flag: str, path: str | None) -> None:
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(flag, path, "a file, not a directory")
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise UsageError(flag, path, "a writable file")
    _directory(flag, str(Path(path).absolute().parent))


def _directory(flag: str, path: str | None) -> None:
    if path is None:
        return
    # A path that does not exist yet is created in its nearest existing parent.
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if _is(p))
    if not existing.is_dir():
        raise UsageError(flag, path, "a directory", f"{existing} is a file")
    try:
        # Permission bits are not enough: root has them all, and a file system may be read-only.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        found = f"{existing}: {error.strerror}"
        raise UsageError(flag, path, "a writable directory", found) from None


def _is(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # e.g. a name that is too long, or a directory that cannot be searched
        return False


def drop_later_steps(path: Path, iteration: int) -> None:
    """Drop the records of steps after ``iteration``, which will run again, from a JSON Lines file.

    A last line that was cut off when a run was killed is dropped as well.

    Raises:
        OSError: the disk is full, or any other failure; the file is as before.
    """
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _within(line, iteration)]
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text("".join(line + "\n" for line in kept))
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _within(line: str, iteration: int) -> bool:
    try:
        return int(json.loads(line)["iteration"]) <= iteration
    except (ValueError, KeyError, TypeError):
        return False
