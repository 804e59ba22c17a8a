"""Progress bars: on a terminal they reach the end, elsewhere nothing is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_moe.data.progress import progress_bar
from tests.data.corpus import write
from tools import inspect_data, make_demo_corpus, merge_datasets, preprocess_data, train_tokenizer

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "merge": (merge_datasets.main, "--input {0}/a {0}/b --output-prefix {0}/c"),
    "verify": (inspect_data.main, "{0}/a --verify"),
    "compare": (inspect_data.main, "{0}/a --compare {0}/b"),
    "train": (
        train_tokenizer.main,
        "--input {0}/x.jsonl --output {0}/t.model --vocab-size 287 --megabytes 0.5",
    ),
    "preprocess": (
        preprocess_data.main,
        "--input {0}/x.jsonl --output-prefix {0}/y --tokenizer-type ByteTokenizer",
    ),
    "demo": (make_demo_corpus.main, "--output-dir {0}/demo --megabytes 0.1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        write(str(tmp_path / name), [[1, 2, 3], [4, 5]])
    lines = (f'{{"text": "some words, number {n}, and more of them"}}\n' for n in range(2000))
    (tmp_path / "x.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_long_command_tells_how_far_it_is(
    name: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main, words = COMMANDS[name]
    if name == "demo":
        monkeypatch.setattr(make_demo_corpus, "LEFT_OUT", {"site-packages", *_other_folders()})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(words.format(folder).split())
    last = capsys.readouterr().err.rstrip("\n").split("\r")[-1]
    assert last.startswith("100%|"), last
    assert "<00:00" in last, "the time that remains"


def _other_folders() -> list[str]:
    """Of the standard library, so that only its top level is read."""
    import email

    library = Path(email.__file__).parents[1]
    return [path.name for path in library.iterdir() if path.is_dir() and path.name != "json"]


def test_nothing_is_printed_into_a_pipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("merge", "verify", "train"):
        main, words = COMMANDS[name]
        main(words.format(folder).split())
    assert capsys.readouterr().err == ""
    with progress_bar(3, "B", shown=True) as bar:
        bar.update(3)
    assert "100%" in capsys.readouterr().err
