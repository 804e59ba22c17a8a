"""The flags of saving and loading, seen from the steps that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.training.tiny import MODEL, pretrain_rank

FLAGS = ["--split", "80,20,0", "--eval-iters", "2", "--hidden-dropout", "0.1"]
FLAGS += ["--lr-warmup-iters", "0"]


class Runs:
    """Single-process runs on one corpus; the first six steps are saved every second step."""

    def __init__(self, pool, corpus: str, directory: Path) -> None:
        self.pool, self.corpus, self.directory, self.count = pool, corpus, directory, 0
        self.saved = str(directory / "saved")
        first = self.go("--train-iters 6 --save-interval 2", "--save", self.saved)
        self.steps, self.log = first

    def go(self, line: str, *more: str, code: int = 0) -> tuple[list[dict], str]:
        """Steps and log of a run; the text of the usage error if it must end with one."""
        self.count += 1
        metrics = self.directory / f"metrics-{self.count}.jsonl"
        argv = [*MODEL, *FLAGS, "--data-path", self.corpus, "--metrics-file", str(metrics)]
        ((found, out, error),) = self.pool.run(pretrain_rank, 1, argv=[*argv, *line.split(), *more])
        assert found == code, error
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(text) for text in lines], error or out

    def load(self, line: str, **expected: int) -> tuple[list[dict], str]:
        return self.go(line, "--load", self.saved, **expected)


@pytest.fixture(scope="module")
def runs(pool, corpus, tmp_path_factory) -> Runs:
    return Runs(pool, corpus, tmp_path_factory.mktemp("runs"))


def _validation(log: str) -> str:
    return next(line for line in log.splitlines() if line.startswith(" validation loss"))


def test_save_interval(runs):
    assert sorted(path.name for path in Path(runs.saved).glob("iter_*")) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
    ]


def test_keep_last_and_keep_every(runs, tmp_path):
    line = "--train-iters 6 --save-interval 1 --keep-last 2 --keep-every 3"
    assert runs.go(line, "--save", str(tmp_path))[0] == runs.steps
    names = sorted(path.name for path in tmp_path.iterdir())
    kept = ["iter_0000003", "iter_0000005", "iter_0000006"]
    assert names == [*kept, "latest_checkpointed_iteration.txt"]
    _, found = runs.go("--train-iters 6 --keep-every 3", "--save", str(tmp_path), code=2)
    assert found.strip() == "--keep-every must be used with --keep-last (got 3)"


def test_ckpt_step_resumes_from_an_older_step(runs):
    assert runs.load("--ckpt-step 4 --train-iters 6")[0] == runs.steps[4:]
    assert "--ckpt-step" in runs.load("--ckpt-step 5 --train-iters 6", code=2)[1]


def test_no_load_optim_and_no_load_rng_leave_them_out(runs):
    steps, _ = runs.load("--ckpt-step 4 --train-iters 6 --no-load-optim")
    assert steps[0] == runs.steps[4]
    assert steps[1]["lm_loss"] != runs.steps[5]["lm_loss"]
    steps, _ = runs.load("--ckpt-step 4 --train-iters 6 --no-load-rng")
    assert steps[0]["consumed_samples"] == runs.steps[4]["consumed_samples"]
    assert steps[0]["lm_loss"] != runs.steps[4]["lm_loss"]


def test_no_save_optim_and_no_save_rng_leave_them_out(runs, tmp_path):
    runs.go("--train-iters 2 --no-save-optim --no-save-rng", "--save", str(tmp_path))
    again = ("--train-iters 3", "--load", str(tmp_path))
    assert "no optimizer state" in runs.go(*again, code=2)[1]
    steps, _ = runs.go(*again, "--no-load-optim", "--no-load-rng")
    assert [step["iteration"] for step in steps] == [3]


def test_finetune_loads_only_the_weights(runs):
    line = "--finetune --train-iters 1 --lr 0"
    steps, log = runs.load(line)
    assert steps[0]["iteration"] == 1
    assert steps[0]["consumed_samples"] == 8
    assert steps[0]["lm_loss"] < runs.steps[0]["lm_loss"]
    assert _validation(log) == _validation(runs.log)
    assert "--finetune must be used with --load" in runs.go("--finetune --train-iters 1", code=2)[1]


def test_a_finished_run_has_nothing_left_but_its_evaluation(runs):
    steps, log = runs.load(
        "--train-iters 6",
    )
    assert steps == []
    assert _validation(log) == _validation(runs.log)
    assert " done at iteration 6, 48 samples consumed" in log.splitlines()
    steps, log = runs.go("--train-iters 6", "--load", runs.saved, "--save", runs.saved)
    assert " saved iteration" not in log
    assert len(list(Path(runs.saved).glob("iter_*"))) == 3


def test_a_missing_checkpoint_is_step_0_only_with_its_flag(runs, tmp_path):
    missing = ("--train-iters 1", "--load", str(tmp_path / "none"))
    assert "--allow-missing-load" in runs.go(*missing, code=2)[1]
    steps, log = runs.go(*missing, "--allow-missing-load")
    assert [step["iteration"] for step in steps] == [1]
    assert steps[0]["lm_loss"] == runs.steps[0]["lm_loss"]
    assert log.count(f" no checkpoint in {missing[2]}: starting from step 0 with new weights") == 1


@pytest.mark.parametrize("extra", [(), ("--allow-missing-load",)])
def test_weights_that_are_no_checkpoint_of_a_run_never_mean_step_0(runs, tmp_path, extra):
    """A step's directory, one level too high or too low, another program's weights."""
    step = f"{runs.saved}/iter_0000006"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    cases = {
        step: f"give {runs.saved} with --ckpt-step 6",
        f"{step}/deeper": f"give {runs.saved} with --ckpt-step 6",
        str(Path(runs.saved).parent): f"give {runs.saved}",
        f"{runs.saved}/new": f"give {runs.saved}; for a run that starts anew",
        str(tmp_path / "hf"): "tools/convert_checkpoint.py",
        str(tmp_path): "a Hugging Face model in",
    }
    for load, said in cases.items():
        steps, error = runs.go("--train-iters 1", "--load", load, *extra, code=2)
        assert steps == [] and said in error and "--allow-missing-load" not in error, load


def test_train_samples_is_rounded_down_to_steps(runs):
    steps, _ = runs.go("--train-samples 31")
    assert [step["consumed_samples"] for step in steps] == [8, 16, 24]


def test_checkpoint_fallback_loads_the_newest_intact_step_with_a_warning(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs.saved, copy)
    damaged = copy / "iter_0000006" / "rank-00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    line = "--train-iters 6 --save-interval 2"
    _, found = runs.go(line, "--load", str(copy), "--save", str(copy), code=2)
    assert f"{damaged} has SHA-256" in found
    last = found.splitlines()[-1]
    assert "rank-00000.safetensors" in last and "--checkpoint-fallback" in last
    both = (line, "--checkpoint-fallback", "--load", str(copy), "--save", str(copy))
    steps, log = runs.go(*both)
    assert steps == runs.steps[4:]
    warning = next(text for text in log.splitlines() if text.startswith(" WARNING: "))
    assert "iter_0000006 is damaged and was skipped" in warning and str(damaged) in warning
    assert (copy / "latest_checkpointed_iteration.txt").read_text() == "6\n"
    assert "WARNING" not in runs.go(*both)[1]


def test_checkpoint_fallback_chooses_alone(runs):
    line = "--train-iters 6 --checkpoint-fallback"
    assert "--checkpoint-fallback must be used with --load" in runs.go(line, code=2)[1]
    assert (
        "--checkpoint-fallback must be used without --ckpt-step"
        in runs.load(f"{line} --ckpt-step 4", code=2)[1]
    )
