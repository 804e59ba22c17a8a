"""The planner's command: its layouts are valid, fit, are ordered, and can be started."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.cluster import PROFILES, load_cluster, profile_names
from tools import plan_layout

RUN = (
    "--preset openmoe-8b-32e --bf16 --optimizer adam --lr 1e-4 --lr-warmup-init 0 "
    "--num-layers 4 --moe-layer-freq [0,1]*2 --vocab-size 32000 --global-batch-size 64 "
    "--train-iters 20000 --expert-model-parallel-size 8 --micro-batch-size 2"
)
WORDS = [*RUN.split(), "--cluster", "h100", "--gpus", "16", "--top", "5"]


@pytest.fixture(scope="module")
def listed() -> dict:
    return json.loads(plan_layout.plan([*WORDS, "--json", "--tokens", "1e9"]))


def test_layouts_fit_and_are_ordered(listed: dict) -> None:
    steps = [layout["seconds"]["step"] for layout in listed["layouts"]]
    assert len(steps) == 5 and steps == sorted(steps)
    usable = load_cluster("h100").usable_bytes
    for layout in listed["layouts"]:
        assert max(stage["total"] for stage in layout["memory"]) <= usable
        assert 0 < layout["mfu"] < 1 and 0 < layout["mfu_of_arithmetic_done"] < 1
        assert layout["layout"]["ep"] == 8 and layout["layout"]["micro_batch_size"] == 2
    assert listed["tried"] == listed["invalid"] + listed["too_large"] + listed["fit"]


def test_budget(listed: dict) -> None:
    """1e9 tokens: GPU-hours are 16 times the hours; energy at 10.2 kW for 8 GPUs."""
    first = listed["layouts"][0]
    hours = 1e9 / first["tokens_per_second"] / 3600
    budget = first["budget"]
    assert budget["days"] == pytest.approx(hours / 24)
    assert budget["gpu_hours"] == pytest.approx(16 * hours)
    assert budget["megawatt_hours"] == pytest.approx(2 * hours * 10.2e-3)


def test_the_command_of_every_layout_passes_the_resolver(listed: dict) -> None:
    """What the planner prints is what training accepts, with the layout that was planned."""
    for number, planned in enumerate(listed["layouts"], 1):
        text = plan_layout.plan([*WORDS, "--choose", str(number)])
        words = shlex.split(text.splitlines()[-1])
        assert words[:5] == ["torchrun", "--nproc-per-node", "8", "--nnodes", "2"]
        flags = words[words.index("pretrain_openmoe.py") + 1 :]
        config = parse_args(flags).config
        validate(config)
        layout = resolve_layout(config, 16, 32000)
        for name, value in planned["layout"].items():
            held = getattr(layout, name)
            assert (list(held) if name == "chunk_layers" else held) == value, (number, name)


def test_explain_shows_formulas_and_sources() -> None:
    text = plan_layout.plan([*WORDS, "--explain", "--pipeline-model-parallel-size", "1"])
    for part in ("T m F b", "r + (m + 2) T F b", "nvidia.com", "products 1x["):
        assert part in text


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "layouts.png"
    plan_layout.plan([*WORDS, "--plot", str(path), "--pipeline-model-parallel-size", "1"])
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_profiles_have_a_source_for_every_figure() -> None:
    assert profile_names() == ["a100-80", "b200", "h100", "h200"]
    for name in profile_names():
        cluster = load_cluster(name)
        figures = set(vars(cluster)) - {"name", "gpu", "sources", "gpus_per_node"}
        assert figures == set(cluster.sources), name


def test_own_profile(tmp_path: Path) -> None:
    text = (PROFILES / "h100.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("memory_gb = 80.0", "memory_gb = 96.0", 1))
    assert load_cluster(str(path)).usable_bytes == 90_000_000_000
    path.write_text(text.replace("memory_gb = 80.0", "memory_gb = -1.0", 1))
    with pytest.raises(UsageError, match=r"memory_gb of mine.toml must be a positive number"):
        load_cluster(str(path))
    path.write_text("memory = 1\n" + text)
    with pytest.raises(UsageError, match=r"key of mine.toml"):
        load_cluster(str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "h1000"], "--cluster must be one of a100-80, b200, h100, h200"),
        (["--gpus", "0"], "--gpus must be >= 1"),
        (["--choose", "900"], "--choose must be >= 1"),
        (["--memory-gb", "9"], "--gpus must be GPUs on which"),
        (["--plot", "layouts.bmpx"], "--plot must be a file that ends in"),
        (
            ["--gpus", "8", "--no-such-flag", "1"],
            "flag must be a known flag (got '--no-such-flag')",
        ),
    ],
)
def test_errors_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        plan_layout.plan([*WORDS, "--pipeline-model-parallel-size", "1", *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
