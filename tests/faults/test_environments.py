"""Other environments than a developer's: file system, `python -O`, host name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.checkpoint import latest_step, verify
from tests.training.tiny import MODEL, write_corpus

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

_NO_DIRECTORY_SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int fsync(int fd) {
  struct stat found;
  int (*libc_fsync)(int) = (int (*)(int)) dlsym(RTLD_NEXT, "fsync");
  if (!fstat(fd, &found) && S_ISDIR(found.st_mode)) { errno = EINVAL; return -1; }
  return libc_fsync(fd);
}
"""
_NO_HOST_NAME = """
#include <string.h>
int gethostname(char *name, unsigned long size) {
  strncpy(name, "no-such-host.invalid", size); return 0;
}
"""


def preload(source: str, directory: Path) -> dict[str, str]:
    """Environment of a process in which functions of the C library are replaced."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler, "tests need a C compiler"
    (directory / "shim.c").write_text(source)
    library = directory / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(directory / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return os.environ | {
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def train(environment: dict[str, str], *flags: str, options: tuple[str, ...] = ()) -> str:
    """Train in a process of its own; what it printed."""
    done = subprocess.run(
        [
            sys.executable,
            *options,
            str(ROOT / "pretrain_openmoe.py"),
            *MODEL,
            "--lr-warmup-iters",
            "0",
            *flags,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "counting")


def test_a_file_system_that_cannot_sync_directories(prefix, tmp_path):
    """CIFS, some FUSE mounts and shared folders of virtual machines answer EINVAL."""
    flags = ["--data-path", prefix, "--save", str(tmp_path / "ckpt"), "--save-interval", "2"]
    log = train(preload(_NO_DIRECTORY_SYNC, tmp_path), *flags, "--train-iters", "2")
    assert " saved iteration 2 to " in log
    assert latest_step(tmp_path / "ckpt") == 2
    verify(tmp_path / "ckpt")


@pytest.mark.slow  # compiles every module again
def test_optimized_python_trains_the_same(prefix, tmp_path):
    """`python -O` leaves out assertions, with which the patches of Megatron-Core have to cope."""
    hexes = []
    for options in ((), ("-O",)):
        metrics = tmp_path / f"metrics{len(options)}.jsonl"
        flags = ["--data-path", prefix, "--train-iters", "2", "--metrics-file", str(metrics)]
        train(ENVIRONMENT, *flags, options=options)
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        hexes.append([(r["lm_loss_hex"], r["grad_norm_hex"]) for r in records])
    assert len(hexes[0]) == 2
    assert hexes[0] == hexes[1]


def test_single_node_scripts_need_no_host_name(tmp_path):
    """Their torchrun options work where the host name does not resolve."""
    script = (ROOT / "examples" / "quickstart.sh").read_text()
    (line,) = [text for text in script.splitlines() if text.startswith("TORCHRUN=(")]
    options = line.removeprefix("TORCHRUN=(torchrun ").rstrip(")").split()
    program = tmp_path / "program.py"
    program.write_text(
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "print(f'world {dist.get_world_size()}\\n', end='', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(program)],
        env=preload(_NO_HOST_NAME, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count("world 2") == 2, done.stderr
