"""A whole run's configuration: one value, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from megatron_moe.config.fields import ConfigField, fields_of
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, moe_layer_pattern
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.precision import PrecisionConfig
from megatron_moe.config.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_moe.errors import UsageError
from megatron_moe.text import json_value, read_text


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def sections(self) -> dict[str, Any]:
        """The parts of the configuration by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based numbers of the MoE layers of the whole model."""
        pattern = moe_layer_pattern(self.moe.moe_layer_freq, self.model.num_layers)
        return tuple(number for number, is_moe in enumerate(pattern) if is_moe)

    def routing_lines(self) -> list[str]:
        """Settings of routing that mean something else than in Megatron-LM, for the log."""
        lines: list[str] = []
        if not self.moe_layers:
            return lines
        if "global_aux_loss" in self.moe.load_balancing_types:
            lines.append(
                "global_aux_loss does not depend on the data-parallel size, by which Megatron-LM's"
                " gradient is smaller: divide a --moe-aux-loss-coeff of Megatron-LM by it"
            )
        if self.moe.moe_ignore_padding_tokens and self.objective.has_padding:
            lines.append(
                "padding is not routed, unlike in Megatron-LM and in the published OpenMoE:"
                " --no-moe-ignore-padding-tokens routes it"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON.

        A field marked with `OmittedAtDefault` is left out while it has its default, one marked with
        `AbsentMeans` while it has that value, and so is a section of which nothing is left. The
        default is the section's, not a preset's: `from_dict` has no other value for an absent key.
        """
        values = dataclasses.asdict(self)
        for name, section in self.sections.items():
            default = type(section)()
            for key, known in fields_of(type(section)).items():
                value = getattr(section, key)
                if known.absent is not None:
                    omitted = value == known.absent.value
                else:
                    omitted = known.omitted_at_default and value == getattr(default, key)
                if omitted:
                    del values[name][key]
        return {name: content for name, content in values.items() if content}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            UsageError: ``source`` has an unknown section or field, a field twice (by its name and
                by that of its flag), or a value of another type.
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
        """Read a configuration file: a run's `config.json`, or some of its sections."""
        try:
            values = json_value(read_text(path, "--config", "a readable file"), finite=False)
        except ValueError as error:
            raise UsageError("--config", str(path), "a JSON file", str(error)) from None
        if not isinstance(values, dict):
            raise UsageError("--config", str(path), "a JSON object of sections")
        return cls.from_dict(values, str(path))

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


@functools.cache
def all_fields() -> dict[str, ConfigField]:
    """Every field of every section by name. No two sections have a field of the same name."""
    sections = RunConfig().sections.values()
    return {name: field for part in sections for name, field in fields_of(type(part)).items()}


def flag_of(name: str) -> str:
    """The documented flag of a field: `micro_batch_size` -> `--micro-batch-size`."""
    return all_fields()[name].flag


def _settings(section: type, content: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a section, with the lists of JSON as tuples, each of its declared type."""
    known = {key: field for field in fields_of(section).values() for key in field.keys}
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"setting {where}", key, f"one of {sorted(fields_of(section))}")
        field = known[key]
        if field.name in found:
            both = " and ".join(field.keys)
            raise UsageError(f"settings {both} of {where}", "both", "one", "they are the same")
        found[field.name] = tuple(value) if isinstance(value, list) else value
        if not _fits(found[field.name], field.type):
            raise UsageError(f"{key} in {where}", value, _expected(field.type))
    absent = {f.name: f.absent.value for f in known.values() if f.absent is not None}
    return absent | found


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


def _expected(hint: Any) -> str:
    """A type in the words of a configuration file: `a whole number or null`."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(hint) is tuple:
        count = "" if Ellipsis in inner else f"{len(inner)} entries, "
        return f"a list, {count}each {_expected(inner[0])}"
    if inner:
        return " or ".join(map(_expected, inner))
    return {type(None): "null", str: "text", float: "a number", int: "a whole number"}.get(
        hint, "true or false"
    )
