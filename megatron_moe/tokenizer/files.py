"""The files of a tokenizer, as they lie beside weights: their names, and which tokenizer they are.

A SentencePiece model is one file. A Hugging Face tokenizer is `tokenizer.json` and, beside it,
files that name its special tokens. GPT-2's is the pair `vocab.json` and `merges.txt`. A checkpoint
keeps them under these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.files import check_regular_file, describe_start, is_lfs_pointer, read_small

TYPES = {
    "tokenizer.model": "SentencePieceTokenizer",
    "spiece.model": "SentencePieceTokenizer",
    "sentencepiece.bpe.model": "SentencePieceTokenizer",
    "tokenizer.json": "HuggingFaceTokenizer",
}
"""Tokenizer type by file name, in the order in which they are tried."""
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Files that belong to a tokenizer without being one."""
NAMES = (*TYPES, *COMPANIONS)
PAIR_TYPE, VOCAB, MERGES = "GPT2BPETokenizer", "vocab.json", "merges.txt"
"""Type and names of the tokenizer in two files."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_model(path: str, file: Path, expected: str) -> bytes:
    """The content of a tokenizer's file.

    Args:
        path: as given by `--tokenizer-model`, for messages.
        file: the file, which may lie in the folder that was given.
        expected: what it should be, for messages.

    Raises:
        UsageError: there is no such file, or by its first bytes it is something else.
    """
    check_regular_file(file, "--tokenizer-model")
    try:
        content = read_small(file)
    except OSError as error:
        reason = _missing(path, file) or str(error)
        raise UsageError("--tokenizer-model", path, "a readable file", reason) from None
    if not content or is_lfs_pointer(content):
        raise UsageError("--tokenizer-model", path, expected, describe_start(content))
    return content


def _missing(path: str, file: Path) -> str:
    """Why a file cannot be read, where there is more to say than the system does."""
    folder = file.parent if file != Path(path) else file
    if folder.is_dir():
        names = sorted(found.name for found in folder.iterdir())
        if {"vocab.json", "merges.txt"} <= set(names):
            return (
                "the folder has GPT-2's vocab.json and merges.txt but no tokenizer.json; make one, "
                "for --tokenizer-type HuggingFaceTokenizer, with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW) of transformers"
            )
        found = [name for name in names if name in TYPES]
        has = f"has {', '.join(found)}" if found else "has no tokenizer file"
        return f"it is a folder that {has}"
    if _HUB_NAME.fullmatch(path) and not Path(path).parent.exists():
        return (
            "it looks like a name on the Hugging Face hub, and nothing is downloaded; download the "
            f"model's tokenizer files (hf download {path}) and give their path"
        )
    return ""


def files_in(directory: Path) -> tuple[Path, ...]:
    """The tokenizer files of a directory."""
    return tuple(directory / name for name in NAMES if (directory / name).is_file())


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `--tokenizer-model` means: one file, or those of a folder.

    The files that name the special tokens of a `tokenizer.json` lie beside it.
    """
    if path.is_dir():
        return files_in(path)
    if not path.is_file():
        return ()
    if path.suffix != ".json":
        return (path,)
    return (path, *(beside for beside in files_in(path.parent) if beside.name in COMPANIONS))


def stored_name(file: Path) -> str:
    """The name under which a checkpoint keeps a file: `umt5.model` becomes `tokenizer.model`."""
    if file.name in NAMES:
        return file.name
    return "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"


def type_of(path: Path) -> str:
    """The tokenizer type of a file or folder, by names alone; it need not exist."""
    if path.is_dir():
        found = next((kind for kind, _ in candidates(files_in(path))), None)
        return found or "HuggingFaceTokenizer"
    return TYPES.get(stored_name(path), "HuggingFaceTokenizer")


def candidates(files: Iterable[Path], recorded: str = "") -> Iterator[tuple[str, Path]]:
    """Tokenizer type and path of each file that may be a tokenizer, in order of preference.

    Args:
        files: files of one folder.
        recorded: type of the tokenizer, where it is known. Tokenizers that split text in other ways
            than GPT-2's also have its pair of files, so the pair counts only if this names it; its
            path is that of `vocab.json`.
    """
    by_name = {stored_name(file): file for file in files}
    if recorded == PAIR_TYPE and VOCAB in by_name and MERGES in by_name:
        yield PAIR_TYPE, by_name[VOCAB]
    yield from ((kind, by_name[name]) for name, kind in TYPES.items() if name in by_name)


def with_file(data: DataConfig, file: Path) -> DataConfig:
    """Settings whose tokenizer is read from a file of `candidates`."""
    if data.tokenizer_type == PAIR_TYPE:
        merges = str(file.with_name(MERGES))
        return replace(data, tokenizer_model=None, vocab_file=str(file), merge_file=merges)
    return replace(data, tokenizer_model=str(file), vocab_file=None, merge_file=None)


def settings_for(data: DataConfig, files: Iterable[Path]) -> DataConfig | None:
    """Settings that take the tokenizer of a checkpoint from its files; None if it is not there.

    Args:
        data: settings of the run that saved the checkpoint, with the type of its tokenizer.
        files: the tokenizer files of the checkpoint.
    """
    known = data.tokenizer_type
    file = next((file for kind, file in candidates(files, known) if kind == known), None)
    return None if file is None else with_file(data, file)
