"""Models whose capacity groups have several rows: batches, parts and windows are whole groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.ablation import evaluate, part_of
from megatron_moe.analysis.analyses.misrouting import windows_of
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.sample import Sample, in_whole_groups
from megatron_moe.errors import UsageError
from tests.analysis.expert_cases import planted, texts
from tests.inference import cases
from tools.analyze_moe import main

LENGTH = 12


def grouped(folder: Path, size: int | None, **changes: Any) -> MoEModel:
    moe = replace(cases.CONFIG.moe, moe_capacity_group_size=size, **changes)
    return open_model(cases.save(folder, replace(cases.CONFIG, moe=moe)))


def counts(sample: Sample) -> list[int]:
    return [len(batch.tokens_BS) for batch in sample.batches()]


def test_rows_of_a_group(tmp_path: Path) -> None:
    model = grouped(tmp_path / "a", 2 * LENGTH)
    assert model.rows_per_group(LENGTH) == 2
    assert model.rows_per_group(2 * LENGTH) == model.rows_per_group(4 * LENGTH) == 1
    with pytest.raises(UsageError, match="--seq-length must be a divisor or a multiple of 24"):
        model.rows_per_group(9)
    assert grouped(tmp_path / "b", None).rows_per_group(9) is None
    dropless = grouped(tmp_path / "c", 2 * LENGTH, moe_eval_capacity_factor=None)
    assert dropless.rows_per_group(9) is None
    assert planted(tmp_path, "olmoe").rows_per_group(9) is None


def test_batches_parts_and_windows_are_whole_groups(tmp_path: Path) -> None:
    model = grouped(tmp_path / "model", 2 * LENGTH)
    sample = texts(tmp_path, rows=7, batch_size=5)
    fitted = in_whole_groups(sample, [model])
    assert counts(fitted) == [4, 2, 4, 2]
    for domain, whole in zip(fitted.domains, sample.domains, strict=True):
        assert domain.starts.tolist() == whole.starts[np.arange(6) * 7 // 6].tolist()
    part = part_of(fitted, 2 * LENGTH * 3, 5)
    assert (counts(part), part.seq_length) == ([2, 2], LENGTH)
    assert windows_of(fitted).tokens_BS.shape == (8, LENGTH)
    runner = model.load("cpu", torch.float32)
    for each in (fitted, part):
        assert np.isfinite(evaluate(runner, each)["all"].loss)
    runner.run(windows_of(fitted))
    # Without groups, nothing is changed; with groups of one row, rows stay whole.
    assert in_whole_groups(sample, [planted(tmp_path, "olmoe")]) is sample
    one = in_whole_groups(sample, [grouped(tmp_path / "one", LENGTH)])
    assert counts(one) == counts(sample)
    assert part_of(one, 100, 5).seq_length == LENGTH


def test_several_models_read_the_same_rows(tmp_path: Path) -> None:
    models = [grouped(tmp_path / str(n), n * LENGTH) for n in (2, 3)]
    fitted = in_whole_groups(texts(tmp_path, rows=7, batch_size=7), models)
    assert (fitted.group_rows, counts(fitted)) == (6, [6, 6])


def test_what_is_less_than_a_group_is_an_error(tmp_path: Path) -> None:
    model = grouped(tmp_path / "model", 4 * LENGTH)
    with pytest.raises(UsageError, match="--batch-size must be >= 4, the rows of a capacity group"):
        in_whole_groups(texts(tmp_path, rows=5, batch_size=3), [model])
    (tmp_path / "few").mkdir()
    with pytest.raises(UsageError, match="rows of d0 must be >= 4, a capacity group"):
        in_whole_groups(texts(tmp_path / "few", rows=3, batch_size=4), [model])


def test_analyses_of_a_model_with_groups_of_two_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An odd number of rows and of rows per batch."""
    grouped(tmp_path / "model", 2 * LENGTH)
    texts(tmp_path, rows=7)
    data = " ".join(f"{name}={tmp_path / 'data' / name}" for name in ("d0", "d1"))
    keys = "misrouting expert-ablation super-experts drops"
    words = f"--load {tmp_path / 'model'} --data {data} --seq-length {LENGTH} --analyses {keys}"
    main(f"{words} --batch-size 3 --draws 5 --out {tmp_path / 'out'}".split())
    assert len(list((tmp_path / "out").glob("model@7/*/result.json"))) == 4
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(f"{words} --batch-size 1 --out {tmp_path / 'none'}".split())
    assert end.value.code == 2
    assert "--batch-size must be >= 2, the rows of a capacity group" in capsys.readouterr().err
    assert not list(tmp_path.glob("none/*/*"))
