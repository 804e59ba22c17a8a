"""Held-out losses of a run with phases: each as the run itself measured it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.data.indexed.writer import IndexedWriter
from tests.support.pool import Pool
from tests.training.tiny import MODEL, VOCAB, pretrain_rank
from tools.evaluate import main

# Every phase has other data, rows, batches and objective; the data is of several domains, as the
# metrics file has evaluations for these alone. The second phase learns nothing, so what it measures
# is also the loss of the weights that the first one ends with.
TABLE = """
[[stage]]
name = "low"
until-iteration = 2
data-path = ["0.8", "{folder}/low", "0.2", "{folder}/high"]
eval-iters = 3

[[stage]]
name = "high"
until-iteration = 4
data-path = ["0.3", "{folder}/low", "0.7", "{folder}/high"]
objective = "prefix-lm"
seq-length = 64
global-batch-size = 4
micro-batch-size = 1
eval-iters = 2
domain-eval-iters = 1
lr = 0.0

[[stage]]
name = "last"
data-path = ["{folder}/high", "{folder}/low"]
split = "30,60,10"
eod-mask-loss = true
"""
RUN = "--train-iters 5 --eval-interval 1 --save-interval 1 --log-interval 1 --split 50,40,10"


@pytest.fixture(scope="module")
def folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of every step of a run, and its metrics."""
    folder = tmp_path_factory.mktemp("run")
    for name, step, length in (("low", 1, 3), ("high", 3, 60)):
        with IndexedWriter(str(folder / name), VOCAB) as writer:
            for start in range(9000 // length):
                ids = [(start + step * i) % 97 + 2 for i in range(1 + start % (2 * length))]
                writer.add_document([*ids, VOCAB - 1])
    table = folder / "stages.toml"
    table.write_text(TABLE.format(folder=folder))
    argv = [*MODEL, "--eval-iters", "2", *RUN.split(), "--stages", str(table)]
    argv += ["--save", str(folder), "--metrics-file", str(folder / "metrics.jsonl")]
    argv += ["--moe-eval-capacity-factor", "0.5"]
    results = pool.run(pretrain_rank, 1, argv=argv)
    assert [(code, mistake) for code, _, mistake in results] == [(0, "")]
    # What has begun is in the checkpoints, and needs no table any more.
    table.rename(folder / "moved.toml")
    return folder


def _measured(folder: Path, step: int, split: str = "valid") -> list[tuple[int, float]]:
    """Targets and loss of all and of each domain, as the run has them."""
    name = "validation" if split == "valid" else "test"
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (found,) = (x for x in lines if x.get("evaluation") == name and x["iteration"] == step)
    return [(x["targets"], x["lm_loss"]) for x in (found, *found.get("domains", {}).values())]


def _found(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> dict[str, Any]:
    main(["--load", str(folder), "--json", *flags])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _same(found: dict[str, Any], measured: list[tuple[int, float]]) -> bool:
    mine = [(each["tokens"], each["loss"]) for each in found["results"]]
    return mine == [(targets, pytest.approx(loss, rel=1e-5)) for targets, loss in measured]


@pytest.mark.parametrize(
    ("step", "name"), [(1, "low"), (2, "low"), (3, "high"), (4, "high"), (5, "last")]
)
def test_of_the_phase_that_took_the_last_step(
    capsys: pytest.CaptureFixture[str], folder: Path, step: int, name: str
) -> None:
    found = _found(capsys, folder, "--held-out", "valid", "--ckpt-step", str(step))
    assert found["stage"] == name
    assert _same(found, _measured(folder, step))


def test_of_the_test_split_at_the_end(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert _same(_found(capsys, folder, "--held-out", "test"), _measured(folder, 5, "test"))


@pytest.mark.parametrize("flag", ["--phase", "--stage"])
@pytest.mark.parametrize("phase", ["low", "1"])
def test_of_a_phase_that_is_over(
    capsys: pytest.CaptureFixture[str], folder: Path, phase: str, flag: str
) -> None:
    flags = ("--held-out", "valid", "--ckpt-step", "4", flag, phase)
    assert _same(_found(capsys, folder, *flags), _measured(folder, 2))


@pytest.mark.parametrize("phase", ["high", "2"])
def test_of_a_phase_to_come(capsys: pytest.CaptureFixture[str], folder: Path, phase: str) -> None:
    flags = ("--held-out", "valid", "--ckpt-step", "2", "--phase", phase)
    (folder / "moved.toml").rename(folder / "stages.toml")
    try:
        found = _found(capsys, folder, *flags)
    finally:
        (folder / "stages.toml").rename(folder / "moved.toml")
    assert _same(found, _measured(folder, 3))


def test_a_line_names_the_phase(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    main(["--load", str(folder), "--held-out", "valid", "--ckpt-step", "2"])
    first, head, *_ = capsys.readouterr().out.splitlines()
    assert first == "held-out data of phase 1, 'low': it took step 2"
    assert head.split()[:2] == ["domain", "tokens"]
    main(["--load", str(folder), "--held-out", "valid", "--phase", "1"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "held-out data of phase 1, 'low': selected by --phase"
