"""Usage errors under real torchrun: printed once, and exit code 2 on every rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import pretrain_openmoe
from megatron_moe.errors import UsageError
from megatron_moe.parallel import launch
from megatron_moe.parallel.launch import Launched, launched, launched_to_train

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How a program under torchrun ended."""

    codes: dict[int, int]
    """Exit code of each rank; 143 for one that the launcher terminated."""
    errors: list[str]
    """Lines of the program on standard error."""
    printed: str


def torchrun(tmp_path: Path, what: str, ranks: int = 2) -> Ended:
    """Start the program; each rank leaves its exit code."""
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OUT": str(tmp_path)}
    run = f'"{sys.executable}" -m tests.parallel.launch_program "{what}" 2> "$OUT/errors-$RANK"'
    # Rank 0 is slow to start, so that the others have to wait for it.
    leave = 'code=$?; echo $code > "$OUT/code-$RANK"; exit $code'
    # The shell survives the signal that ends a rank, to write down the exit code of the rank.
    script = f'trap : TERM; [ "$RANK" = 0 ] && sleep 1; {run}; {leave}'
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "--no-python",
            "bash",
            "-c",
            script,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    codes = {int(p.name[5:]): int(p.read_text()) for p in tmp_path.glob("code-*")}
    files = sorted(tmp_path.glob("errors-*"))
    errors = [line for p in files for line in p.read_text().splitlines()]
    return Ended(codes, errors, done.stdout)


@pytest.mark.parametrize(("what", "status"), [("nothing", 0), ("once", 2)])
def test_the_launcher_s_own_exit_status(what: str, status: int) -> None:
    """Plain torchrun ends with 1 after a usage error. For 75 see test_launched_signals.py."""
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "torchrun.py"), "--standalone"),
            *("--nproc-per-node", "2", "-m", "tests.parallel.launch_program", what),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == status, done.stderr


def test_a_failure_counts_more_than_what_ranks_noted_before() -> None:
    from tools.torchrun import status_of

    assert [status_of(1, 0), status_of(1, 75), status_of(1, 2)] == [1, 1, 2]
    assert [status_of(143, 75), status_of(0, 75), status_of(0, 0)] == [75, 75, 0]


def test_an_error_that_every_rank_finds_is_printed_once(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "everywhere", ranks=3)
    assert ended.codes == {0: 2, 1: 2, 2: 2}
    assert ended.errors == ["program: error: --planted must be 1 or 2 (got 3)"]


def test_an_error_that_one_rank_finds_ends_all(tmp_path: Path) -> None:
    """The rank without an error must not be terminated for being a second behind the other."""
    ended = torchrun(tmp_path, "once, rank 0 lingers")
    assert ended.codes == {0: 2, 1: 2}
    assert ended.errors == ["program: error: --planted must be 1 or 2 (got 3)"]


@pytest.mark.slow
def test_different_errors_are_all_printed(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "each its own")
    assert ended.codes == {0: 2, 1: 2}
    assert ended.errors == [
        f"program: error: --planted must be something else (got {rank})" for rank in range(2)
    ]


@pytest.mark.slow
def test_an_error_found_after_groups_exist_is_printed_once_too(tmp_path: Path) -> None:
    ended = torchrun(tmp_path, "late")
    assert ended.printed.splitlines() == ["sum 2", "sum 2"]
    assert ended.codes == {0: 2, 1: 2}
    assert ended.errors == ["program: error: --planted must be unset once groups exist (got 3)"]


def test_ranks_started_without_torchrun_wait_for_each_other() -> None:
    """As `srun` starts them: rank 0 serves their store, and must be the last to exit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {k: v for k, v in os.environ.items() if k not in NAMES and "ELASTIC" not in k}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.launch_program", "once, rank 1 lingers"],
            cwd=ROOT,
            env=base | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert errors == ["", "program: error: --planted must be 1 or 2 (got 3)\n"]


def test_a_barrier_makes_as_few_requests_for_a_thousand_ranks_as_for_two() -> None:
    """Two requests for each rank, whatever their number; all leave only when all have arrived."""
    import torch.distributed as dist

    class Counted(dist.HashStore):
        requests = 0

        def add(self, key: str, amount: int) -> int:
            Counted.requests += 1
            return super().add(key, amount)

        def wait(self, keys: list[str], timeout: timedelta) -> None:
            Counted.requests += len(keys)
            super().wait(keys, timeout)

    world, store, arrived, early = 256, Counted(), [], []

    def rank(number: int) -> None:
        arrived.append(number)
        here = Launched(rank=number, world_size=world, alone=False)
        launch.barrier(store, "start", here, timedelta(seconds=60))
        if len(arrived) < world:
            early.append(number)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(arrived) == world
    assert not early
    assert Counted.requests == 2 * world


def test_without_a_launcher_a_program_is_a_world_of_one() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in NAMES}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.launch_program", "late"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "sum 1\n"
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_launcher_s_variables(environment: pytest.MonkeyPatch) -> None:
    assert launched() == Launched(rank=0, world_size=1, local_rank=0, alone=True)
    for name, value in zip(NAMES, ("5", "8", "1", "localhost", "29500"), strict=True):
        environment.setenv(name, value)
    assert launched() == Launched(rank=5, world_size=8, local_rank=1, alone=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "environment variable WORLD_SIZE must be a number (got None)"),
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            "environment variable RANK must be a number (got 'x')",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "environment variable MASTER_ADDR must be set, as RANK is (got None)",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "environment variable RANK must be >= 0 and < WORLD_SIZE (2) (got 2)",
        ),
    ],
)
def test_a_half_set_environment_is_rejected(
    variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        launched()
    assert str(caught.value) == f"{message}; start the program with torchrun"


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2"},
    ],
)
def test_several_processes_without_torchrun_do_not_train(
    variables: dict[str, str], environment: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each would be a world of one rank, and all would write into one directory."""
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        pretrain_openmoe.main(["--preset", "openmoe-tiny", "--vocab-size", "100"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"environment variable {next(iter(variables))} must be 1 without RANK" in line


def test_a_launcher_that_starts_one_process_is_no_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_NTASKS", "1")
    assert launched_to_train() == Launched()
    for name, value in zip(NAMES, ("1", "2", "1", "localhost", "29500"), strict=True):
        environment.setenv(name, value)
    environment.setenv("SLURM_NTASKS", "2")  # srun started two torchruns, which started the ranks
    assert launched_to_train().rank == 1


def test_describe_works_anywhere(environment: pytest.MonkeyPatch, capsys: Any) -> None:
    environment.setenv("SLURM_NTASKS", "8")
    pretrain_openmoe.main(["--preset", "openmoe-8b-32e", "--describe"])
    assert "24 heads x 128" in capsys.readouterr().out
