"""The launch scripts: what they really hand to torchrun is a command line and a layout of ours.

Each script is run by bash with `srun`, `scontrol`, `squeue` and `python` replaced by functions of
bash, which prefers them to programs; the last prints its arguments. Under a real Slurm:
`one_node_slurm.sh`.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_moe.config import moe_layer_pattern
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import OPENMOE_VOCAB, PRESETS
from megatron_moe.config.validate import validate
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.planning.describe import describe, describe_layout
from megatron_moe.training.phases import resolve_run_schedule
from tools import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    "BASH_FUNC_python%%": '() { printf "%s\\0" "$@"; }',
    "BASH_FUNC_srun%%": """() {
        printf "%s " srun "$@" >&2
        while [[ "$1" == --* ]]; do shift; done
        "$@"
    }""",
    "BASH_FUNC_scontrol%%": "() { echo node-a; echo node-b; }",
    "BASH_FUNC_squeue%%": '() { date -d "now + 100 minutes 30 seconds" +%FT%T; }',
}
TOKENIZER = {"TOKENIZER": "/data/spm.model", "NODE_CHECK": "0"}
OWN, MIXTURES = {"DATA_PATH": "/data/corpus"}, {"DATA_ROOT": "/data"}
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
    """What a script hands to Python."""

    torchrun: list[str]
    """Words before the program."""
    program: str
    arguments: list[str]
    steps: str
    """Command lines of srun, and what else is on standard error."""

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
    done = started(script, *arguments, **slurm)
    assert done.returncode == 0, done.stderr
    words = done.stdout.rstrip("\0").split("\0")
    at = words.index("pretrain_openmoe.py")
    return Launch(words[:at], words[at], words[at + 1 :], done.stderr)


def started(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with the variables of a user and of Slurm."""
    with tempfile.TemporaryDirectory() as folder:
        user = TOKENIZER | {"SAVE": folder, "SLURM_SUBMIT_DIR": str(ROOT)} | variables
        if not {"DATA_PATH", "DATA_ARGS_PATH", "DATA_ROOT"} & set(variables):
            user |= MIXTURES if script in SLURM else OWN
        command = ["bash", str(ROOT / "examples" / script), *arguments]
        environment = os.environ | STUBS | user
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def sbatch_option(script: str, name: str) -> str:
    """The value of a `#SBATCH --name=value` line."""
    lines = (ROOT / "examples" / script).read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"#SBATCH --{name}=")]
    return line.partition("=")[2].partition("#")[0].strip()


def layout_of(found: Launch) -> Layout:
    """The layout that the script's flags give on its world."""
    return resolve_layout(parse_args(found.arguments).config, found.world_size)


def test_every_script_is_covered() -> None:
    """A new example must get a test here (or in a file of its own beside it)."""
    names = {path.name for path in (ROOT / "examples").iterdir() if path.name[:2] != "__"}
    assert names == {
        "Dockerfile",
        "chat_tuning.sh",
        "common.sh",
        "experiments",
        "kubernetes",
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
    return launch(script, **job_of(nodes) | variables)


def job_of(nodes: str) -> dict[str, str]:
    """What Slurm sets for a job with 8 GPUs a node."""
    job = {"SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "x"}
    return {**job, "SLURM_GPUS_ON_NODE": "8"}


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
    assert "/x-j-N.log" in found.steps.replace("%", ""), "a log for each node"


@pytest.mark.parametrize("script", list(SLURM))
def test_a_job_ends_before_its_time_limit_and_goes_on(script: str) -> None:
    """With 100 minutes left and a margin of 10. The rest is shown under a real Slurm."""
    assert sbatch_option(script, "signal") == "B:USR1@300"
    text = (ROOT / "examples" / script).read_text()
    for option in ("requeue", "open-mode=append", "exclusive", "mem=0", "error="):
        assert f"#SBATCH --{option}" in text
    train = parse_args(slurm(script).arguments).config.train
    assert (train.exit_signal_handler, train.exit_signal) == (True, "TERM")
    assert train.exit_duration_in_mins == 90
    late = slurm(script, EXIT_MARGIN_MINUTES="100")
    assert parse_args(late.arguments).config.train.exit_duration_in_mins is None
    assert "the time limit is within EXIT_MARGIN_MINUTES (100)" in late.steps


def test_ranks_that_srun_starts() -> None:
    """`LAUNCHER=srun`: a task for each rank; the number of ranks is that of the layout."""
    found = slurm("pretrain_34b_slurm.sbatch", LAUNCHER="srun")
    assert found.torchrun == []
    assert "--ntasks=128 --ntasks-per-node=8 " in found.steps
    done = started("pretrain_34b_slurm.sbatch", **job_of("16"), LAUNCHER="mpirun")
    assert done.returncode == 2
    assert "LAUNCHER must be torchrun or srun (got 'mpirun')" in done.stderr


def test_containers() -> None:
    mounts = "/shared:/shared,/data:/data"
    pyxis = {"CONTAINER_IMAGE": "registry#openmoe", "CONTAINER_MOUNTS": mounts}
    found = slurm("pretrain_8b_slurm.sbatch", **pyxis)
    image = f"--container-image=registry#openmoe --container-mounts={mounts}"
    assert f"{image} --container-workdir={ROOT} python tools/torchrun.py" in found.steps
    apptainer = {"APPTAINER_IMAGE": "/images/openmoe.sif", "CONTAINER_MOUNTS": mounts}
    stub = {"BASH_FUNC_apptainer%%": '() { shift 7; "$@"; }'}
    found = slurm("pretrain_8b_slurm.sbatch", **apptainer, **stub)
    word = f"apptainer exec --nv --bind {mounts} --pwd {ROOT} /images/openmoe.sif python"
    assert word in found.steps
    assert found.world_size == 64
    done = started("pretrain_8b_slurm.sbatch", **job_of("8"), CONTAINER_IMAGE="image")
    assert done.returncode != 0
    assert "CONTAINER_MOUNTS: pairs /host:/container" in done.stderr


@pytest.mark.parametrize("script", ["pretrain_8b_node.sh", *SLURM])
@pytest.mark.parametrize("way", ["DATA_PATH", "DATA_ARGS_PATH"])
def test_your_own_data(script: str, way: str, tmp_path: Path) -> None:
    words = tmp_path / "words"
    words.write_text("0.7 /data/a 0.3 /data/b")
    value = words.read_text() if way == "DATA_PATH" else str(words)
    start = slurm if script in SLURM else launch
    found = start(script, **{way: value})
    config = parse_args(found.arguments).config
    validate(config)
    schedule = resolve_run_schedule(config, found.world_size)
    for phase in schedule.phases:
        data = phase.config.data
        assert data.mixture is None
        assert data.data_path == (tuple(value.split()) if way == "DATA_PATH" else ())
        assert data.data_args_path == (None if way == "DATA_PATH" else value)
    published = RECIPES.get(script, ([("causal", 50_000, None)], 0))[0]
    ends = [(p.config.objective.objective, p.last_iteration) for p in schedule.phases]
    assert ends == [(objective, last) for objective, last, _ in published], "as published"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"DATA_PATH": "", "DATA_ROOT": ""}, "of DATA_PATH, DATA_ARGS_PATH or DATA_ROOT"),
        ({"DATA_PATH": "a", "DATA_ROOT": "b"}, "(got DATA_PATH DATA_ROOT)"),
    ],
)
def test_one_kind_of_data(given: dict[str, str], message: str) -> None:
    done = started("pretrain_8b_slurm.sbatch", **job_of("8"), **given)
    assert done.returncode == 2
    assert message in done.stderr


def test_several_nodes_without_a_scheduler() -> None:
    found = launch("pretrain_8b_node.sh", NODES="4", RENDEZVOUS="node1:29400")
    assert found.world_size == 32
    assert found.option("--rdzv-endpoint") == "node1:29400"
    layout = layout_of(found)
    assert (layout.ep, layout.dp, layout.edp) == (8, 32, 4)
    done = started("pretrain_8b_node.sh", NODES="4")
    assert "RENDEZVOUS: host:port of one of the nodes" in done.stderr


@pytest.mark.parametrize("script", ["pretrain_8b_node.sh", *SLURM])
def test_the_nodes_are_checked_before_the_run(script: str) -> None:
    """With the flags of the run, on all ranks; a problem ends the job."""
    job = job_of(sbatch_option(script, "nodes")) if script in SLURM else {}
    done = started(script, **job, NODE_CHECK="1")
    words = done.stdout.split("\0")
    first, second = words.index("tools/check_environment.py"), words.index("pretrain_openmoe.py")
    assert words[first + 1 : first + 3] == ["--cluster", "h100"]
    assert words[first + 3 : first + 5] == words[words.index("--preset") :][:2]
    assert first < second
    broken = {"BASH_FUNC_python%%": '() { printf "%s\\0" "$@"; return 1; }'}
    done = started(script, **job, NODE_CHECK="1", **broken)
    assert done.returncode == 1
    assert "pretrain_openmoe.py" not in done.stdout.split("\0")


@pytest.mark.parametrize("script", list(RECIPES))
def test_the_published_recipes(script: str) -> None:
    phases, batch = RECIPES[script]
    found = slurm(script)
    config = parse_args(found.arguments).config
    validate(config)
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
    validate(command.config)
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


def test_conversations_in_the_warm_up() -> None:
    """Their share in the first phase alone, and another order of the text after it."""
    job = job_of("2") | {"STAGES": "examples/stages/base_16e_chat_warm_up.toml"}
    job |= {"DATA_PATH": "/data/corpus"}
    found = launch(
        "pretrain_base_slurm.sbatch", "--sft-data-path", "2", "a.jsonl", "1", "b.jsonl", **job
    )
    config = parse_args(found.arguments).config
    validate(config)
    phases = resolve_run_schedule(config, found.world_size).phases
    assert [p.last_iteration for p in phases] == [10_000, 500_000]
    assert [p.config.objective.sft_share for p in phases] == [0.05, 0.0]
    assert all(p.config.objective.sft_data_path == ("2", "a.jsonl", "1", "b.jsonl") for p in phases)
    assert len({p.config.train.seed for p in phases}) == 2


def test_missing_setting_is_named() -> None:
    done = started("pretrain_8b_node.sh", DATA_PATH="")
    assert done.returncode == 2
    assert "of DATA_PATH (prefix of the .bin/.idx files" in done.stderr
    done = started("pretrain_8b_node.sh", TOKENIZER="")
    assert "TOKENIZER: SentencePiece model file" in done.stderr
    job = job_of("8") | {"SLURM_GPUS_ON_NODE": ""}
    assert "set RANKS_PER_NODE" in started("pretrain_8b_slurm.sbatch", **job).stderr


@pytest.mark.parametrize(
    ("nccl", "gloo"), [("ib0,ib1", "ib0"), ("=eth0", "eth0"), ("^lo,docker", "enp7s0")]
)
def test_gloo_has_an_interface_of_its_own(nccl: str, gloo: str) -> None:
    """It knows neither `^` nor `=`: else that of the default route."""
    route = "default via 10.0.0.1 dev enp7s0 proto dhcp metric 100"
    environment = os.environ | {
        "NCCL_SOCKET_IFNAME": nccl,
        "BASH_FUNC_ip%%": f"() {{ echo '{route}'; }}",
    }
    environment.pop("GLOO_SOCKET_IFNAME", None)
    script = 'set -euo pipefail; source examples/common.sh; echo "$GLOO_SOCKET_IFNAME"'
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [gloo]


def test_settings_of_the_user_are_kept() -> None:
    script = 'source examples/common.sh; echo "$NCCL_IB_HCA $NCCL_IB_TIMEOUT"'
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
