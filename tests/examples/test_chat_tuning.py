"""Chat tuning: the script's commands are run for a few steps, and the held-out loss falls.

The script is run by bash with `python` and `torchrun` replaced by shell functions that write down
their arguments; what it would start is then started in the ranks of the pool.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.planning.describe import describe
from tests.examples.test_quickstart import RECORD, after
from tests.support.pool import Pool
from tests.training.tiny import pretrain_rank
from tools import generate, make_demo_chat, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LOSS = " validation at iteration 1 | lm loss {} | perplexity 1\\n"


def run(folder: Path, before: str = "5.0", tuned: str = "4.0") -> subprocess.CompletedProcess[str]:
    """Run the script; torchrun's stand-in prints held-out losses, as the program would."""
    told = f'{RECORD[:-1]} case "$*" in *--save*) printf "{LOSS.format(tuned)}";;'
    told += f' *) printf "{LOSS.format(before)}";; esac; }}'
    stubs = {"BASH_FUNC_python%%": RECORD, "BASH_FUNC_torchrun%%": told}
    places = {"QUICKSTART_DIR": str(folder), "CALLS": str(folder / "calls"), "CHAT_ITERS": "6"}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "chat_tuning.sh"), "--seed", "7"],
        env=os.environ | stubs | places,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """What the script asks of a quickstart's folder, without the content."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("1\n")
    return tmp_path


def calls(folder: Path) -> list[list[str]]:
    """What the script calls, words of each call."""
    lines = (folder / "calls").read_text().split("\0\n\0")
    return [line.strip("\0\n").split("\0") for line in lines if line.strip("\0\n")]


def test_the_recipe(quickstart: Path) -> None:
    done = run(quickstart)
    assert done.returncode == 0, done.stderr
    assert "== Held-out loss of the answers: 5.0 before, 4.0 after" in done.stdout
    found = calls(quickstart)
    before, tuning = (parse_args(a).config for a in after(found, "pretrain_openmoe.py"))
    assert (tuning.objective.objective, tuning.checkpoint.finetune) == ("sft", True)
    assert (tuning.model.hidden_dropout, tuning.model.attention_dropout) == (0.05, 0.05)
    assert (tuning.train.train_iters, tuning.train.seed) == (6, 7)
    assert (before.train.train_iters, before.optimizer.lr) == (1, 0.0)
    assert before.data == tuning.data, "the same held-out conversations"
    assert before.train.eval_iters == tuning.train.eval_iters
    assert before.checkpoint.save is None
    (made,) = after(found, "tools/make_demo_chat.py")
    assert made == ["--output", tuning.data.data_path[0]]
    (sampled,) = after(found, "tools/generate.py")
    assert sampled[:2] == ["--load", tuning.checkpoint.save]


@pytest.mark.parametrize("tuned", ["4.8", "nan", ""])
def test_a_loss_that_did_not_fall_fails(tuned: str, quickstart: Path) -> None:
    assert run(quickstart, tuned=tuned).returncode == 1


def test_without_a_quickstart_it_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    expected = "QUICKSTART_DIR must be a folder with the checkpoint of make quickstart"
    assert f"{expected} (got '{tmp_path}'); try: make quickstart" in done.stderr


@pytest.mark.slow
def test_held_out_answers_become_likelier(
    quickstart: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script's own flags, from a model that was trained for a step."""
    assert run(quickstart).returncode == 0
    chat = quickstart / "chat" / "chat.jsonl"
    make_demo_chat.main(["--output", str(chat), "--conversations", "200"])
    turns = [t for line in chat.read_text().splitlines() for t in json.loads(line)["messages"]]
    texts = quickstart / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": turn["content"]}) + "\n" for turn in turns))
    tokenizer = ["--output", str(quickstart / "tokenizer.model"), "--vocab-size", "600"]
    train_tokenizer.main(["--input", str(texts), *tokenizer])
    before, tuning = after(calls(quickstart), "pretrain_openmoe.py")
    assert "shared 1024, sequential" in describe(parse_args(tuning).config, "text", 2)
    checkpoint = str(quickstart / "checkpoint")
    (quickstart / "checkpoint" / "latest_checkpointed_iteration.txt").unlink()  # the fixture's
    load = before.index("--load")
    scratch = [*before[:load], *before[load + 3 :]]  # without --load DIR --finetune
    _pretrain(pool, [*scratch, "--lr", "1e-3", "--save", checkpoint, "--eval-iters", "0"])
    capsys.readouterr()
    first = _held_out(_pretrain(pool, before))
    last = _held_out(_pretrain(pool, tuning))
    assert last < 0.95 * first
    (sampled,) = after(calls(quickstart), "tools/generate.py")
    generate.main([*sampled, "--max-new-tokens", "2"])
    assert "[INST]" in capsys.readouterr().out


def _pretrain(pool: Pool, argv: list[str]) -> str:
    results = pool.run(pretrain_rank, 2, argv=argv)
    for code, _, mistake in results:
        assert code == 0, mistake
    return results[0][1]


def _held_out(log: str) -> float:
    lines = [line for line in log.splitlines() if line.startswith(" validation at iteration")]
    return float(lines[-1].split("lm loss ")[1].split()[0])
