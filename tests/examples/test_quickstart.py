"""The quickstart: the commands it gives are valid ones, and its last lines say what happened.

The script is run by bash with `python` and `torchrun` replaced by shell functions that write down
their arguments.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from examples.quickstart_summary import MARGIN, main, read
from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.training.plan import resolve_plan
from tools import analyze_moe, preprocess_data

ROOT = Path(__file__).resolve().parents[2]
RECORD = '() { printf "%s\\0" "$FUNCNAME" "$@" $\'\\n\' >> "$CALLS"; }'


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with recording stand-ins."""
    stubs = {f"BASH_FUNC_{name}%%": RECORD for name in ("python", "torchrun")}
    places = {"QUICKSTART_DIR": str(folder / "out"), "CALLS": str(folder / "calls")}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh")],
        env=os.environ | stubs | places | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def calls(tmp_path: Path) -> list[list[str]]:
    """What the script calls, words of each call."""
    done = run(tmp_path, QUICKSTART_ITERS="30")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "calls").read_text().split("\0\n\0")
    return [line.split("\0") for line in lines if line]


def after(calls: list[list[str]], program: str) -> list[list[str]]:
    """Arguments of each call of ``program``."""
    return [call[call.index(program) + 1 :] for call in calls if program in call]


def test_training_flags_and_layout(calls: list[list[str]], tmp_path: Path) -> None:
    first, second = (
        parse_args(arguments).config for arguments in after(calls, "pretrain_openmoe.py")
    )
    launches = [call for call in calls if call[0] == "torchrun"]
    assert all(call[call.index("--nproc-per-node") + 1] == "2" for call in launches)
    layout = resolve_layout(first, 2)
    assert layout.ep == 2
    assert [resolve_plan(c, layout.global_batch_size).iterations for c in (first, second)] == [
        30,
        50,
    ]
    assert first.checkpoint.load is None
    assert second.checkpoint.load == first.checkpoint.save == str(tmp_path / "out/checkpoint")
    assert first.optimizer == second.optimizer, "one learning-rate schedule over both parts"
    assert first.train.eval_iters > 0


def test_data_is_tokenized_where_training_reads_it(calls: list[list[str]]) -> None:
    written = []
    for arguments in after(calls, "tools/preprocess_data.py"):
        options, data = preprocess_data.settings(preprocess_data.parser().parse_args(arguments))
        assert options.append_eod
        written += preprocess_data.output_prefixes(options)
    for arguments in after(calls, "pretrain_openmoe.py"):
        config = parse_args(arguments).config
        assert [path for path in config.data.data_path if "/" in path] == written
        assert config.data.tokenizer_model == data.tokenizer_model


def test_unigram_model_sees_the_same_data(calls: list[list[str]]) -> None:
    (unigram,) = after(calls, "tools/unigram_loss.py")
    training, baseline = (
        parse_args(arguments).config
        for arguments in (after(calls, "pretrain_openmoe.py")[0], unigram)
    )
    assert baseline == training


def test_the_report_is_of_the_checkpoint_on_both_domains(
    calls: list[list[str]], tmp_path: Path
) -> None:
    (arguments,) = after(calls, "tools/analyze_moe.py")
    options = analyze_moe.parse(arguments)
    analyze_moe.check(options)
    saved = parse_args(after(calls, "pretrain_openmoe.py")[-1]).config
    assert options.load == [saved.checkpoint.save]
    pairs = [word.split("=", 1) for word in options.data]
    assert [name for name, _ in pairs] == ["code", "text"]
    assert all(prefix in saved.data.data_path for _, prefix in pairs)
    assert options.out == tmp_path / "out/report"


def test_a_folder_that_is_not_a_quickstart_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    precious = tmp_path / "out" / "thesis.tex"
    precious.write_text("")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "QUICKSTART_DIR" in done.stderr
    assert precious.exists()


def finished(folder: Path, valid: float) -> Path:
    """The logs of a finished quickstart."""
    logs = folder / "logs"
    logs.mkdir()
    records: list[dict[str, object]]
    records = [{"iteration": i + 1, "lm_loss": 8.0 - 0.1 * i} for i in range(30)]
    records.append({"iteration": 30, "evaluation": "validation", "lm_loss": valid})
    (logs / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    speeds = (" iteration 1 | 900 tokens/s | 1 MiB\n", " iteration 2 | 1000 tokens/s | 1 MiB\n")
    (logs / "pretrain.log").write_text("".join(speeds) + " i | 4000 tokens/s | 1 MiB\n")
    lines = f" validation at iteration 30 | lm loss {valid:.6E} | perplexity 1.0\n"
    (logs / "continue.log").write_text(" validation at iteration 10 | lm loss 9.0 |\n" + lines)
    (logs / "unigram.log").write_text("unigram held-out loss 6.500000 nats per token (9 targets)\n")
    return folder


def test_summary(tmp_path: Path) -> None:
    results = read(finished(tmp_path, valid=5.25))
    assert results.steps == 30
    assert results.first_loss == 8.0
    assert results.last_loss == pytest.approx(8.0 - 0.1 * 24.5)
    assert results.valid_loss == 5.25, "the last evaluation counts"
    assert results.unigram_loss == 6.5
    assert results.tokens_per_second == 1000, "a median: start-up must not count"


@pytest.mark.parametrize(("valid", "code"), [(6.5 - MARGIN - 0.01, 0), (6.5 - MARGIN + 0.01, 1)])
def test_exit_code_says_whether_it_learned(
    tmp_path: Path,
    valid: float,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = finished(tmp_path, valid)
    monkeypatch.setattr("sys.argv", ["quickstart_summary.py", str(folder)])
    assert main() == code
    shown = capsys.readouterr().out
    assert f"held-out loss   {valid:.3f}, a unigram model has 6.500" in shown
    assert f"tensorboard --logdir {folder}/tensorboard" in shown
