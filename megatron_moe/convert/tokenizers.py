"""The tokenizer of a converted model: found beside the weights or given, checked, and recorded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_moe.config import DataConfig
from megatron_moe.convert.model import LogicalModel
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer, vocabulary_of
from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size
from megatron_moe.tokenizer.files import candidates, files_of, with_file

FLAG = "--tokenizer-model"
_WITHOUT_FILE = ("ByteTokenizer", "NullTokenizer")
"""Tokenizer types that need no file."""


def with_tokenizer(model: LogicalModel, given: Path | None) -> tuple[LogicalModel, list[str]]:
    """Record the tokenizer of a model: its files, its hash, and settings that fit its vocabulary.

    Args:
        model: the model, with the tokenizer files that lie beside its weights.
        given: a tokenizer file or folder to take instead.

    Returns:
        The model, with no tokenizer file that cannot be used, and lines that say which tokenizer
        it has, or why it has none.

    Raises:
        UsageError: the tokenizer that was given cannot be used with this model.
    """
    files = model.tokenizer_files if given is None else files_of(given)
    data = model.config.data
    if given is not None and not list(candidates(files, data.tokenizer_type)):
        raise UsageError(FLAG, str(given), "an existing tokenizer file, or a folder with one")
    reasons: list[str] = []
    errors: list[UsageError] = []
    for kind, file in candidates(files, data.tokenizer_type):
        if given is None and model.tokenizer_hash and kind != data.tokenizer_type:
            continue  # beside the one that is known
        try:
            chosen = _settings(data, kind, file)
            tokenizer = _checked(model, chosen, kind == data.tokenizer_type)
        except UsageError as error:
            errors.append(error)
            reasons.append(f"tokenizer {file} is not used: {error}")
            continue
        chosen = _with_vocabulary(chosen, tokenizer, model.vocab_size)
        config = replace(model.config, data=chosen)
        found = replace(
            model,
            config=config,
            tokenizer_hash=vocabulary_of(tokenizer.identity),
            tokenizer_files=_usable(model, files, file),
        )
        return found, [*reasons, f"tokenizer: {kind} {file}, {tokenizer.vocab_size} ids"]
    if given is not None:
        raise errors[0]
    if model.tokenizer_hash and data.tokenizer_type in _WITHOUT_FILE:
        return model, [f"tokenizer: {data.tokenizer_type}, which has no file"]
    where = "none beside the weights" if not reasons else "none that can be used"
    missing = f"no tokenizer: {where}; {FLAG} FILE stores one with the result"
    if not model.tokenizer_hash:  # else the settings of the run that knew it still fit
        data = _with_vocabulary(data, None, model.vocab_size)
    kept = () if reasons else model.tokenizer_files
    without = replace(model, config=replace(model.config, data=data), tokenizer_files=kept)
    return without, [*reasons, missing]


def _settings(data: DataConfig, kind: Any, file: Path) -> DataConfig:
    """The settings with another tokenizer; the vocabulary of another type does not count."""
    if kind != data.tokenizer_type:
        data = replace(data, tokenizer_type=kind, vocab_size=None)
    return with_file(data, file)


def _usable(model: LogicalModel, files: Iterable[Path], chosen: Path) -> tuple[Path, ...]:
    """The file that was chosen, its companions, and other tokenizers that can be read as well.

    Folders of Llama have the same tokenizer in two formats, and programs read either of them. A
    file that cannot be read would make a program fail that prefers it.
    """
    files = tuple(files)
    rejected: set[Path] = set()
    for kind, file in candidates(files):
        if file != chosen:
            try:
                _checked(model, _settings(model.config.data, kind, file), comparable=False)
            except UsageError:
                rejected.add(file)
    return tuple(file for file in files if file not in rejected)


def _checked(model: LogicalModel, data: DataConfig, comparable: bool) -> Tokenizer:
    """The tokenizer of the settings.

    Args:
        model: the model.
        data: settings with the tokenizer.
        comparable: whether the recorded hash, if any, is that of a tokenizer of this type.
    """
    tokenizer = build_tokenizer(replace(data, vocab_size=None))
    recorded = model.tokenizer_hash
    if comparable and recorded and recorded != vocabulary_of(tokenizer.identity):
        expected = f"the tokenizer of the checkpoint ({recorded[:12]}...)"
        raise UsageError(FLAG, data.tokenizer_model, expected)
    size = tokenizer.vocab_size + data.vocab_extra_ids
    if size > model.vocab_size:
        expected = f"a tokenizer of <= {model.vocab_size} ids, the vocabulary of {model.source}"
        raise UsageError(FLAG, data.tokenizer_model, expected, f"it has {size}")
    return tokenizer


def _with_vocabulary(data: DataConfig, tokenizer: Tokenizer | None, rows: int) -> DataConfig:
    """Settings under which a run has exactly the rows of the embedding that the model has."""
    if tokenizer is not None and padded_vocab_size(data, tokenizer) == rows:
        return data
    return replace(data, vocab_size=None, padded_vocab_size=rows)
