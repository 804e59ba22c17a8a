"""Settings that a run takes from the checkpoint of `--load` instead of from its command line.

The tokenizer, if no flag names one: a checkpoint stores its files. With `--use-checkpoint-args` (a
flag of Megatron-LM) also the settings of the model, its vocabulary and its precision, so that the
command line for training a converted checkpoint does not repeat them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_moe.checkpoint.directory import (
    has_checkpoint,
    read_manifest,
    revisions,
    step_directory,
    verify_files,
)
from megatron_moe.checkpoint.disk import read_json
from megatron_moe.checkpoint.metadata import CONFIG, STATE
from megatron_moe.checkpoint.select import FIXES
from megatron_moe.config import CheckpointConfig, DataConfig, RunConfig
from megatron_moe.errors import CheckpointError, UsageError, with_fixes
from megatron_moe.tokenizer.files import NAMES, PAIR_TYPE, TYPES, files_of, settings_for

VOCABULARY = (
    *("vocab_size", "vocab_extra_ids", "make_vocab_size_divisible_by", "padded_vocab_size"),
    *("vocab_file", "merge_file"),
)
"""Settings of `DataConfig` that go with a tokenizer or the rows of the embedding."""
_WITHOUT_TOKENIZER = DataConfig().tokenizer_type


@dataclass(frozen=True, kw_only=True)
class SavedSettings:
    """What one step of a checkpoint says about the run that saved it."""

    path: Path
    """Directory of the step."""
    config: RunConfig
    """The settings; those of the tokenizer name the files of this step, if it has any."""
    tokenizer_hash: str
    """Empty if the tokenizer is unknown, as that of a converted checkpoint may be."""


@with_fixes(FIXES)
def read_settings(settings: CheckpointConfig) -> SavedSettings | None:
    """The settings saved in the checkpoint that a run loads; None if it starts from step 0.

    Reads no tensor and no index. Each rank reads for itself, as it reads its tokenizer.

    Raises:
        UsageError: there is no checkpoint, or the files to read are damaged.
    """
    if settings.load is None:
        return None
    if settings.allow_missing_load and not has_checkpoint(settings.load):
        return None
    path = _step(settings)
    records = read_manifest(path)
    stored = [name for name in NAMES if name in records]
    verify_files(path, records, [name for name in (CONFIG, STATE, *stored) if name in records])
    config = RunConfig.load(path / CONFIG)
    files = tuple(path / name for name in stored)
    if not files and config.data.tokenizer_model is not None:
        files = files_of(Path(config.data.tokenizer_model))
    data = settings_for(config.data, files)
    identity = read_json(path / STATE).get("metadata")
    found = identity.get("tokenizer_hash") if isinstance(identity, dict) else None
    return SavedSettings(
        path=path,
        config=replace(config, data=data or config.data),
        tokenizer_hash=str(found or ""),
    )


def _step(settings: CheckpointConfig) -> Path:
    """The directory of the step; with a fallback and without a tracker, of the newest one."""
    directory = Path(str(settings.load))
    try:
        return step_directory(directory, settings.ckpt_step)[1]
    except CheckpointError:
        found = revisions(directory)
        if not settings.checkpoint_fallback or not found:
            raise
        return found[max(found)][-1]


def with_checkpoint_args(base: RunConfig, given: RunConfig) -> RunConfig | None:
    """The settings that other flags start from, with those of the model from the checkpoint.

    None if there is no checkpoint, and none is needed.

    Args:
        base: of `--preset`, `--config`, or the defaults.
        given: the same with the flags of the command line that name checkpoint and tokenizer.

    Raises:
        UsageError: there must be a checkpoint, or the files to read are damaged, or the tokenizer
            is neither recorded nor given.
    """
    if given.checkpoint.load is None:
        raise UsageError("--use-checkpoint-args", True, "used with --load")
    saved = read_settings(given.checkpoint)
    if saved is None:
        return None
    if not saved.tokenizer_hash and _is_unnamed(given.data):
        raise _no_tokenizer(saved)
    config = saved.config
    names = ("tokenizer_type", "tokenizer_model", *VOCABULARY)
    data = replace(base.data, **{name: getattr(config.data, name) for name in names})
    train = replace(base.train, bf16=config.train.bf16)
    return replace(base, model=config.model, moe=config.moe, data=data, train=train)


def _is_unnamed(data: DataConfig) -> bool:
    """Whether the command line says nothing about a tokenizer."""
    return data.tokenizer_type == _WITHOUT_TOKENIZER and data.vocab_size is None


def _no_tokenizer(saved: SavedSettings) -> UsageError:
    expected = f"given with --tokenizer-type: {saved.path} stores no such tokenizer"
    return UsageError("--tokenizer-model", None, expected)


def with_checkpoint_tokenizer(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with the tokenizer of the checkpoint, if the command line names none.

    Returns:
        The configuration, and a line for the log if the tokenizer is the checkpoint's.

    Raises:
        UsageError: the files to read are damaged, or the checkpoint stores no tokenizer.
    """
    data = config.data
    unnamed = _is_unnamed(data)
    with_file = (*TYPES.values(), PAIR_TYPE)
    files = (data.tokenizer_model, data.vocab_file, data.merge_file)
    without_file = data.tokenizer_type in with_file and files == (None, None, None)
    if not unnamed and not without_file:
        return config, []
    saved = read_settings(config.checkpoint)
    if saved is None:
        return config, []
    theirs = saved.config.data
    other_type = without_file and theirs.tokenizer_type != data.tokenizer_type
    if other_type or not saved.tokenizer_hash:
        raise _no_tokenizer(saved)
    plain = {known.name: known.default for known in fields(DataConfig)}
    ours = {name: getattr(data, name) for name in VOCABULARY}
    kept = {name: value for name, value in ours.items() if value != plain[name]}
    values = {name: getattr(theirs, name) for name in VOCABULARY} | kept
    data = replace(
        data,
        tokenizer_type=theirs.tokenizer_type,
        tokenizer_model=theirs.tokenizer_model,
        **values,
    )
    named = theirs.tokenizer_model or theirs.vocab_file or theirs.tokenizer_type
    return replace(config, data=data), [f" tokenizer of the checkpoint: {named}"]
