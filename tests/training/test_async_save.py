"""`--async-save` in a run: the same steps and checkpoints as without; failures end it."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import latest_step, verify
from tests.training.tiny import MODEL, pretrain_rank

EP2 = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]
KEEP = ["--save-interval", "3", "--keep-last", "2", "--keep-every", "9"]


def _argv(corpus: str, directory: Path, *flags: str) -> list[str]:
    argv = [*MODEL, "--hidden-dropout", "0.1", "--data-path", corpus, "--train-iters", "16"]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--save", str(directory)]
    return [*argv, *flags]


def _files(directory: Path) -> dict[str, bytes]:
    """Tensors, index and tracker; the configurations differ by the flag under test."""
    found = sorted(directory.rglob("*"))
    kept = [p for p in found if p.is_file() and p.name not in ("config.json", "manifest.json")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in kept}


@pytest.mark.parametrize(
    ("world", "flags"), [pytest.param(1, [], marks=pytest.mark.slow), (2, EP2)]
)
def test_a_run_is_the_same_with_and_without(pool, corpus, tmp_path, world, flags):
    now, behind = tmp_path / "now", tmp_path / "behind"
    for directory, extra in ((now, []), (behind, ["--async-save"])):
        argv = _argv(corpus, directory, *flags, *KEEP, *extra)
        results = pool.run(pretrain_rank, world, argv=argv)
        assert [code for code, *_ in results] == [0] * world, results[0][2]
        steps = [3, 6, 9, 12, 15, 16]
        said = [text for text in results[0][1].splitlines() if text.startswith(" saved")]
        ending = " asynchronously" if extra else ""
        expected = [f" saved iteration {n} to {directory / f'iter_{n:07d}'}{ending}" for n in steps]
        assert said == expected
    files = _files(now)
    kept = {Path(name).parts[0] for name in files if "/" in name}
    assert kept == {"iter_0000009", "iter_0000015", "iter_0000016"}
    assert _files(behind) == files
    for step in (9, 15, 16):
        verify(behind, step)


def test_it_needs_a_directory(pool, corpus):
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "9", "--async-save"]
    ((code, _, message),) = pool.run(pretrain_rank, 1, argv=argv)
    assert code == 2
    assert message == "--async-save must be used with --save (got True)"


def _full_later(rank: int, world_size: int, *, argv: list[str], save: Path) -> Any:
    """A run of which rank 1 may write no large file any more once step 3 has been saved."""
    from megatron_moe.training.trainer import Trainer

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    train_step, taken = Trainer.train_step, []

    def counted(trainer: Trainer) -> None:
        train_step(trainer)
        taken.append(trainer.state.iteration)
        if len(taken) == 5 and rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    Trainer.train_step = counted
    try:
        return (*pretrain_rank(rank, world_size, argv=argv), taken)
    finally:
        Trainer.train_step = train_step
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_save_that_fails_ends_the_run_at_the_next_step_on_every_rank(pool, corpus, tmp_path):
    argv = _argv(corpus, tmp_path, *EP2, "--save-interval", "3", "--async-save")
    results = pool.run(_full_later, 2, argv=argv, save=tmp_path)
    assert results[0][3] == results[1][3]
    taken = results[0][3]
    assert 6 < taken[-1] < 9, "told at a step soon after, not at the next save"
    for code, _, message, _ in results:
        assert code == 2
        assert message.startswith(f"space for the save of step 6 to {tmp_path} must be enough for ")
        assert "(got 'File too large, " in message
        assert "\n" not in message
    assert latest_step(tmp_path) == 3
    verify(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000003", "latest_checkpointed_iteration.txt", "metrics.jsonl"]
