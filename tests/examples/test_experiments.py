"""Experiments: their statistics by hand, their flags, their tables, and a run of each script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from examples.experiments import (
    adaptive_capacity,
    document,
    padding,
    remedies,
)
from examples.experiments.compare import compare, corrected
from examples.experiments.lab import SIZES, Lab, Run
from examples.experiments.paired import at_cost, holm, paired
from examples.experiments.records import load_records, read_record
from examples.experiments.variants import VARIANTS
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_an_interval_by_hand() -> None:
    """Student's t with 2 degrees of freedom: 4.303 at 95%; p of t = 3.464 is 0.0742."""
    found = paired([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    half = 4.30265 / 3**0.5
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert found.p == pytest.approx(0.07418, abs=1e-5)
    five = paired([0.01, 0.02, 0.03, 0.02, 0.02])
    assert five.high - five.mean == pytest.approx(2.77645 * 0.0070711 / 5**0.5, rel=1e-4)


def test_equal_differences_have_no_spread() -> None:
    assert paired([0.0, 0.0]).p == 1
    assert paired([0.5, 0.5]).p == 0


def test_corrections_for_the_number_of_comparisons_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert list(found) == ["a", "b", "c"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_a_loss_between_two_runs_by_hand() -> None:
    curve = [(4.0, 2.9), (1.0, 3.0), (16.0, 2.7)]
    costs = {1.0: 3.0, 2.0: 2.95, 4.0: 2.9, 8.0: 2.8, 16.0: 2.7, 32.0: 2.6, 0.5: 3.05}
    for cost, loss in costs.items():
        assert at_cost(curve, cost) == pytest.approx(loss)


def records(variant: str, losses: list[float], steps: int, length: float, done: float) -> list:
    """Steps of 10 ms; twice that if the variant is slow, and half of its FLOPs are Muon's."""
    slow = variant == "slow"
    common = {"size": "S", "variant": variant, "length": length, "steps": steps}
    common |= {"ms_per_step": 20.0 if slow else 10.0, "orthogonal": done / 2 if slow else 0.0}
    return [{**common, "seed": i, "loss": loss, "done": done} for i, loss in enumerate(losses)]


def test_variants_are_compared_at_equal_steps_compute_and_time() -> None:
    """The recipe gains 0.2 by twice the steps; `slow` does twice the arithmetic in twice the time:
    its gain of 0.3 is 0.1 at equal cost.
    """
    rows = [
        *records("openmoe", [3.0, 3.1, 2.9, 3.0, 3.0], 100, 1.0, 10.0),
        *records("openmoe", [2.8, 2.9, 2.7], 200, 2.0, 20.0),
        *records("slow", [2.7, 2.81, 2.59, 2.7, 2.7], 100, 1.0, 40 / 3),
        *records("same", [2.99, 3.1, 2.91, 3.0, 3.0], 100, 1.0, 10.0),
        *records("few", [2.0, 2.1], 100, 1.0, 10.0),
    ]
    slow, same, few = compare(rows, "S")
    assert [each.variant for each in (slow, same, few)] == ["slow", "same", "few"]
    assert slow.steps.mean == pytest.approx(-0.3)
    assert slow.compute.mean == pytest.approx(-0.1)
    assert slow.time.mean == pytest.approx(-0.1)
    assert slow.compute.sd == pytest.approx(0.01 / 2**0.5)
    assert same.compute.mean == pytest.approx(0)
    claims = {each.variant: each.claim for each in corrected([slow, same, few])}
    assert claims == {"slow": "lower", "same": "", "few": ""}, "two seeds claim nothing"


@pytest.mark.parametrize("name", [*VARIANTS, *padding.VARIANTS, "target of many layers"])
@pytest.mark.parametrize("size", SIZES)
def test_flags_are_valid(name: str, size: str, tmp_path: Path) -> None:
    lab = Lab(folder=tmp_path)
    if name in VARIANTS:
        flags = VARIANTS[name].at(SIZES[size].steps, SIZES[size].adamw_lr)
    elif name in padding.VARIANTS:
        flags = (*padding.UL2, *padding.VARIANTS[name])
    else:
        flags = adaptive_capacity.runs_of([size], 1)[0].flags
    config = parse_args(lab.command(Run(size=size, variant="any", flags=flags, seed=7))).config
    validate(config)
    assert config.train.seed == 7
    assert config.train.train_iters == SIZES[size].steps
    assert config.moe.moe_eval_capacity_factor is None


@pytest.mark.parametrize("size", ["tiny", "base-16e", "8b-32e", "34b-32e"])
def test_a_plus_preset_is_what_was_measured(size: str, tmp_path: Path) -> None:
    """The paper variant with router, drops and numbers of experts of the variant `plus`."""
    lab, flags = Lab(folder=tmp_path), VARIANTS["plus"].at(300, 1e-3)
    paper, plus = PRESETS[f"openmoe-{size}"], PRESETS[f"openmoe-{size}-plus"]
    run = Run(size="S", variant="plus", flags=flags, seed=1)
    base = Run(size="S", variant="openmoe", flags=(), seed=1)
    measured, recipe = (parse_args(lab.command(each)).config for each in (run, base))
    assert replace(plus, moe=paper.moe) == paper
    changed = {k for k, v in vars(measured.moe).items() if v != getattr(recipe.moe, k)}
    ours = {k for k, v in vars(plus.moe).items() if v != getattr(paper.moe, k)}
    # Runs of experiments drop nothing in evaluations.
    assert ours == changed | {"moe_eval_capacity_factor"}
    sizes = {"num_experts", "moe_ffn_hidden_size"}
    assert sizes < changed
    assert all(getattr(plus.moe, k) == getattr(measured.moe, k) for k in changed - sizes)
    for before, after in ((recipe.moe, measured.moe), (paper.moe, plus.moe)):
        assert after.num_experts == 4 * before.num_experts
    assert plus.moe.moe_ffn_hidden_size == paper.model.ffn_hidden_size // 4
    assert plus.moe.moe_eval_capacity_factor == 4 * paper.moe.moe_eval_capacity_factor


def test_a_run_of_other_flags_is_not_taken_for_this_one(tmp_path: Path) -> None:
    lab = Lab(folder=tmp_path, steps=4)
    run = Run(size="S", variant="a", flags=("--lr", "1"), seed=1)
    assert not lab.is_finished(run)
    lab.finished(run).parent.mkdir(parents=True)
    lab.finished(run).write_text(json.dumps({"flags": ["--lr", "1"], "steps": 4}))
    assert lab.is_finished(run)
    for other in (
        (lab, Run(size="S", variant="a", flags=("--lr", "2"), seed=1)),
        (Lab(folder=tmp_path, steps=8), run),
    ):
        with pytest.raises(UsageError, match="--out must be a folder without other runs"):
            other[0].is_finished(other[1])


def test_a_fixed_factor_with_as_many_drops_by_hand() -> None:
    """Factors 2 and 3 with drops of 8% and 2%: half-way in the logarithm, 2.5, at 4%."""
    fixed = [{"drop": 0.08, "slots": 2.0}, {"drop": 0.02, "slots": 3.0}]
    assert adaptive_capacity.equal_drops(fixed, 0.04) == pytest.approx(2.5)


def test_drops_of_a_run_with_a_target_by_hand(tmp_path: Path) -> None:
    """Four intervals of two layers of two experts; the first is the start."""
    lab = Lab(folder=tmp_path, steps=4)
    run = Run(size="S", variant="deep-target", flags=(), seed=1)
    log = lab.finished(run).with_name("routing.jsonl")
    log.parent.mkdir(parents=True)

    def layer(kept: int) -> dict:
        return {"load": [6, 4], "kept": [kept, 0], "slots": 15, "drop_rate": 1 - kept / 10}

    kept = [(0, 0), (10, 9), (10, 10), (10, 8)]
    lines = [
        {"iteration": step, "layers": {"1": layer(a), "3": layer(b)}}
        for step, (a, b) in enumerate(kept, 1)
    ]
    log.write_text("\n".join(map(json.dumps, [*lines, {"iteration": 4, "probe": {}}])))
    found = adaptive_capacity.read(lab, run)
    assert (found["variant"], found["slots"]) == ("target", 1.5)
    assert found["drop"] == pytest.approx(1 - 57 / 80)
    assert found["over"] == pytest.approx(2 / 6)
    assert found["most"] == pytest.approx(3 / 30)


def test_tables_are_those_of_the_records() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.with_tables(text) == text


def test_a_table_without_a_place_is_an_error() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no place for plus"):
        document.with_tables(text.replace("<!-- begin: plus -->", ""))
    with pytest.raises(ValueError, match="no table is called pluses"):
        document.with_tables(text.replace(": plus -->", ": pluses -->"))


def test_plots_are_drawn(tmp_path: Path) -> None:
    document.draw(tmp_path)
    for path in tmp_path.iterdir():
        assert (document.IMAGES / path.name).exists()
    assert len(list(tmp_path.iterdir())) == len(list(document.IMAGES.glob("experiments-*.svg")))


SMALL = "--megabytes 0.2 --seeds 1 --steps 8 --no-records"
SCRIPTS = {
    "adaptive_capacity": "--sizes S",
    "padding": "--sizes M",
    "context_independence": "--size S --length 1 --tokens 4096",
    "early_routing": "--size S --length 3 --tokens 8192",
    "drops_towards_end": "--size S --length 1 --tokens 4096",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def start(script: str, words: str, folder: Path) -> str:
    """A script as a user starts it, on a corpus of 0.4 megabytes."""
    command = [sys.executable, "-m", f"examples.experiments.{script}", "--out", str(folder)]
    done = subprocess.run(
        [*command, *SMALL.split(), *words.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_remedies_from_an_empty_folder(folder: Path) -> None:
    start("remedies", "--sizes S --variants openmoe", folder)
    lab = Lab(folder=folder, steps=8)
    found = [read_record(lab, run) for run in remedies.runs_of(lab, ["S"], ["openmoe"], 1)]
    assert [record["steps"] for record in found] == [8, 6, 11]
    whole = found[0]
    assert whole["tokens"] == 8 * 8 * 128
    # One MoE layer, k = 2; rule `t5x` has 20 slots of each of 8 experts for a row of 128 tokens.
    assert whole["slots"] == 8 * 8 * 8 * 20
    assert whole["kept"] < whole["slots"]
    assert 0.375 <= whole["drop"] < 1
    assert whole["done"] < whole["asked"]
    assert 3 < whole["loss"] < 8
    assert "1/1 " not in start("remedies", "--sizes S --variants openmoe", folder), "taken again"


@pytest.mark.slow
@pytest.mark.parametrize("script", list(SCRIPTS))
def test_other_scripts(script: str, folder: Path) -> None:
    start(script, SCRIPTS[script], folder)


def test_records_are_extended_and_sorted_by_seed() -> None:
    """The committed records have an order, and two of one run are an error."""
    records = load_records("remedies")[0]
    assert remedies.in_order(records[::-1]) == remedies.in_order(records)
    seeds = [record["seed"] for record in remedies.in_order(records)]
    assert seeds == sorted(seeds)
    with pytest.raises(ValueError, match="two records"):
        remedies.in_order([*records, records[0]])
