"""`--help` of every command: at once, without torch, with examples that its own parser takes."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pretrain_openmoe
from megatron_moe.command_line import Parser
from megatron_moe.config import RunConfig, cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    path.relative_to(ROOT).as_posix(): f"tools.{path.stem}"
    for path in sorted((ROOT / "tools").glob("*.py"))
    if path.stem != "__init__"
} | {"pretrain_openmoe.py": "pretrain_openmoe"}
"""Path and module of each."""
WITH_TORCH = {"tools/convert_checkpoint.py", "tools/inspect_checkpoint.py"}
"""Those that import it before they know what is asked."""
ASK = """
import runpy, sys
path = sys.argv[1]
sys.argv = [path, "--help"]
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    print("exit", end.code)
print("torch", "torch" in sys.modules)
"""


class Parsed(Exception):
    """Raised in place of what the command would do."""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each command prints for `--help`."""

    def ask(path: str) -> str:
        environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
        found = subprocess.run(
            [sys.executable, "-c", ASK, path],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stderr == ""
        return found.stdout

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(ask, COMMANDS), strict=True))


def examples(path: str, text: str) -> list[list[str]]:
    """The words after the command's name in each of its examples."""
    joined = re.sub(r" \\\n\s*", " ", text)
    lines = (line.strip() for line in joined.splitlines())
    started = [line for line in lines if re.match(rf"(python|torchrun .*?) ?{path}( |$)", line)]
    return [shlex.split(line.partition(path)[2]) for line in started]


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parser raises `Parsed` where it would return; partial ones go on."""

    def stopping(parse: Any) -> Any:
        def parse_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
            parse(self, args, namespace)
            raise Parsed

        return parse_args

    def parse_run(argv: Sequence[str] | None = None, *_: Any, **__: Any) -> Any:
        read(argv)
        raise Parsed

    read = cli.parse_args
    for parser in (argparse.ArgumentParser, Parser):
        monkeypatch.setattr(parser, "parse_args", stopping(parser.parse_args))
    monkeypatch.setattr("tools.unigram_loss.parse_or_exit", parse_run)
    monkeypatch.setattr("pretrain_openmoe.parse_args", parse_run)
    monkeypatch.setattr("tools.plan_layout.parse_args", parse_run)
    monkeypatch.setattr("tools.check_environment.parse_args", parse_run)


@pytest.mark.parametrize("path", COMMANDS)
def test_help_comes_at_once_and_its_examples_parse(
    path: str, helps: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = helps[path]
    assert text.endswith(f"exit 0\ntorch {path in WITH_TORCH}\n"), text[-300:]
    found = examples(path, text)
    assert found, f"no line of {path} --help shows how it is used"
    module = importlib.import_module(COMMANDS[path])
    stop_after_parsing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "checkpoints"):
        (tmp_path / folder).mkdir()
        RunConfig().save(tmp_path / folder / "config.json")
    for words in found:
        with pytest.raises(Parsed):
            module.main(words)


def test_every_installed_command_is_one_of_these() -> None:
    text = (ROOT / "setup.py").read_text()
    installed = re.findall(r'"openmoe-[a-z-]+ = (?:megatron_moe_)?([a-z_.]+):main"', text)
    assert len(installed) >= 8
    assert set(installed) <= set(COMMANDS.values())


def test_an_example_with_a_wrong_flag_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "    python tools/merge_datasets.py --inptu a \\\n        --output-prefix b\n"
    (words,) = examples("tools/merge_datasets.py", text)
    assert words == ["--inptu", "a", "--output-prefix", "b"]
    stop_after_parsing(monkeypatch)
    with pytest.raises(SystemExit):
        importlib.import_module("tools.merge_datasets").main(words)
    assert pretrain_openmoe.__doc__ is not None
