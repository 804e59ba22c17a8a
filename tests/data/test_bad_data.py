"""Faults of whole runs: builders that die, corpora that change, files of garbage."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe.config import DataConfig
from megatron_moe.data.blend import blends_of
from megatron_moe.data.named_mixture import read_named_mixture
from megatron_moe.data.objectives.chat import read_line
from megatron_moe.data.objectives.denoiser import OPENMOE, read_denoisers
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.simple import NullTokenizer
from tests.data.corpus import random_documents, write
from tests.data.objectives.runs import data_of, rows
from tests.data.test_named_mixture import GOOD
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank, write_corpus

FORK = multiprocessing.get_context("fork")


def read_all(prefix: str, out: Path) -> None:
    """What a rank does at its start, and the rows that it then gets."""
    found = rows(data_of(prefix, split="8,2,0", domain_eval_iters=1).train)
    (out / str(os.getpid())).write_text(json.dumps(found))


def test_ranks_open_one_corpus_at_once_after_one_was_killed(tmp_path: Path) -> None:
    """The first dies while it builds; the others build once, and read what one alone reads."""
    prefix, out = write(tmp_path / "x", random_documents(30_000, longest=9)), tmp_path / "out"
    out.mkdir()
    cache = tmp_path / "cache"
    first = FORK.Process(target=read_all, args=(prefix, out))
    first.start()
    while first.is_alive() and not list(cache.glob("*.partial-*")):
        time.sleep(0.0005)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert len(list(cache.glob("*.partial-*"))) == 1, "it died while it built"
    others = [FORK.Process(target=read_all, args=(prefix, out)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join(timeout=60)
    assert [process.exitcode for process in others] == [0] * 3
    alone = rows(data_of(prefix, split="8,2,0", data_cache_path=str(tmp_path / "new")).train)
    for path in out.iterdir():
        assert [tuple(row) for row in json.loads(path.read_text())] == alone
    assert len(list(out.iterdir())) == 3


def test_a_corpus_replaced_at_its_path_stops_a_resume(pool: Pool, tmp_path: Path) -> None:
    prefix, save = write_corpus(tmp_path / "x"), str(tmp_path / "save")
    argv = [*MODEL, "--train-iters", "4", "--split", "1,0,0", "--data-path", prefix]
    argv += ["--save", save, "--exit-interval", "2"]
    ((code, _, mistake),) = pool.run(pretrain_rank, 1, argv=argv)
    assert (code, mistake) == (0, "")
    # of the same sizes, so that nothing but the content tells
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(content[-2:] + content[:-2])
    results = pool.run(pretrain_rank, 2, argv=[*argv, "--load", save])
    (code, out, mistake), (other_code, _, other_mistake) = results
    assert (code, mistake) == (other_code, other_mistake)
    assert code == 2
    *differences, last = mistake.splitlines()
    assert differences == [f"{prefix}: it has other content than in the checkpoint"]
    assert f"checkpoint {save}/iter_0000002 must be compatible with" in last
    assert "(got '1 differences')" in last
    assert " iteration 3/4" not in out


def fuzz(good: bytes, read: Callable[[bytes], object], times: int = 300) -> int:
    """Damage ``good`` in many ways; how often it was refused, always in one line."""
    draw, refusals = random.Random(0), list[str]()
    for _ in range(times):
        content = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.choice(b'\0\n"[]{}=.-9e\xff\xe2,')
        if draw.random() < 0.3:
            content = content[: draw.randrange(len(content))]
        try:
            read(bytes(content))
        except UsageError as error:
            refusals.append(str(error))
    assert not [line for line in refusals if "\n" in line]
    return len(refusals)


def test_fuzzed_mixtures(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"

    def named(content: bytes) -> None:
        path.write_bytes(content)
        found = read_named_mixture(str(path), None)
        assert len(found.prefixes) == len(found.weights) == len(found.domains) > 0
        assert min(found.weights) > 0

    def denoisers(content: bytes) -> None:
        path.write_bytes(content)
        assert read_denoisers(str(path))

    assert fuzz(GOOD.encode(), named) > 100
    assert fuzz(OPENMOE.read_bytes(), denoisers) > 100


def test_fuzzed_words_and_conversations(tmp_path: Path) -> None:
    path = tmp_path / "words"

    def words(content: bytes) -> None:
        path.write_bytes(content)
        blends_of(DataConfig(data_args_path=str(path)))

    def talk(content: bytes) -> None:
        read_line(content, "messages", "line 1 of x")

    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    assert fuzz(b"0.3 data/a 0.7 data/b\n", words) > 50
    assert fuzz(json.dumps({"messages": turns}).encode(), talk) > 100


@pytest.mark.parametrize("objective", ["causal", "prefix-lm", "ul2"])
def test_documents_of_no_and_of_one_token(tmp_path: Path, objective: str) -> None:
    """Hardly any text in many documents: rows are made of it over and over, and of nothing else."""
    documents = [[]] * 5 + [[7]] * 3 + [[]] * 2 + [[8]] + [[]] * 3
    prefix, ids = write(tmp_path / "x", documents), {7, 8}
    settings = {"vocab_extra_ids": 20, "ul2_mixture": str(tmp_path / "m.toml"), "seq_length": 32}
    (tmp_path / "m.toml").write_text(
        '[[denoiser]]\nprefix = "9"\nmean_span = 3\nrate = 0.15\nweight = 1\n'
    )
    found = rows(data_of(prefix, objective=objective, **settings).train)
    assert len(found) == 40
    tokenizer = NullTokenizer(1000 - 20)
    special = {9, tokenizer.eod, 0, *range(980, 1000)} if objective == "ul2" else set()
    text = list[int]()
    for tokens, labels, _ in found:
        assert set(tokens) | set(labels) <= ids | special
        text += [token for token in tokens if token in ids]
    assert 0.23 < text.count(8) / len(text) < 0.27, "one of four"
