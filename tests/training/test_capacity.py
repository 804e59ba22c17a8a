"""`--moe-target-drop-rate` in a run: resumed bitwise, alike in every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_moe.config import MoEConfig, RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.training.capacity import CapacityControl
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank, write_corpus

# Another order of tokens in each step as well: it must go on where it was.
FLAGS = (
    "--train-iters 16 --log-interval 4 --split 80,20,0 --eval-iters 1 --moe-min-capacity 1"
    " --moe-token-drop-policy random --moe-target-drop-rate 0.05"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("capacity") / "x")


def trained(
    pool: Pool, argv: list[str], metrics: Path, ranks: int = 1
) -> tuple[list[float], list[str]]:
    """The exact loss of each step, and the changes of capacity in the log."""
    metrics.unlink(missing_ok=True)
    flags = [*MODEL, *FLAGS.split(), *argv, "--metrics-file", str(metrics)]
    results = pool.run(pretrain_rank, ranks, argv=flags)
    assert [(code, mistake) for code, _, mistake in results] == [(0, "")] * ranks
    log = next(text for _, text, _ in results if "capacity factor" in text or ranks == 1)
    losses = [float.fromhex(json.loads(line)["lm_loss_hex"]) for line in metrics.open()]
    return losses, re.findall(r"MoE layer \d+: capacity factor [\d.]+ -> [\d.]+", log)


def test_a_resumed_run_goes_on_with_the_sizes_and_the_counts_that_it_had(
    pool: Pool, corpus: str, tmp_path: Path
) -> None:
    data, save = ["--data-path", corpus], ["--save", str(tmp_path / "ckpt")]
    whole, changes = trained(pool, data, tmp_path / "whole.jsonl")
    assert len(changes) > 2
    first, before = trained(pool, [*data, *save, "--exit-interval", "7"], tmp_path / "a.jsonl")
    load = ["--load", str(tmp_path / "ckpt")]
    rest, after = trained(pool, [*data, *load], tmp_path / "b.jsonl")
    assert (first + rest, before + after) == (whole, changes)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "--pipeline-model-parallel-size 2"),
        pytest.param(2, "", marks=pytest.mark.slow),
        pytest.param(2, "--expert-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param(
            2,
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            1,
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_layout_makes_the_same_decisions(
    pool: Pool, corpus: str, tmp_path: Path, ranks: int, flags: str
) -> None:
    data = ["--data-path", corpus]
    whole, changes = trained(pool, data, tmp_path / "whole.jsonl")
    found, same = trained(pool, [*data, *flags.split()], tmp_path / "found.jsonl", ranks)
    assert same == changes
    assert found == pytest.approx(whole, abs=1e-4)


def test_a_state_of_other_sizes_begins_anew_and_another_thing_is_an_error() -> None:
    def control(saved: object = None, low: float = 0.5) -> CapacityControl:
        moe = MoEConfig(moe_target_drop_rate=0.1, moe_capacity_factor_range=(low, 4.0))
        return CapacityControl(RunConfig(moe=moe), saved)

    saved = control().to_json()
    saved["layers"][0]["size"] = 1
    again = control(json.loads(json.dumps(saved)))
    assert again.to_json() == json.loads(json.dumps(saved)) | {"sizes": saved["sizes"]}
    assert control(saved, low=1.0).to_json() == control(low=1.0).to_json()
    with pytest.raises(UsageError, match="'moe_capacity' of the checkpoint"):
        control({"sizes": saved["sizes"], "layers": [{"sise": 3}, {}]})
