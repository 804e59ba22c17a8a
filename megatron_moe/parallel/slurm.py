"""Ranks that `srun` starts itself, one task each, without torchrun.

    srun --ntasks-per-node=8 python pretrain_openmoe.py ...

Slurm gives each task its number, the number of tasks and the names of the nodes; from these follow
the variables that torchrun would set. Rank 0 serves the key-value store, on the first node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_moe.errors import UsageError

_FIRST_PORT, _PORTS = 20000, 12000
"""The port follows from the job, so that two jobs on a node differ, and is below 32768, from where
Linux takes the ports of outgoing connections."""
_FIRST = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
_RANGE = re.compile(r"\[(\d+)[^\]]*\]")
_FIX = "start the ranks with srun or torchrun"


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set for this task of a step of several tasks; else nothing.

    A batch script itself is in no step, so what it runs without `srun` is no task. Ranks of a
    torchrun that is a task have torchrun's own variables, which come first (`launch.launched`).

    Args:
        environment: of the process. `MASTER_ADDR` and `MASTER_PORT` in it are kept.

    Raises:
        UsageError: Slurm has set only some of its variables, or one is not a number.
    """
    count = "SLURM_STEP_NUM_TASKS"
    if count not in environment or "SLURM_PROCID" not in environment:
        return {}
    tasks, rank = (_number(environment, name) for name in (count, "SLURM_PROCID"))
    if tasks == 1:
        return {}
    device = _device(environment)
    found = {"RANK": str(rank), "WORLD_SIZE": str(tasks), "LOCAL_RANK": str(device)}
    if "MASTER_ADDR" not in environment:
        found["MASTER_ADDR"] = first_host(_required(environment, "SLURM_STEP_NODELIST"))
    if "MASTER_PORT" not in environment:
        job, step = (_number(environment, f"SLURM_{x}_ID") for x in ("JOB", "STEP"))
        found["MASTER_PORT"] = str(_FIRST_PORT + (job * 16 + step) % _PORTS)
    return found


def _device(environment: Mapping[str, str]) -> int:
    """Number of the task on its node, among the GPUs that it sees: with `--gpus-per-task` or
    `--gpu-bind`, Slurm shows each task its own alone. NCCL refuses two tasks on one GPU.
    """
    number = _number(environment, "SLURM_LOCALID")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return number % len(visible.split(",")) if visible else number


def _required(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise UsageError(f"environment variable {name}", None, "set, as SLURM_PROCID is", _FIX)
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    value = _required(environment, name)
    if not value.isdecimal():
        raise UsageError(f"environment variable {name}", value, "a number", _FIX)
    return int(value)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: `gpu[007-009,12],login` -> `gpu007`."""
    first = _FIRST.match(nodes)
    if first is None:
        raise UsageError("environment variable SLURM_STEP_NODELIST", nodes, "names of nodes")
    return _RANGE.sub(r"\1", first[0])
