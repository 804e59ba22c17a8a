"""What the log and `--describe` say of training data, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moe.config import ObjectiveConfig
from megatron_moe.data.composition import described_shares, share_lines
from megatron_moe.data.pipeline import build_data
from megatron_moe.errors import UsageError
from tests.data.corpus import run_config, write

MIXTURE = """
[domains]
web = ""
code = ""

[[source]]
domain = "web"
prefix = "a"
weight = 3

[[source]]
domain = "code"
prefix = "b"
weight = 1
"""


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    write(tmp_path / "a", [[1] * 40] * 10)
    write(tmp_path / "b", [[2] * 100] * 10)
    (tmp_path / "own.toml").write_text(MIXTURE)
    return str(tmp_path / "own.toml")


def test_by_hand(mixture: str) -> None:
    """5 steps of 8 rows of 16 are 640 tokens: 480 of 320 in training, 160 of 800."""
    config = run_config(mixture=mixture, split="8,2,0")
    data = build_data(
        config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=4,
        consumed_train_samples=0,
        reads_data=False,
    )
    found = [(s.domain, s.weight, s.tokens, s.epochs) for s in data.shares]
    assert found == [("web", 0.75, 320, 1.5), ("code", 0.25, 800, 0.2)]
    assert described_shares(config, 8) == data.shares
    folder = Path(mixture).parent
    assert share_lines(data.shares) == [
        "domain   share  tokens  epochs  prefix",
        f"web     75.00%     320     1.5  {folder}/a",
        f"code    25.00%     800     0.2  {folder}/b",
    ]


def test_without_weights(mixture: str) -> None:
    folder = Path(mixture).parent
    shares = described_shares(run_config(f"{folder}/a", f"{folder}/b"), 8)
    # 399 // 16 and 999 // 16 samples an epoch
    assert [s.weight for s in shares] == [24 / 86, 62 / 86]
    assert [s.domain for s in shares] == ["a", "b"]
    (alone,) = described_shares(run_config(f"{folder}/a"), 8)
    assert (alone.weight, alone.tokens, alone.epochs) == (1.0, 400, 1.6)


def test_denoisers_use_up_more_text(mixture: str) -> None:
    config = run_config(
        mixture=mixture, tokenizer_type="ByteTokenizer", vocab_extra_ids=20, seq_length=64
    )
    config = replace(config, objective=ObjectiveConfig(objective="ul2", ul2_fill_rows=True))
    web, code = described_shares(config, 8)
    assert web.epochs is not None
    assert code.epochs is not None
    causal = 5 * 8 * 64 * 0.75 / 400
    assert 0.5 * causal < web.epochs < causal
    assert web.epochs / code.epochs == pytest.approx(7.5)


def test_data_that_is_not_there_yet(mixture: str) -> None:
    """May be described; a run refuses it, by name."""
    (Path(mixture).parent / "b.idx").unlink()
    config = run_config(mixture=mixture)
    web, code = described_shares(config, 8)
    assert (web.exists, code.exists, code.tokens, code.epochs) == (True, False, None, None)
    assert "no file" in share_lines((web, code))[2]
    with pytest.raises(
        UsageError, match=r"data path must be .*got '.*/b'.*No such file.*--data-root"
    ):
        build_data(
            config,
            dp_rank=0,
            dp_size=1,
            num_microbatches=4,
            consumed_train_samples=0,
            reads_data=False,
        )
    assert described_shares(run_config(), 8) == ()


def test_broken_data_is_not_described(mixture: str) -> None:
    (Path(mixture).parent / "b.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"size of .*b\.bin must be .*got 0"):
        described_shares(run_config(mixture=mixture), 8)
