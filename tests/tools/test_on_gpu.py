"""Generation and evaluation on a GPU: the same results as on a CPU, and nothing left behind there.

Where there is no GPU the device is an emulated one, which has a GPU's refusals (`emulated_gpu`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.inference.loading import LoadOptions, load
from megatron_moe.inference.scoring import ScoringRequest, score
from tests.inference.cases import save
from tests.support.emulated_gpu import emulated_gpu
from tools import evaluate, generate

DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
GREEDY = ("--json", "--temperature", "0", "--max-new-tokens", "12")
TOKENS = ("--tokenizer-type", "ByteTokenizer")
PROMPTS = ("--prompt", "abcd", "--prompt", "xy", "--prompt", "some more of it")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {layout: save(folder / layout, layout=layout) for layout in ("native", "hf")}


def on(device: str) -> AbstractContextManager[None]:
    return emulated_gpu() if device == "emulated" else nullcontext()


def _generated(capsys: pytest.CaptureFixture[str], flags: Sequence[str]) -> list[Any]:
    generate.main([*flags])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["native", "hf"])
@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        (*GREEDY, "--no-kv-cache"),
        (*GREEDY, "--no-kv-cache", "--moe-capacity", "eval"),
        (*GREEDY, "--show-routing"),
        ("--json", "--temperature", "1.5", "--top-p", "0.9", "--max-new-tokens", "12"),
        (*GREEDY[:-1], "2", "--chat"),
    ],
    ids=["cached", "uncached", "capacity", "routing", "sampled", "chat"],
)
def test_texts_are_those_of_the_cpu(
    capsys: pytest.CaptureFixture[str],
    checkpoints: dict[str, Path],
    device: str,
    layout: str,
    how: tuple[str, ...],
) -> None:
    flags = ["--load", str(checkpoints[layout]), *TOKENS, *PROMPTS, *how]
    expected = _generated(capsys, flags)
    with on(device):
        found = _generated(capsys, [*flags, "--device", "cuda"])
    assert found == expected
    assert len(found) == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", ["dropless", "eval"])
def test_losses_are_those_of_the_cpu(
    capsys: pytest.CaptureFixture[str],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    device: str,
    capacity: str,
) -> None:
    prefix = str(tmp_path / "data")
    with IndexedWriter(prefix, 259) as writer:
        for length in (50, 7, 90):
            writer.add_document([*(70 + 3 * i % 50 for i in range(length)), 1])
    flags = ["--load", str(checkpoints["native"]), "--data-path", prefix, "--json"]
    flags += ["--moe-capacity", capacity]

    def results() -> list[Any]:
        found: list[Any] = json.loads(capsys.readouterr().out)["results"]
        return found

    evaluate.main(flags)
    expected = results()
    with on(device):
        evaluate.main([*flags, "--device", "cuda"])
    for mine, theirs in zip(results(), expected, strict=True):
        assert mine["tokens"] == theirs["tokens"] == 150
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_probabilities_of_answers_are_those_of_the_cpu(
    checkpoints: dict[str, Path], device: str
) -> None:
    """What lm-eval asks for."""
    wanted = LoadOptions(path=checkpoints["native"])
    rows = [
        ScoringRequest([70, 71, 72, 73], 2),
        ScoringRequest([90, 80], 1),
        ScoringRequest([33, 34, 35, 36, 37], 4),
    ]
    expected = score(load(wanted), rows, batch_size=2)
    with on(device):
        found = score(load(replace(wanted, device="cuda")), rows, batch_size=2)
    for (mine, greedy), (theirs, same) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert torch.equal(greedy, same)
