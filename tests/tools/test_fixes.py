"""Errors about directories: each command advises only what it has itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.cli import all_flags
from megatron_moe.convert.formats import ConversionTarget, write
from tests.checkpoint.test_foreign import damage
from tests.convert.cases import model_of
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank, write_corpus
from tools import convert_checkpoint, evaluate, generate, inspect_checkpoint

CONVERTER = "tools/convert_checkpoint.py"
CASES = (
    "missing",
    "empty",
    "full",
    "step",
    "damaged",
    "no step",
    "hf",
    "hf damaged",
    "t5x damaged",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory for each case."""
    folder = tmp_path_factory.mktemp("cases")
    found = {name: folder / name.replace(" ", "-") / "given" for name in CASES}
    for name in ("empty", "full"):
        found[name].mkdir(parents=True)
    (found["full"] / "notes.txt").touch()
    for name in ("step", "damaged", "no step"):
        write(model_of(), ConversionTarget(format="native", path=found[name]), lambda _: None)
    damage(found["damaged"] / "iter_0000005" / "rank-00000.safetensors")
    found["step"] /= "iter_0000005"
    for name, kind in (("hf", "hf"), ("hf damaged", "hf"), ("t5x damaged", "t5x")):
        write(model_of(), ConversionTarget(format=kind, path=found[name]), lambda _: None)
    (found["hf damaged"] / "model.safetensors").write_bytes(b"cut")
    shutil.rmtree(found["t5x damaged"] / "target.token_embedder.embedding")
    return found


def _help(main: Callable[[list[str]], Any], capsys: pytest.CaptureFixture[str]) -> set[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


def _failed(main: Callable[[list[str]], Any], words: list[str]) -> int:
    try:
        return int(main(words))
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize("case", CASES)
def test_every_flag_of_an_error_is_the_command_s(
    directories: dict[str, Path],
    case: str,
    pool: Pool,
    corpus: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = str(directories[case])
    step = ["--ckpt-step", "7"] if case == "no step" else []
    convert = ["--to", "native", "--save", f"{load}-new", "--load", load, "--from"]
    commands: list[tuple[Callable[[list[str]], Any], list[str]]] = [
        (generate.main, ["--load", load, "--format", "native", "--prompt", "a", *step]),
        (evaluate.main, ["--load", load, "--format", "native", "--data-path", "none", *step]),
        (inspect_checkpoint.main, [load, "--verify", *step]),
        (convert_checkpoint.main, [*convert, "native", *step]),
    ]
    if case.startswith(("hf damaged", "t5x")):
        preset = ["--preset", "openmoe-tiny-released"] if case.startswith("t5x") else []
        commands.append((convert_checkpoint.main, [*convert, case.split()[0], *preset]))
    for main, words in commands:
        known = _help(main, capsys)
        assert _failed(main, words) in (1, 2), words
        said = capsys.readouterr().err
        _check(said, known, case)
    argv = [
        *MODEL,
        "--data-path",
        corpus,
        "--train-iters",
        "1",
        "--lr-warmup-iters",
        "0",
        "--load",
        load,
        *step,
    ]
    ((code, _, said),) = pool.run(pretrain_rank, 1, argv=argv)
    assert code == 2
    _check(said, set(all_flags()), case)


def _check(said: str, known: set[str], case: str) -> None:
    """The flags of an error are those of the command, but for those of a converter's line."""
    own, _, _ = said.partition(CONVERTER)
    assert set(re.findall(r"--[a-z][a-z0-9-]*", own)) <= known, said
    assert "given" in said, "the directory is named"
    assert ("an empty directory" in said) == (case == "empty"), said
