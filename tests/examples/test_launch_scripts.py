"""The launch scripts: what they really hand to torchrun is a command line and a layout of ours.

Each script is run by bash with `srun`, `scontrol` and `torchrun` replaced by shell functions (which
bash prefers to programs of the same name); the last one prints its arguments.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.parallel.layout import Layout, resolve_layout

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    "BASH_FUNC_torchrun%%": '() { printf "%s\\0" "$@"; }',
    "BASH_FUNC_srun%%": '() { while [[ "$1" == --* ]]; do shift; done; "$@"; }',
    "BASH_FUNC_scontrol%%": "() { echo node-a; echo node-b; }",
}
USER = {"DATA_PATH": "/data/corpus", "TOKENIZER": "/data/spm.model", "SAVE": "/ckpt"}


@dataclass(frozen=True)
class Launch:
    """What a script hands to torchrun."""

    torchrun: list[str]
    program: str
    arguments: list[str]

    def option(self, name: str) -> str:
        """The value of one of torchrun's own options."""
        return self.torchrun[self.torchrun.index(name) + 1]

    @property
    def world_size(self) -> int:
        """Nodes times ranks per node."""
        nodes = int(self.option("--nnodes")) if "--nnodes" in self.torchrun else 1
        return nodes * int(self.option("--nproc-per-node"))


def launch(script: str, *arguments: str, **slurm: str) -> Launch:
    """Run ``script`` up to torchrun."""
    environment = os.environ | STUBS | USER | {"SLURM_SUBMIT_DIR": str(ROOT)} | slurm
    command = ["bash", str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.rstrip("\0").split("\0")
    at = words.index("pretrain_openmoe.py")
    return Launch(words[:at], words[at], words[at + 1 :])


def sbatch_option(script: str, name: str) -> str:
    """The value of a `#SBATCH --name=value` line."""
    lines = (ROOT / "examples" / script).read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"#SBATCH --{name}=")]
    return line.partition("=")[2]


def layout_of(found: Launch) -> Layout:
    """The layout that the script's flags give on its world."""
    return resolve_layout(parse_args(found.arguments).config, found.world_size)


def test_every_script_is_covered() -> None:
    """A new example must get a test here (or in a file of its own beside it)."""
    names = {path.name for path in (ROOT / "examples").iterdir()}
    assert names == {
        "chat_tuning.sh",
        "infiniband.sh",
        "preprocess_slurm.sbatch",
        "pretrain_34b_slurm.sbatch",
        "pretrain_8b_node.sh",
        "pretrain_8b_slurm.sbatch",
        "quickstart.sh",
        "quickstart_summary.py",
    }


def test_one_node_8b() -> None:
    found = launch("pretrain_8b_node.sh", "--seed", "7")
    config = parse_args(found.arguments).config
    assert config.model == PRESETS["openmoe-8b-32e-released"].model
    assert config.train.seed == 7, "flags after the script's name override its own"
    assert config.data.data_path == ("/data/corpus",)
    layout = layout_of(found)
    assert (found.world_size, layout.dp, layout.ep, layout.edp) == (8, 8, 8, 1)
    assert layout.num_microbatches == 1024 // 8


@pytest.mark.parametrize(
    ("script", "preset", "degrees"),
    [
        ("pretrain_8b_slurm.sbatch", "openmoe-8b-32e-released", (1, 1, 8, 64, 8)),
        ("pretrain_34b_slurm.sbatch", "openmoe-34b-32e-released", (2, 4, 8, 16, 4)),
    ],
)
def test_slurm(script: str, preset: str, degrees: tuple[int, ...]) -> None:
    nodes = sbatch_option(script, "nodes")
    found = launch(script, SLURM_JOB_NUM_NODES=nodes, SLURM_JOB_ID="41", SLURM_JOB_NODELIST="x")
    assert parse_args(found.arguments).config.model == PRESETS[preset].model
    layout = layout_of(found)
    assert found.world_size == 8 * int(nodes)
    assert (layout.tp, layout.pp, layout.ep, layout.dp, layout.edp) == degrees
    assert found.option("--rdzv-endpoint") == "node-a:20041"
    assert found.option("--nproc-per-node") == sbatch_option(script, "gpus-per-node")
    assert sbatch_option(script, "ntasks-per-node") == "1", "torchrun starts the ranks of a node"


def test_missing_setting_is_named() -> None:
    environment = os.environ | STUBS | {"TOKENIZER": "/data/spm.model", "SAVE": "/ckpt"}
    environment.pop("DATA_PATH", None)
    command = ["bash", str(ROOT / "examples" / "pretrain_8b_node.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DATA_PATH: prefix of the .bin/.idx files" in done.stderr


def test_infiniband_settings_of_the_user_are_kept() -> None:
    script = 'source examples/infiniband.sh; echo "$NCCL_IB_HCA $NCCL_IB_TIMEOUT"'
    environment = os.environ | {"NCCL_IB_HCA": "=mlx5_0,mlx5_3"}
    environment.pop("NCCL_IB_TIMEOUT", None)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["=mlx5_0,mlx5_3", "22"]
