"""The stage table (`--stages FILE`): what changes in the middle of a run, and when.

    [[stage]]
    name = "ul2"
    until-iteration = 390000       # or until-samples, until-tokens: since the start of the run
    objective = "ul2"              # flags without their dashes, for what the command line may say

    [[stage]]
    name = "chat"                  # the last stage may be open: it ends with --train-iters
    objective = "sft"
    data-path = ["chat.jsonl"]
    lr = 1e-3

A stage is the command line with its own settings on top; it takes none of the stage before it. See
`docs/recipe.md`. What needs the layout (lengths in steps) is in `megatron_moe/training/phases.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_moe.config.objective import ObjectiveConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import DataConfig
from megatron_moe.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLAG = "--stages"

Unit = Literal["iteration", "samples", "tokens"]
Origin = Literal["run", "stage"]

_ENDS: dict[str, Unit] = {
    "until_iteration": "iteration",
    "until_samples": "samples",
    "until_tokens": "tokens",
}
_OWN = ("name", *_ENDS, "lr_from")
"""Keys of a stage that are no flags."""
_RATES = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_init",
)
_VOCABULARY = ("tokenizer_type", "tokenizer_model", "vocab_size", "vocab_extra_ids")
_FIXED_DATA = (*_VOCABULARY, "make_vocab_size_divisible_by")
_SOURCES = (
    "data_path",
    "data_args_path",
    "mixture",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
)


def _names(section: type) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


SETTINGS: dict[str, str] = {
    **dict.fromkeys(_names(ObjectiveConfig), "objective"),
    **{name: "data" for name in _names(DataConfig) if name not in _FIXED_DATA},
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), "model"),
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "rampup_batch_size"), "train"),
    **dict.fromkeys(("eval_interval", "eval_iters", "domain_eval_iters", "seed"), "train"),
    **dict.fromkeys((*_RATES, "clip_grad", "weight_decay"), "optimizer"),
}
"""What a stage can set, with the section of the configuration that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """A stage as the table has it."""

    name: str
    file: str
    """Of the table, for messages."""
    unit: Unit | None
    """What its end is counted in; `None` for an open end."""
    until: int
    """Its end, since the start of the run."""
    settings: dict[str, Any]
    """By field of the configuration."""
    lr_from: Origin
    """Whether learning rates count steps of the run, or of the stage."""

    @property
    def label(self) -> str:
        """For messages."""
        return f"stage {self.name!r} of {self.file}"

    def applied(self, config: RunConfig) -> RunConfig:
        """The command line's configuration with this stage's settings; its length is not set.

        A stage that names data takes none of the command line's. One whose learning rate counts
        from its own start takes no numbers of steps from there (warm-up, decay).
        """
        sections: dict[str, dict[str, Any]] = {"data": {}, "optimizer": {}}
        if any(name in self.settings for name in _SOURCES):
            default = DataConfig()
            sections["data"] = {name: getattr(default, name) for name in _SOURCES}
            if "mixture" not in self.settings:
                sections["data"]["data_root"] = None
        if self.lr_from == "stage":
            sections["optimizer"] = {
                "lr_warmup_iters": 0,
                "lr_warmup_init": 0.0,
                "lr_decay_iters": None,
                "lr_wsd_decay_iters": None,
            }
        for name, value in self.settings.items():
            sections.setdefault(SETTINGS[name], {})[name] = value
        changed = {name: replace(getattr(config, name), **own) for name, own in sections.items()}
        return replace(config, **changed)


def read_phases(path: str) -> tuple[PhaseSpec, ...]:
    """Read a stage table and check everything that does not depend on the rest of the run.

    Raises:
        UsageError: the file cannot be read or is no TOML; a key that is unknown (names the closest
            one) or the same for the whole run; a value of another type; a stage without a name, or
            without an end that is not the last.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(FLAG, path, "a readable TOML file", str(error)) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(FLAG, path, "a TOML file", str(error)) from None
    tables = content.get("stage")
    if set(content) != {"stage"} or not isinstance(tables, list) or not tables:
        raise UsageError(f"content of {path}", sorted(content), "one or more [[stage]] tables")
    stages = tuple(_stage(table, number, path) for number, table in enumerate(tables, 1))
    names = [stage.name for stage in stages]
    for stage in stages[:-1]:
        if stage.unit is None:
            expected = "until-iteration, until-samples or until-tokens"
            raise UsageError(f"end of {stage.label}", None, expected, "only the last may be open")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"name in {path}", twice, "another name for each stage")
    return stages


def place_of(stage: str, names: Sequence[str]) -> int:
    """The place of a stage, from 0, by its name or its number from 1.

    Raises:
        UsageError: there is no such stage.
    """
    places = {str(place + 1): place for place in range(len(names))}
    places |= {name: place for place, name in enumerate(names)}
    if stage not in places:
        expected = f"one of {', '.join(names)}, or a number from 1 to {len(names)}"
        raise UsageError("--stage", stage, expected)
    return places[stage]


def _stage(table: Any, number: int, path: str) -> PhaseSpec:
    if not isinstance(table, dict):
        raise UsageError(f"stage {number} of {path}", table, "a [[stage]] table")
    where = f"stage {number} of {path}"
    name = table.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"name of {where}", name, "a text")
    where = f"stage {name!r} of {path}"
    values = _by_field(table, where)
    unit, until = _end(values, where)
    settings = {key: value for key, value in values.items() if key not in _OWN}
    rates = any(key in _RATES for key in settings)
    lr_from = values.get("lr_from", "stage" if rates else "run")
    if lr_from not in ("run", "stage"):
        raise UsageError(f"lr-from of {where}", lr_from, "run or stage")
    return PhaseSpec(
        name=name,
        file=path,
        unit=unit,
        until=until,
        settings=_typed(settings, where),
        lr_from=lr_from,
    )


def _by_field(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Values under the names of fields, all of which a stage can set."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        field = key.replace("-", "_")
        if field in values:
            raise UsageError(f"key of {where}", key, "each key once")
        if field not in SETTINGS and field not in _OWN:
            _refuse_key(key, field, where)
        values[field] = value
    return values


def _refuse_key(key: str, field: str, where: str) -> None:
    if any(hasattr(getattr(RunConfig(), s.name), field) for s in dataclasses.fields(RunConfig)):
        expected = "what can change during a run"
        fix = f"give --{field.replace('_', '-')} on the command line, for the whole run"
        raise UsageError(f"key of {where}", key, expected, fix)
    close = difflib.get_close_matches(field, [*SETTINGS, *_OWN], n=1, cutoff=0.0)
    expected = f"a known key, the closest is {close[0].replace('_', '-')}"
    raise UsageError(f"key of {where}", key, expected)


def _end(values: dict[str, Any], where: str) -> tuple[Unit | None, int]:
    given = [key for key in _ENDS if key in values]
    if len(given) > 1:
        named = " and ".join(key.replace("_", "-") for key in given)
        raise UsageError(f"end of {where}", named, "one of the two")
    if not given:
        return None, 0
    until = values[given[0]]
    if type(until) is not int or until < 1:
        expected = "a whole number, at least 1"
        raise UsageError(f"{given[0].replace('_', '-')} of {where}", until, expected)
    return _ENDS[given[0]], until


def _typed(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings with values as fields hold them.

    Raises:
        UsageError: one is of another type.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name.endswith("data_path") and isinstance(value, list):
            # Weights may be numbers: TOML has them, the command line has words.
            value = [repr(word) if type(word) in (int, float) else word for word in value]
        section = SETTINGS[name]
        config = RunConfig.from_dict({section: {name: value}}, where)
        found[name] = getattr(getattr(config, section), name)
    return found
