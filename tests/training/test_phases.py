"""Runs in phases: each phase starts at its step, equals a run of its own, and resumes bit for bit.

Runs are observed from outside, through the metrics file and the bytes of the last checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.training.optim.schedule import learning_rate
from megatron_moe.training.phases import resolve_run_schedule
from megatron_moe.training.plan import rate_lengths
from tests.support.pool import Pool
from tests.training.phase_tables import FIRST, SECOND, TABLE, schedule_of, steps_of
from tests.training.tiny import MODEL, pretrain_rank, write_corpus

_DROPOUT = ["--hidden-dropout", "0.1"]
_TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
LAYOUTS = {
    "one process": (1, ["--num-workers", "1"]),
    "PP2 interleaved": (
        2,
        ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
    ),
    "TP2": (2, _TP2),
}


def _run(pool: Pool, world: int, directory: Path, corpus: str, flags: list[str]) -> str:
    """Train; returns rank 0's log."""
    directory.mkdir(exist_ok=True)
    argv = [*MODEL, "--data-path", corpus, "--split", "80,20,0", "--save", str(directory), *flags]
    argv += ["--metrics-file", str(directory / "metrics.jsonl")]
    results = pool.run(pretrain_rank, world, argv=argv)
    for code, _, error in results:
        assert code == 0, error
    return results[0][1]


def _weights(directory: Path) -> dict[str, bytes]:
    (newest,) = [p for p in directory.glob("iter_*") if p.name == "iter_0000020"]
    return {file.name: file.read_bytes() for file in sorted(newest.glob("*.safetensors"))}


@pytest.mark.parametrize(
    "name",
    [n if n == "PP2 interleaved" else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS],
)
def test_a_run_that_stops_before_at_in_and_after_a_switch_resumes_bitwise(
    name, pool, corpus, tmp_path
):
    world, layout = LAYOUTS[name]
    table = tmp_path / "phases.toml"
    table.write_text(TABLE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*layout, *_DROPOUT, "--phases", str(table), "--train-iters", "20"]
    _run(pool, world, whole, corpus, flags)
    # 4 is before the first switch, 8 is where it happens, 12 is inside the second phase and 16 is
    # inside the third; other layouts stop at 10 only.
    stops = "4" if world == 1 else "10"
    for start in range(20 // int(stops)):
        load = ["--load", str(parts)] if start else []
        _run(pool, world, parts, corpus, [*flags, *load, "--exit-interval", stops])
    assert [step["batch_size"] for step in steps_of(whole)] == [8] * 8 + [4] * 6 + [12] * 6
    assert [step["targets"] // step["batch_size"] for step in steps_of(whole)][8:14] == [64] * 6
    assert steps_of(parts) == steps_of(whole)
    assert _weights(parts) == _weights(whole)


def test_each_phase_is_a_run_of_its_own_from_the_weights_of_the_one_before(pool, corpus, tmp_path):
    """Without optimizer state, a run without `--phases` can take the steps of one phase."""
    table = tmp_path / "phases.toml"
    table.write_text(TABLE.replace("hidden-dropout = 0.2", ""))
    plain = ["--optimizer", "sgd", "--sgd-momentum", "0", "--weight-decay", "0"]
    plain += ["--lr-warmup-iters", "0"]
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    _run(pool, 1, whole, corpus, [*plain, "--phases", str(table), "--train-iters", "20"])
    decay = ["--lr-decay-iters", "20"]
    _run(pool, 1, first, corpus, [*plain, *FIRST, *decay, "--train-iters", "8"])
    begins = ["--load", str(first), "--finetune", "--train-iters", "6"]
    _run(pool, 1, second, corpus, [*plain, *SECOND, *begins])
    exact = [(step["lm_loss_hex"], step["grad_norm_hex"]) for step in steps_of(whole)]
    alone = [(s["lm_loss_hex"], s["grad_norm_hex"]) for s in steps_of(first) + steps_of(second)]
    assert exact[:14] == alone


def test_rates_count_the_phases_steps_where_it_sets_them_and_else_the_runs(tmp_path):
    schedule = schedule_of(TABLE, "--train-iters 20 --lr 0.01 --lr-warmup-iters 2", tmp_path)
    first, second, third = schedule.phases
    rates = [schedule.at(step).rate(step) for step in range(20)]
    lengths = rate_lengths(schedule.config, 20)
    of_run = [learning_rate(schedule.config.optimizer, lengths, step) for step in range(20)]
    assert rates[:8] == of_run[:8]
    assert rates[14:] == of_run[14:]
    # 0.002 is reached from 0 in 2 steps, then falls by (0.002 - 0.001) / 4 a step.
    assert rates[8:14] == pytest.approx([0.0, 0.001, 0.002, 0.00175, 0.0015, 0.00125])
    assert [s.rate_origin for s in (first, second, third)] == [0, 8, 0]


def test_ends_in_samples_and_tokens_are_counted_from_the_start_of_the_run(tmp_path):
    text = TABLE.replace("until-iteration = 8", "until-samples = 70")
    text = text.replace("until-iteration = 14", "until-tokens = 3700")
    schedule = schedule_of(text, "--train-samples 130", tmp_path)
    first, second, third = schedule.phases
    # 70 samples are 8 steps of 8, and 2048 tokens; 1652 tokens more are 6 steps of 4 x 64; 130
    # samples leave 42 after 64 + 24, 3 steps of 12.
    assert [s.last_iteration for s in schedule.phases] == [8, 14, 17]
    assert (second.first_sample, second.first_token) == (64, 2048)
    assert (third.first_sample, third.first_token) == (88, 2048 + 24 * 64)
    assert first.samples_at(8) == second.samples_at(8) == 64


def test_a_phase_may_ramp_its_batch_up(tmp_path):
    text = TABLE.replace("global-batch-size = 12", "rampup-batch-size = [4, 4, 8]")
    third = schedule_of(text, "--train-iters 20", tmp_path).phases[2]
    consumed, sizes = third.first_sample, []
    for _ in range(4):
        sizes.append(third.batch_size(consumed))
        consumed += sizes[-1]
    assert sizes == [4, 4, 8, 8]
    assert third.samples_at(18) == consumed == 88 + 24


REJECTED = {
    "no length": (
        TABLE,
        "",
        "phase 'third' of {file}: --train-iters must be a number of steps, as the phase has no end",
    ),
    "two lengths": (
        TABLE,
        "--train-iters 20 --train-samples 99",
        "--train-iters must be used without --train-samples (got 20)",
    ),
    "a length and an end": (
        TABLE + "until-iteration = 18",
        "--train-iters 20",
        "--train-iters must be unset: phase 'third' of {file}, the last one, has an end (got 20)",
    ),
    "too short a run": (
        TABLE,
        "--train-iters 14",
        "phase 'third' of {file}: --train-iters must be >= 15, one step after the phases before",
    ),
    "an end before its beginning": (
        TABLE.replace("until-iteration = 14", "until-samples = 67"),
        "--train-iters 20",
        "phase 'second' of {file}: until-samples must be >= 68, one step after the phases before",
    ),
    "too few tokens": (
        TABLE.replace("until-iteration = 14", "until-tokens = 2303"),
        "--train-iters 20",
        "phase 'second' of {file}: until-tokens must be >= 2304, one step after the phases before",
    ),
    "a number out of range": (
        TABLE.replace("seq-length = 64", "seq-length = 0"),
        "--train-iters 20",
        "phase 'second' of {file}: --seq-length must be >= 1 (got 0)",
    ),
    "rows longer than the model": (
        TABLE.replace("seq-length = 64", "seq-length = 4096"),
        "--train-iters 20",
        "phase 'second' of {file}: --seq-length must be <= --max-position-embeddings (2048) (got 4",
    ),
    "a batch that does not divide": (
        TABLE.replace("global-batch-size = 12", "global-batch-size = 7"),
        "--train-iters 20",
        "phase 'third' of {file}: --global-batch-size must be a multiple of",
    ),
    "a warm-up that is too long": (
        TABLE.replace("lr-warmup-iters = 2", "lr-warmup-iters = 6"),
        "--train-iters 20",
        "phase 'second' of {file}: --lr-warmup-iters must be < 6, the steps of the linear decay",
    ),
    "a minimum above the peak": (
        TABLE.replace("min-lr = 1e-3", "min-lr = 1e-1"),
        "--train-iters 20",
        "phase 'second' of {file}: --min-lr must be <= --lr (0.002) (got 0.1)",
    ),
    "a ramp of the whole run": (
        TABLE,
        "--train-iters 20 --rampup-batch-size 4 4 16",
        "--rampup-batch-size must be used without --phases (got '4 4 16'); set it in the phase",
    ),
}


@pytest.mark.parametrize("name", list(REJECTED))
def test_invalid_phases_are_rejected_by_phase_and_flag(name, tmp_path):
    text, line, expected = REJECTED[name]
    with pytest.raises(UsageError) as error:
        schedule_of(text, line, tmp_path)
    assert expected.format(file=tmp_path / "phases.toml") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed = 5", 'data-path = ["/nowhere"]', "phase 'third' of {file}: "),
        ("seq-length = 64", "seq-lenght = 64", "the closest is seq-length"),
        ("seq-length = 64", "seq-length = 33", "phase 'second' of {file}: --tensor-model-parallel"),
    ],
)
def test_every_rank_rejects_a_bad_phase_before_the_first_step(
    old, new, named, pool, corpus, tmp_path
):
    table = tmp_path / "phases.toml"
    table.write_text(TABLE.replace(old, new))
    argv = [*MODEL, *_TP2, "--data-path", corpus, "--split", "80,20,0", "--train-iters", "20"]
    (code, out, error), other = pool.run(pretrain_rank, 2, argv=[*argv, "--phases", str(table)])
    assert other == (code, out, error)
    assert (code, out) == (2, "")
    assert named.format(file=table) in error
    assert "\n" not in error


def test_the_log_and_tensorboard_show_the_switch(pool, corpus, tmp_path):
    table = tmp_path / "phases.toml"
    table.write_text(TABLE)
    flags = ["--phases", str(table), "--train-iters", "20", "--eval-iters", "1"]
    flags += ["--tensorboard-dir", str(tmp_path / "board"), "--log-interval", "5"]
    log = _run(pool, 1, tmp_path / "run", corpus, flags).splitlines()
    expected = [
        " phase 1/3 first: steps 1 to 8, prefix-lm, 8 sequences of 32, 0 to 2048 tokens,",
        " phase 2 second begins after iteration 8 (64 samples, 2048 tokens); previous phase first",
        " phase second: --objective was prefix-lm, is causal",
        " phase second: --seq-length was 32, is 64",
        " phase second: --hidden-dropout was 0.0, is 0.2",
        " phase 3 third begins after iteration 14 (88 samples, 3584 tokens); previous phase second",
    ]
    for line in expected:
        assert any(text.startswith(line) for text in log), line
    intervals = [line.split(" | ")[:2] for line in log if line.startswith(" iteration ")]
    at = [(int(n.split()[1].split("/")[0]), stage) for n, stage in intervals]
    first, second, third = "phase first", "phase second", "phase third"
    assert at == [(5, first), (8, first), (10, second), (14, second), (15, third), (20, third)]
    # An evaluation where a stage ends, on its own data.
    held_out = [line.split(" | ")[0] for line in log if line.startswith(" validation at")]
    assert held_out == [f" validation at iteration {n}" for n in (8, 14, 20)]
    board = EventAccumulator(str(tmp_path / "board"), {"scalars": 0, "tensors": 0})
    board.Reload()
    seen = [(event.step, event.value) for event in board.Scalars("train/stage")]
    assert seen == [(5, 1), (8, 1), (9, 2), (10, 2), (14, 2), (15, 3), (15, 3), (20, 3)]
    texts = board.Tensors("stage/text_summary")
    assert [event.step for event in texts] == [9, 15]
    assert b"--objective was prefix-lm, is causal" in texts[0].tensor_proto.string_val[0]


def test_a_switch_shows_the_sources_of_the_next_phases_data(pool, corpus, tmp_path):
    other = write_corpus(tmp_path / "other")
    sources = [3, corpus, 1, other]
    table = tmp_path / "phases.toml"
    table.write_text(TABLE.replace("seq-length = 64", f"data-path = {json.dumps(sources)}"))
    flags = ["--phases", str(table), "--train-iters", "20", "--tensorboard-dir", str(tmp_path)]
    log = _run(pool, 1, tmp_path / "run", corpus, flags).splitlines()
    begins = next(i for i, line in enumerate(log) if line.startswith(" phase 2 second begins"))
    ends = next(i for i, line in enumerate(log) if line.startswith(" phase 3 third begins"))
    table_rows = [line.split() for line in log[begins:ends] if "%" in line]
    shown = {row[-1]: row for row in table_rows if row[-1] in (corpus, other)}
    assert {prefix: row[1] for prefix, row in shown.items()} == {corpus: "75.00%", other: "25.00%"}
    # 6 steps of 4 rows of 32: the epochs of this stage, not those of the run.
    tokens, epochs = int(shown[other][2].replace(",", "")), float(shown[other][3])
    assert epochs == pytest.approx(6 * 4 * 32 * 0.25 / tokens, rel=5e-3)
    board = EventAccumulator(str(tmp_path), {"tensors": 0})
    board.Reload()
    text = board.Tensors("stage/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "75.00%" in text and other in text


def test_the_checkpoint_records_how_much_of_each_phase_was_consumed(pool, corpus, tmp_path):
    table, run = tmp_path / "phases.toml", tmp_path / "run"
    table.write_text(TABLE)
    flags = ["--phases", str(table), "--train-iters", "20", "--exit-interval", "10"]
    _run(pool, 1, run, corpus, flags)
    state = json.loads((run / "iter_0000010" / "state.json").read_text())["train"]
    assert state["consumed_train_samples"] == 72
    found = [(r["name"], r["iterations"], r["samples"]) for r in state["extra"]["stages"]]
    assert found == [("first", 8, 64), ("second", 2, 8)]


def test_the_documented_table_is_one(tmp_path):
    manual = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    example = manual.split("as a causal language model on another mixture")[1]
    lines = example.split("    pretrain_openmoe.py")[0].splitlines()
    path = tmp_path / "phases.toml"
    path.write_text("\n".join(line[4:] for line in lines if line.startswith("    ")))
    argv = ["--preset", "openmoe-8b-32e-released", "--train-iters", "526000"]
    schedule = resolve_run_schedule(parse_args([*argv, "--phases", str(path)]).config, 1)
    assert [s.name for s in schedule.phases] == ["ul2", "causal", "chat"]
    assert schedule.phases[0].last_iteration == 390000
    # 1.1e12 tokens are 524520 whole steps of 1024 x 2048.
    assert schedule.phases[1].last_iteration == 1_100_000_000_000 // (1024 * 2048)
