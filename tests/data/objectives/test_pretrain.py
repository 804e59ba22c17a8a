"""A short run of `pretrain_openmoe.py` with each objective, from flags to checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank, write_corpus

FLAGS = "--train-iters 4 --log-interval 2 --split 80,20,0 --eval-iters 1 --vocab-extra-ids 20"
MIXTURE = """
[[denoiser]]
prefix = "3"
mean_span = 3
rate = 0.15
weight = 0.5

[[denoiser]]
prefix = "4"
kind = "prefix-lm"
weight = 0.5
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("objective")
    (folder / "mixture.toml").write_text(MIXTURE)
    return write_corpus(folder / "x")


def losses(pool: Pool, argv: list[str], metrics: Path, ranks: int = 1) -> list[str]:
    """The exact loss of each step."""
    flags = [*argv, "--metrics-file", str(metrics)]
    results = pool.run(pretrain_rank, ranks, argv=flags)
    assert [(code, mistake) for code, _, mistake in results] == [(0, "")] * ranks
    assert " validation loss: " in results[0][1]
    return [json.loads(line)["lm_loss_hex"] for line in metrics.read_text().splitlines()]


def test_ul2_trains_saves_goes_on_and_fits_other_layouts(
    pool: Pool, corpus: str, tmp_path: Path
) -> None:
    argv = [*MODEL, *FLAGS.split(), "--vocab-size", "120", "--data-path", corpus]
    argv += ["--objective", "ul2", "--ul2-mixture", str(Path(corpus).parent / "mixture.toml")]
    whole = losses(pool, argv, tmp_path / "whole.jsonl")
    assert len(whole) == 4
    assert all(2.0 < float.fromhex(loss) < 8.0 for loss in whole)
    saving = [*argv, "--save", str(tmp_path / "ckpt"), "--exit-interval", "2"]
    ((code, _, mistake),) = pool.run(pretrain_rank, 1, argv=saving)
    assert (code, mistake) == (0, "")
    rest = losses(pool, [*argv, "--load", str(tmp_path / "ckpt")], tmp_path / "rest.jsonl")
    assert rest == whole[2:]
    stages = [*argv, "--pipeline-model-parallel-size", "2"]
    for layout, flags in (("stages", stages), ("copies", argv)):
        found = losses(pool, flags, tmp_path / f"{layout}.jsonl", ranks=2)
        pairs = zip(found, whole, strict=True)
        assert all(abs(float.fromhex(a) - float.fromhex(b)) < 1e-4 for a, b in pairs)


def test_released_rows_train_alike_in_every_layout(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """Padding set to zero and a start token; the second of three stages reads padding, too."""
    argv = [*MODEL, *FLAGS.split(), "--vocab-size", "120", "--data-path", corpus]
    argv += ["--objective", "ul2", "--ul2-mixture", str(Path(corpus).parent / "mixture.toml")]
    argv += ["--num-layers", "3", "--moe-layer-freq", "[1,0,1]"]
    started = [*argv, "--decoder-start-token-id", "0"]
    flags = [*started, "--zero-padding-activations", "--no-moe-ignore-padding-tokens"]
    whole = losses(pool, flags, tmp_path / "whole.jsonl")
    found = losses(
        pool, [*flags, "--pipeline-model-parallel-size", "3"], tmp_path / "stages.jsonl", ranks=3
    )
    pairs = zip(found, whole, strict=True)
    assert all(abs(float.fromhex(a) - float.fromhex(b)) < 1e-4 for a, b in pairs)
    others = [losses(pool, each, tmp_path / "other.jsonl")[0] for each in (argv, started)]
    assert len({whole[0], *others}) == 3


def test_prefix_lm_trains(pool: Pool, corpus: str, tmp_path: Path) -> None:
    argv = [*MODEL, *FLAGS.split(), "--vocab-size", "120", "--data-path", corpus]
    argv += ["--objective", "prefix-lm", "--eod-mask-loss"]
    assert len(losses(pool, argv, tmp_path / "metrics.jsonl")) == 4


def test_sft_learns_its_answers(pool: Pool, tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]
        for i in range(50)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    argv = [*MODEL, *FLAGS.split(), "--objective", "sft", "--data-path", str(path)]
    argv += ["--tokenizer-type", "ByteTokenizer", "--vocab-size", "279", "--train-iters", "40"]
    found = [float.fromhex(loss) for loss in losses(pool, argv, tmp_path / "metrics.jsonl")]
    assert len(found) == 40
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
