"""`--kill-switch-file`: the run saves and exits after the step during which the file appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import latest_step
from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.training.outputs import check_outputs
from megatron_moe.training.trainer import Trainer
from tests.training.tiny import MODEL, pretrain_rank


def switched(rank: int, world_size: int, *, argv: list[str], file: str) -> tuple[int, str, str]:
    """A run in which rank 1 makes the file during step 3."""
    whole = Trainer.train_step

    def counted(trainer: Any) -> None:
        whole(trainer)
        if rank == 1 and trainer.state.iteration == 3:
            Path(file).touch()

    Trainer.train_step = counted
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        Trainer.train_step = whole


def test_all_ranks_save_and_exit_at_the_next_step_that_sees_it(pool, corpus, tmp_path) -> None:
    file, save = tmp_path / "stop", tmp_path / "save"
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "40", "--save", str(save)]
    argv += ["--kill-switch-file", str(file)]
    results = pool.run(switched, 2, argv=argv, file=str(file))
    assert [result[0] for result in results] == [0, 0]
    # Rank 0 looks after step 3, perhaps just before rank 1 makes the file, or else after step 4.
    assert latest_step(save) in (3, 4)
    assert f" exiting at iteration {latest_step(save)}: --kill-switch-file {file}" in results[0][1]


def test_a_file_that_exists_already_is_an_error_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    config = parse_args(["--kill-switch-file", str(file)]).config
    check_outputs(config)
    file.touch()
    with pytest.raises(UsageError, match="--kill-switch-file must be a file that does not exist"):
        check_outputs(config)
