"""The launch scripts: what they really hand to torchrun is a command line and a layout of ours.

Each script is run by bash with `srun`, `scontrol` and `torchrun` replaced by shell functions (which
bash prefers to programs of the same name); the last one prints its arguments.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_moe.config import moe_layer_pattern
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import OPENMOE_VOCAB, PRESETS
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.planning.describe import describe, describe_layout
from megatron_moe.training.phases import resolve_run_schedule
from tools import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    "BASH_FUNC_torchrun%%": '() { printf "%s\\0" "$@"; }',
    "BASH_FUNC_srun%%": '() { while [[ "$1" == --* ]]; do shift; done; "$@"; }',
    "BASH_FUNC_scontrol%%": "() { echo node-a; echo node-b; }",
}
USER = {
    "DATA_PATH": "/data/corpus",
    "DATA_ROOT": "/data",
    "TOKENIZER": "/data/spm.model",
    "SAVE": "/ckpt",
}
SLURM = {
    "pretrain_base_slurm.sbatch": ("openmoe-base-16e-released", (1, 1, 8, 16, 2)),
    "pretrain_8b_slurm.sbatch": ("openmoe-8b-32e-released", (1, 1, 8, 64, 8)),
    "pretrain_34b_slurm.sbatch": ("openmoe-34b-32e-released", (2, 4, 8, 16, 4)),
}
"""The preset of each, and TP, PP, EP, DP and EDP of its layout."""
RECIPES = {
    "pretrain_base_slurm.sbatch": ([("ul2", 500_000, "v1")], 128),
    "pretrain_8b_slurm.sbatch": (
        [("ul2", 390_000, "v1"), ("causal", 1_100_000_000_000 // (1024 * 2048), "v2")],
        1024,
    ),
    "pretrain_34b_slurm.sbatch": (
        [("ul2", 25_000, "v3"), ("causal", 200_000_000_000 // (1024 * 2048), "v3")],
        1024,
    ),
}
"""As published: objective, last step and mixture of each phase, and sequences of a step."""


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
        "lm_eval",
        "preprocess_slurm.sbatch",
        "pretrain_34b_slurm.sbatch",
        "pretrain_8b_node.sh",
        "pretrain_8b_slurm.sbatch",
        "pretrain_base_slurm.sbatch",
        "quickstart.sh",
        "quickstart_summary.py",
        "stages",
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


def slurm(script: str, **variables: str) -> Launch:
    """Launch a Slurm script on the nodes that it asks for."""
    nodes = sbatch_option(script, "nodes")
    job = {"SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "x"}
    return launch(script, **job, **variables)


@pytest.mark.parametrize("script", list(SLURM))
def test_slurm(script: str) -> None:
    preset, degrees = SLURM[script]
    found = slurm(script)
    assert parse_args(found.arguments).config.model == PRESETS[preset].model
    layout = layout_of(found)
    assert found.world_size == 8 * int(sbatch_option(script, "nodes"))
    assert (layout.tp, layout.pp, layout.ep, layout.dp, layout.edp) == degrees
    assert found.option("--rdzv-endpoint") == "node-a:20041"
    assert found.option("--nproc-per-node") == sbatch_option(script, "gpus-per-node")
    assert sbatch_option(script, "ntasks-per-node") == "1", "torchrun starts the ranks of a node"


@pytest.mark.parametrize("script", list(RECIPES))
def test_the_published_recipes(script: str) -> None:
    phases, batch = RECIPES[script]
    found = slurm(script)
    config = parse_args(found.arguments).config
    schedule = resolve_run_schedule(config, found.world_size)
    got = [
        (s.config.objective.objective, s.last_iteration, s.config.data.mixture)
        for s in schedule.phases
    ]
    assert got == phases
    for phase in schedule.phases:
        assert phase.layout.global_batch_size == batch
        assert phase.config.optimizer.optimizer == "adafactor"
        assert phase.config.data.data_root == "/data"
        # 1 / sqrt(max(step, 10000)), of the run's steps in every phase.
        for step in (phase.first_iteration, phase.last_iteration - 1):
            assert phase.rate(step) == pytest.approx(max(step, 10000) ** -0.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A SentencePiece model; the scripts name the vocabulary's size themselves."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = folder / "texts.jsonl"
    words = " ".join(f"{a}{b}" for a in "aeioubcd" for b in "mnprst")
    texts.write_text(f'{{"text": "{words}"}}\n' * 20)
    model = folder / "tokenizer.model"
    train_tokenizer.main(["--input", str(texts), "--output", str(model), "--vocab-size", "280"])
    return str(model)


@pytest.mark.parametrize("script", ["pretrain_8b_node.sh", *SLURM])
def test_every_script_can_be_described(script: str, tokenizer: str) -> None:
    start = slurm if script in SLURM else launch
    found = start(script, TOKENIZER=tokenizer)
    words = ["--describe", "text", "--world-size", str(found.world_size)]
    command = parse_args([*found.arguments, *words])
    text = describe(command.config, "text", command.world_size)
    assert "vocabulary    256384 padded, untied" in text
    phases = RECIPES.get(script, ([], 0))[0]
    for number, (objective, last, _) in enumerate(phases, 1):
        line = f"phase {number}/{len(phases)} {objective}: steps "
        assert any(line in row and f"to {last}, {objective}" in row for row in text.splitlines())
        assert "/data/c4_text_document" in text, "the sources of its mixture"


def test_the_stages_of_34b_are_balanced() -> None:
    """In FLOPs as `--describe` counts them, and each stage holds two MoE layers."""
    found = slurm("pretrain_34b_slurm.sbatch")
    config = parse_args(found.arguments).config
    layout = layout_of(found)
    described = describe_layout(config, layout, OPENMOE_VOCAB)
    assert described.imbalance < 1.003
    assert layout.num_chunks == 2
    pattern = moe_layer_pattern(config.moe.moe_layer_freq, config.model.num_layers)
    held = [[layout.layers_of_chunk(stage, chunk) for chunk in (0, 1)] for stage in range(4)]
    assert [sum(pattern[i] for part in parts for i in part) for parts in held] == [2] * 4
    assert len({rank.expert for rank in described.per_stage}) == 1
    even = replace(config.parallel, pipeline_model_parallel_layout=None)
    before = describe_layout(replace(config, parallel=even), None, OPENMOE_VOCAB, 128)
    assert before.imbalance == pytest.approx(1.2502, abs=1e-4)


def test_another_phase_table_may_be_named() -> None:
    found = slurm("pretrain_8b_slurm.sbatch", STAGES="mine.toml")
    assert parse_args(found.arguments).config.train.stages == "mine.toml"


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
