"""A whole run's configuration: one value, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.objective import ObjectiveConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_moe.errors import UsageError

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    model: Annotated[ModelConfig, Flat] = field(default_factory=ModelConfig)
    moe: Annotated[MoEConfig, Flat] = field(default_factory=MoEConfig)
    parallel: Annotated[ParallelConfig, Flat] = field(default_factory=ParallelConfig)
    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    objective: Annotated[ObjectiveConfig, Flat] = field(default_factory=ObjectiveConfig)
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)
    optimizer: Annotated[OptimizerConfig, Flat] = field(default_factory=OptimizerConfig)
    checkpoint: Annotated[CheckpointConfig, Flat] = field(default_factory=CheckpointConfig)
    logging: Annotated[LoggingConfig, Flat] = field(default_factory=LoggingConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            UsageError: a section or field of ``source`` is not one of ours, or a value is of
                another type.
        """
        sections: dict[str, Any] = {}
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name, content in values.items():
            if name not in known:
                raise UsageError(f"section of {source}", name, f"one of {', '.join(known)}")
            if not isinstance(content, dict):
                raise UsageError(f"section {name} of {source}", content, "a JSON object")
            section = type(getattr(cls(), name))
            sections[name] = section(**_settings(section, content, f"{name} of {source}"))
        return cls(**sections)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a configuration file: a run's `config.json`, or the same part of one."""
        try:
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise UsageError("--config", str(path), "a readable file", str(error)) from None
        except (ValueError, RecursionError) as error:  # neither UTF-8, nor JSON, nor sane
            raise UsageError("--config", str(path), "a JSON file", str(error)) from None
        if not isinstance(values, dict):
            raise UsageError("--config", str(path), "a JSON object of sections")
        return cls.from_dict(values, str(path))

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def _settings(section: type, content: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a section, with the lists of JSON as tuples, each of its declared type."""
    hints = get_type_hints(section)
    fixed: dict[str, Any] = {}
    for key, value in content.items():
        if key not in hints:
            raise UsageError(f"setting {where}", key, f"one of {sorted(hints)}")
        fixed[key] = tuple(value) if isinstance(value, list) else value
        if not _fits(fixed[key], hints[key]):
            raise UsageError(f"{key} in {where}", value, _words(hints[key]))
    return fixed


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that our fields are declared with."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in inner
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        items = inner[:1] * len(value) if Ellipsis in inner else inner
        return len(items) == len(value) and all(map(_fits, value, items))
    if inner:
        return any(_fits(value, option) for option in inner)
    if hint is float:
        return type(value) in (int, float)
    # A bool is an int to Python, but not to a reader of a configuration.
    return type(value) is hint


def _words(hint: Any) -> str:
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(hint) is tuple:
        count = "" if Ellipsis in inner else f"{len(inner)} entries, "
        return f"a list, {count}each {_words(inner[0])}"
    if inner:
        return " or ".join(map(_words, inner))
    return {type(None): "null", str: "text", float: "a number", int: "a whole number"}.get(
        hint, "true or false"
    )
