"""Ranks that srun starts itself: Slurm's variables in place of torchrun's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.errors import UsageError
from megatron_moe.parallel.slurm import first_host, torchrun_variables
from tests.training.tiny import MODEL, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TASK = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-009,12],login", "gpu007"),
        ("gpu[3]", "gpu3"),
        ("rack[1-2]gpu[01-04].local", "rack1gpu01.local"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_a_task_is_a_rank():
    assert torchrun_variables(TASK) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + (4711 * 16 + 2) % 12000),
    }


def test_given_addresses_are_kept():
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert set(torchrun_variables(TASK | given)) == {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@pytest.mark.parametrize(
    ("variables", "device"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "5"),  # those of the node
        ({"CUDA_VISIBLE_DEVICES": "3"}, "0"),  # --gpus-per-task, --gpu-bind=single:1
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "1"),  # --gpus-per-task=2
        ({"CUDA_VISIBLE_DEVICES": ""}, "5"),
        ({}, "5"),
    ],
)
def test_a_task_uses_a_gpu_that_it_sees(variables, device):
    """The sixth task of its node, on which `--gpu-bind` may show each task its own GPUs alone."""
    assert torchrun_variables(TASK | {"SLURM_LOCALID": "5"} | variables)["LOCAL_RANK"] == device


def test_a_batch_script_and_a_single_task_are_no_ranks():
    assert torchrun_variables({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}
    assert torchrun_variables(TASK | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


def test_a_missing_variable_is_named():
    with pytest.raises(UsageError, match="SLURM_STEP_NODELIST must be set, as SLURM_PROCID is"):
        torchrun_variables({k: v for k, v in TASK.items() if k != "SLURM_STEP_NODELIST"})


@pytest.mark.parametrize(
    "name", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"]
)
def test_a_variable_that_is_no_number_is_named(name):
    with pytest.raises(UsageError, match=rf"environment variable {name} must be a number \(got 'x"):
        torchrun_variables(TASK | {name: "x1"})


def test_two_jobs_and_two_steps_of_a_node_have_other_ports():
    ports = {
        torchrun_variables(TASK | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})["MASTER_PORT"]
        for job in ("4711", "4712")
        for step in ("0", "1")
    }
    assert len(ports) == 4 and all(20000 <= int(port) < 32000 for port in ports)


def test_two_tasks_train_one_model(tmp_path):
    """Two processes with Slurm's variables alone: experts over both, one log, one checkpoint."""
    corpus = write_corpus(tmp_path / "counting")
    command = [sys.executable, str(ROOT / "pretrain_openmoe.py"), *MODEL, "--data-path", corpus]
    command += ["--train-iters", "4", "--expert-model-parallel-size", "2", "--save", "saved"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    where = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    tasks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=kept | step | where | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    texts = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    assert "EP 2" in texts[0]
    assert [text.count("saved iteration 4 to") for text in texts] == [1, 0]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
