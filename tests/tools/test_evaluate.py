"""The command: losses as training measures them, what is printed, the errors."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.writer import IndexedWriter
from tests.inference.cases import CONFIG, save
from tests.support.pool import Pool
from tests.support.usage_errors import usage_error
from tests.training.tiny import MODEL, pretrain_rank, write_domains
from tools.evaluate import main

# Rows have few targets or many, so that a mean of means would show; slots are few.
RUN = (
    "--train-iters 3 --log-interval 3 --eval-interval 3 --eval-iters 3 --domain-eval-iters 2 "
    "--split 50,40,10 --eod-mask-loss --global-batch-size 4 --micro-batch-size 2 "
    "--moe-eval-capacity-factor 0.5 --moe-capacity-rule port --reset-position-ids"
)


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint of a run on two domains, and its evaluations."""
    folder = tmp_path_factory.mktemp("run")
    domains = write_domains(folder)
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint"
    paths = ["--data-path", "0.3", domains["low"], "0.7", domains["high"]]
    argv = [*MODEL, *RUN.split(), "--metrics-file", str(metrics), "--save", str(checkpoint)]
    results = pool.run(pretrain_rank, 1, argv=[*argv, *paths])
    assert [(code, mistake) for code, _, mistake in results] == [(0, "")]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return checkpoint, [line for line in lines if "evaluation" in line]


def _results(capsys: pytest.CaptureFixture[str], checkpoint: Path, *flags: str) -> list[Any]:
    main(["--load", str(checkpoint), "--json", *flags])
    found: list[Any] = json.loads(capsys.readouterr().out)["results"]
    return found


@pytest.mark.parametrize("split", ["valid", "test"])
def test_held_out_losses_are_those_of_training(
    capsys: pytest.CaptureFixture[str], run: tuple[Path, list[dict[str, Any]]], split: str
) -> None:
    checkpoint, records = run
    name = "validation" if split == "valid" else "test"
    (record,) = [each for each in records if each["evaluation"] == name and each["iteration"] == 3]
    found = _results(capsys, checkpoint, "--held-out", split)
    assert [each["name"] for each in found] == ["all", *record["domains"]]
    for mine, theirs in zip(found, [record, *record["domains"].values()], strict=True):
        assert mine["tokens"] == theirs["targets"]
        assert mine["loss"] == pytest.approx(theirs["lm_loss"], rel=1e-5)


def test_held_out_samples_on_request(
    capsys: pytest.CaptureFixture[str], run: tuple[Path, list[dict[str, Any]]]
) -> None:
    checkpoint, _ = run
    whole = _results(capsys, checkpoint, "--held-out", "valid")[0]
    # Twelve sequences either way, cut into other global batches.
    flags = ("--held-out", "valid", "--eval-iters", "6", "--global-batch-size", "2")
    assert _results(capsys, checkpoint, *flags)[0] == whole
    fewer = _results(capsys, checkpoint, "--held-out", "valid", "--eval-iters", "1")[0]
    assert fewer["tokens"] < whole["tokens"]
    dropless = ("--held-out", "valid", "--moe-capacity", "dropless")
    assert _results(capsys, checkpoint, *dropless)[0]["loss"] != whole["loss"]


def _data(prefix: Path) -> str:
    with IndexedWriter(str(prefix), 259) as writer:
        writer.add_document([70, 80, 90, 70, 80, 1])
    return str(prefix)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("native"))


def test_a_table(capsys: pytest.CaptureFixture[str], native: Path, tmp_path: Path) -> None:
    one, other = _data(tmp_path / "one"), _data(tmp_path / "two")
    main(["--load", str(native), "--data-path", "1", one, "3", other])
    head, first, second, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["domain", "tokens", "loss", "perplexity", "bits/byte", "weight"]
    assert (first[0], first[1], first[4:]) == ("one", "6", ["-", "0.2500"])
    assert (second[0], second[1], second[4:]) == ("two", "6", ["-", "0.7500"])
    assert (last[0], last[1], last[2]) == ("all", "12", first[2])


def test_hugging_face_weights_are_read_in_their_longest_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prefix = str(tmp_path / "data")
    with IndexedWriter(prefix, 259) as writer:
        writer.add_document([70 + 3 * i % 50 for i in range(280)])
    config = replace(CONFIG, model=replace(CONFIG.model, max_position_embeddings=280))
    weights = save(tmp_path / "weights", config, layout="hf")
    native = save(tmp_path / "native", config)
    flags = ("--tokenizer-type", "ByteTokenizer", "--data-path", prefix)
    (found,) = _results(capsys, weights, *flags)
    (expected,) = _results(capsys, native, "--data-path", prefix, "--seq-length", "280")
    assert found == expected
    (shorter,) = _results(capsys, weights, *flags, "--seq-length", "256")
    assert shorter["loss"] != found["loss"]


def test_a_native_checkpoint_is_read_in_the_rows_of_its_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = DataConfig(tokenizer_type="ByteTokenizer", seq_length=3)
    checkpoint, prefix = save(tmp_path / "c", replace(CONFIG, data=data)), _data(tmp_path / "d")
    (found,) = _results(capsys, checkpoint, "--data-path", prefix)
    assert [found] == _results(capsys, checkpoint, "--data-path", prefix, "--seq-length", "3")
    assert [found] != _results(capsys, checkpoint, "--data-path", prefix, "--seq-length", "6")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--data-path, --held-out, --tasks"),
        (["--data-path", "x", "--tasks", "y"], "--tasks (got '--data-path --tasks')"),
        (["--data-path", "x", "--limit", "3"], "--limit must be absent without --tasks (got 3)"),
        (["--held-out", "test", "--max-tokens", "3"], "absent without --data-path"),
        (
            ["--data-path", "x", "--stage", "2"],
            "--phase must be absent without --held-out (got '2')",
        ),
        (
            ["--held-out", "test", "--stage", "2"],
            "--phase must be absent for a run without --phases (got '2')",
        ),
        (["--held-out", "test", "--batch-size", "3"], "--micro-batch-size applies"),
        (["--data-path", "x", "--batch-size", "0"], "--batch-size"),
        (["--tasks", "x", "--num-fewshot", "-1"], "--num-fewshot"),
        (["--data-path", "x", "--seq-length", "41"], "<= --max-position-embeddings (40)"),
        (["--data-path", "/none/x"], "/none/x"),
        (["--held-out", "valid"], "--global-batch-size"),
        (["--held-out", "valid", "--global-batch-size", "6"], "a multiple of the run's"),
        (["--held-out", "valid", "--global-batch-size", "8"], "--data-path"),
        (["--ckpt-step", "8", "--data-path", "x"], "8"),
        (["--tasks", "none", "--include-path", "/none"], "--include-path"),
        (["--tasks", "x", "--fewshot-as-multiturn"], "absent without --apply-chat-template"),
        (["--data-path", "x", "--apply-chat-template"], "absent without --tasks"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], native: Path, flags: list[str], named: str
) -> None:
    assert named in usage_error(main, ["--load", str(native), *flags], capsys)


def test_held_out_samples_of_weights_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = save(tmp_path / "weights", layout="hf")
    flags = ["--tokenizer-type", "ByteTokenizer", "--held-out", "valid"]
    assert "--held-out must be absent for Hugging Face weights" in usage_error(
        main, ["--load", str(weights), *flags], capsys
    )


def test_without_lm_eval_a_line_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "lm_eval" else find(name, *more),
    )
    # Said before the checkpoint is looked for: a large one takes minutes.
    error = usage_error(main, ["--load", str(tmp_path / "none"), "--tasks", "arc_easy"], capsys)
    assert "pip install 'megatron-moe[eval]'" in error
