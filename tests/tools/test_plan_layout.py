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
    # Recomputation that is not needed is not listed.
    names = [json.dumps(layout["layout"]) for layout in listed["layouts"]]
    assert len(set(names)) == 5
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


def _flags(*words: str) -> list[str]:
    """Flags of the command that starts the fastest layout."""
    found = shlex.split(plan_layout.plan([*WORDS, *words]).splitlines()[-1])
    return found[found.index("pretrain_openmoe.py") + 1 :]


def _fastest(*words: str) -> dict:
    return json.loads(plan_layout.plan([*WORDS, "--json", "--top", "1", *words]))["layouts"][0]


def test_flags_that_are_given_are_planned_and_not_repeated() -> None:
    """Sharding that is given overlaps its transfers as sharding that is chosen does."""
    chosen, given = _fastest(), _fastest("--use-distributed-optimizer")
    assert chosen == given
    one = ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    waits, hidden = _fastest(*one, "--no-overlap-param-gather"), _fastest(*one)
    assert waits["seconds"]["reduction"] > hidden["seconds"]["reduction"]
    parallel = parse_args(_flags("--no-overlap-param-gather")).config.parallel
    assert parallel.overlap_grad_reduce and not parallel.overlap_param_gather
    parallel = parse_args(_flags("--no-overlap-grad-reduce")).config.parallel
    assert not parallel.overlap_grad_reduce and not parallel.overlap_param_gather
    again = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    flags = [word for word in _flags(*again.split()) if word.startswith("--")]
    assert len(flags) == len(set(flags))


def test_the_command_is_quoted_for_a_shell() -> None:
    words = ["--data-path", "my data/corpus", "--pipeline-model-parallel-size", "1"]
    line = plan_layout.plan([*WORDS, *words]).splitlines()[-1]
    assert "--moe-layer-freq '[0,1]*2' " in line and "--data-path 'my data/corpus' " in line


def test_layouts_of_different_batches_are_ordered_by_their_rate() -> None:
    """Without a global batch, a step has one micro-batch of every replica."""
    listed = json.loads(plan_layout.plan([*WORDS, "--json", "--global-batch-size", "None"]))
    batches = [layout["layout"]["global_batch_size"] for layout in listed["layouts"]]
    rates = [layout["tokens_per_second"] for layout in listed["layouts"]]
    assert len(set(batches)) > 1 and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("layers", "stages", "chunks"),
    [("10", "4", [3, 3, 3, 1]), ("9", "5", [2, 2, 2, 2, 1])],
)
def test_stages_that_do_not_divide_the_layers(layers: str, stages: str, chunks: list[int]) -> None:
    words = ["--num-layers", layers, "--moe-layer-freq", "4", "--gpus-per-node", "4"]
    words += ["--pipeline-model-parallel-size", stages, "--gpus", str(4 * int(stages))]
    layout = _fastest(*words, "--expert-model-parallel-size", "4")
    assert layout["layout"]["chunk_layers"] == chunks


def test_layers_without_experts_are_recomputed_as_well() -> None:
    dense = ["--moe-layer-freq", "[0]*4", "--pipeline-model-parallel-size", "1"]
    dense += ["--expert-model-parallel-size", "1", "--tensor-model-parallel-size", "1"]
    whole = _fastest(*dense)["memory"][0]["total"]
    again = _fastest(*dense, "--memory-gb", str(6 + (whole - 1) / 1e9))
    assert again["recompute"] == "mlp" and again["memory"][0]["total"] < whole


def test_tensor_parallelism_divides_a_node() -> None:
    words = ["--gpus", "12", "--gpus-per-node", "6", "--top", "99", "--global-batch-size", "48"]
    words += ["--expert-model-parallel-size", "2"]
    listed = json.loads(plan_layout.plan([*WORDS, *words, "--json"]))
    assert {layout["layout"]["tp"] for layout in listed["layouts"]} == {1, 2}, "4 is not inside"


def test_an_assumed_vocabulary_is_marked() -> None:
    assert "vocabulary 32000\n" in plan_layout.plan(WORDS)
    words = [*WORDS, "--tokenizer-type", "NullTokenizer", "--vocab-size", "None"]
    assert "vocabulary 8192 (assumed: neither" in plan_layout.plan(words)


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
        (["--memory-gb", "5"], "reserved_gb of h100.toml must be less than memory_gb (5.0)"),
        (["--gpus", "12"], "--gpus must be a multiple of the GPUs of a node (8), or fewer"),
        (["--nodes", "2"], "--nodes must be given, or --nodes instead"),
        (
            ["--tensor-model-parallel-size", "3"],
            "--gpus must be a multiple of --tensor-model-parallel-size 3 x",
        ),
        (["--gpus", "64", "--expert-model-parallel-size", "64"], "a divisor of --num-experts (32)"),
        (["--top", "0"], "--top must be >= 1"),
        (["--tokens", "-1"], "--tokens must be > 0"),
        (["--capacity-factors", "2", "--moe-expert-capacity-factor", "1"], "--capacity-factors"),
        (["--cluster", "a100-80", "--fp8-format", "e4m3"], "--fp8-format must be unset"),
        (["--plot", "no/such/layouts.png"], "--plot must be a file in a directory that exists"),
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


def test_the_placement_of_the_chosen_layout() -> None:
    """EP 8 on two nodes of eight: an expert group is a node."""
    words = [*WORDS, "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    text = plan_layout.plan([*words, "--placement"])
    assert "16 ranks, 8 a node; ranks in brackets form a group" in text
    assert "  expert        [8 9 10 11 12 13 14 15]" in text
    assert "  expert data   2 ranks with a stride of 8, over 2 nodes" in text
    assert "16 ranks, 8 a node" not in plan_layout.plan(words)
