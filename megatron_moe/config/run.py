"""A whole run's configuration: one value, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
            UsageError: a section or field of ``source`` is not one of ours.
        """
        sections: dict[str, Any] = {}
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name, content in values.items():
            if name not in known:
                raise UsageError(f"section of {source}", name, f"one of {', '.join(known)}")
            section = type(getattr(cls(), name))
            names = {f.name for f in dataclasses.fields(section)}
            for key in content:
                if key not in names:
                    raise UsageError(f"setting {name} of {source}", key, f"one of {sorted(names)}")
            fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            sections[name] = section(**fixed)
        return cls(**sections)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a configuration file: a run's `config.json`, or the same part of one."""
        try:
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise UsageError("--config", str(path), "a readable file", str(error)) from None
        except json.JSONDecodeError as error:
            raise UsageError("--config", str(path), "a JSON file", str(error)) from None
        if not isinstance(values, dict):
            raise UsageError("--config", str(path), "a JSON object of sections")
        return cls.from_dict(values, str(path))

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
