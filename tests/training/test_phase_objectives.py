"""UL2, then a causal language model, then chat tuning: OpenMoE's curriculum in a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.tokenizer.build import build_tokenizer
from tests.support.pool import Pool
from tests.training.phase_tables import steps_of
from tests.training.tiny import MODEL, pretrain_rank

TABLE = """
[[stage]]
name = "ul2"
until-iteration = 4
objective = "ul2"
ul2-fill-rows = true

[[stage]]
name = "causal"
until-iteration = 8
reset-position-ids = true
reset-attention-mask = true
eod-mask-loss = true

[[stage]]
name = "chat"
objective = "sft"
data-path = ["{chat}"]
seq-length = 64
micro-batch-size = 1
global-batch-size = 2
lr = 1e-3
lr-decay-style = "constant"
hidden-dropout = 0.05
attention-dropout = 0.05
"""
_LINE = (
    "--tokenizer-type ByteTokenizer --vocab-extra-ids 60 --vocab-size 384 "
    "--seq-length 128 --split 80,20,0 --eval-iters 1 --train-iters 12"
)
FLAGS = [*MODEL, *_LINE.split()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, conversations and the table."""
    folder = tmp_path_factory.mktemp("written")
    tokenizer = build_tokenizer(DataConfig(tokenizer_type="ByteTokenizer"))
    with IndexedWriter(str(folder / "text"), tokenizer.vocab_size) as writer:
        for number in range(200):
            ids = tokenizer.tokenize(f"document {number}: " + "some words " * (number % 9 + 1))
            writer.add_document([*ids, tokenizer.eod])
    with (folder / "chat.jsonl").open("w") as file:
        for number in range(60):
            asked = {"role": "user", "content": f"What is {number} + 1?"}
            answer = {"role": "assistant", "content": f"{number + 1}."}
            file.write(json.dumps([asked, answer]) + "\n")
    (folder / "stages.toml").write_text(TABLE.format(chat=folder / "chat.jsonl"))
    return folder


def _run(pool: Pool, world: int, written: Path, directory: Path, flags: list[str]) -> str:
    directory.mkdir(exist_ok=True)
    argv = [*FLAGS, "--data-path", str(written / "text"), "--save", str(directory), *flags]
    argv += ["--stages", str(written / "stages.toml")]
    argv += ["--metrics-file", str(directory / "metrics.jsonl")]
    results = pool.run(pretrain_rank, world, argv=argv)
    for code, _, error in results:
        assert code == 0, error
    return results[0][1]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(1, ["--num-workers", "2"], marks=pytest.mark.slow),
        pytest.param(2, ["--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow),
        (2, ["--expert-model-parallel-size", "2", "--micro-batch-size", "1"]),
    ],
    ids=["one process", "PP2", "EP2"],
)
def test_each_switch_is_bitwise_resumable(world, layout, written, pool, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = _run(pool, world, written, whole, layout)
    for start in range(4):
        load = ["--load", str(parts)] if start else []
        _run(pool, world, written, parts, [*layout, *load, "--exit-interval", "3"])
    steps = steps_of(whole)
    assert steps_of(parts) == steps
    for file in (whole / "iter_0000012").glob("*.safetensors"):
        assert (parts / "iter_0000012" / file.name).read_bytes() == file.read_bytes()
    # Targets alone, all but ends of documents, answers alone: "n + 1." and its end.
    per_row = [step["targets"] / step["batch_size"] for step in steps]
    assert all(0 < count < 128 for count in per_row[:4])
    assert all(118 < count < 128 for count in per_row[4:8])
    assert all(0 < count < 20 for count in per_row[8:])
    assert " phase chat: --objective was causal, is sft" in log
    held_out = [line for line in log.splitlines() if line.startswith(" validation at")]
    assert [int(line.split()[3]) for line in held_out] == [4, 8, 12]
