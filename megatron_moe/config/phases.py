"""The phases of a run (`--phases FILE`): which settings change during training, and when.

    [[stage]]
    name = "ul2"
    until-iteration = 390000       # or until-samples, until-tokens: from the start of the run
    objective = "ul2"              # a flag without its dashes, and its value

    [[stage]]
    name = "chat"                  # the last phase may be open: it ends with --train-iters
    objective = "sft"
    data-path = ["chat.jsonl"]
    lr = 1e-3

A phase has the settings of the command line, with its own instead where it has them; it inherits
nothing from the phase before it. See `docs/recipe.md`. The lengths of phases in steps depend on the
layout: `megatron_moe/training/phases.py`. The file and `config.json` keep the words of the format's
first release, `stage` and `stages`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_moe.config.run import RunConfig, all_fields
from megatron_moe.config.training import DataConfig, ObjectiveConfig
from megatron_moe.errors import UsageError
from megatron_moe.text import read_text, toml_value

FLAG = "--phases"

Unit = Literal["iteration", "samples", "tokens"]
Origin = Literal["run", "stage"]

_ENDS: dict[str, Unit] = {
    "until_iteration": "iteration",
    "until_samples": "samples",
    "until_tokens": "tokens",
}
_OWN = ("name", *_ENDS, "lr_from")
"""Keys of a phase that are not flags."""
RATES = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_warmup_iters",
    "lr_warmup_init",
    "lr_warmup_fraction",
    "lr_decay_samples",
    "lr_warmup_samples",
    "lr_wsd_decay_samples",
)
"""Settings of the learning rate."""
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
_VOCABULARY = (*_TOKENIZER, "vocab_size", "vocab_extra_ids", "padded_vocab_size")
_FIXED_DATA = (*_VOCABULARY, "allow_special_tokens", "make_vocab_size_divisible_by")
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
    **dict.fromkeys((*RATES, "clip_grad", "weight_decay"), "optimizer"),
}
"""Fields that a phase can set, and the section of the configuration that each belongs to."""


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """A phase as the file has it."""

    name: str
    file: str
    """Path of the file, for messages."""
    unit: Unit | None
    """Unit of its end; `None` for an open end."""
    until: int
    """Its end, counted from the start of the run."""
    settings: dict[str, Any]
    """Values by field of the configuration."""
    lr_from: Origin
    """Whether the learning rate counts steps from the start of the run, or of the phase (`stage` in
    the file)."""

    @property
    def label(self) -> str:
        """Name and file, for messages."""
        return f"phase {self.name!r} of {self.file}"

    def applied(self, config: RunConfig) -> RunConfig:
        """The command line's configuration with this phase's settings; its length is not set.

        A phase that names data uses none of the command line's: two ways of naming data exclude
        each other. A phase whose learning rate counts from its own start uses no warmup or decay
        of the command line: those count steps of the run.
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
                "lr_warmup_fraction": None,
                "lr_decay_samples": None,
                "lr_warmup_samples": 0,
                "lr_wsd_decay_samples": None,
            }
        for name, value in self.settings.items():
            sections.setdefault(SETTINGS[name], {})[name] = value
        changed = {name: replace(getattr(config, name), **own) for name, own in sections.items()}
        return replace(config, **changed)


def read_phases(path: str) -> tuple[PhaseSpec, ...]:
    """Read a file of phases and check all that does not depend on the rest of the run.

    Raises:
        UsageError: the file cannot be read or is not TOML; a key is unknown (names the closest one)
            or can only be set for the whole run; a value is of another type; a phase has no name,
            or has no end and is not the last.
    """
    try:
        content = toml_value(read_text(path, FLAG, "a readable TOML file"))
    except ValueError as error:
        raise UsageError(FLAG, path, "a TOML file", str(error)) from None
    tables = content.get("stage")
    if set(content) != {"stage"} or not isinstance(tables, list) or not tables:
        raise UsageError(f"content of {path}", sorted(content), "one or more [[stage]] tables")
    specs = tuple(_phase(table, number, path) for number, table in enumerate(tables, 1))
    names = [spec.name for spec in specs]
    for spec in specs[:-1]:
        if spec.unit is None:
            expected = "until-iteration, until-samples or until-tokens"
            raise UsageError(f"end of {spec.label}", None, expected, "only the last may be open")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"name of each phase in {path}", twice, "unique")
    return specs


@contextlib.contextmanager
def errors_of_phase(label: str) -> Iterator[None]:
    """Name the phase in every `UsageError` raised inside; an empty label changes nothing."""
    try:
        yield
    except UsageError as error:
        if not label:
            raise
        what = f"{label}: {error.what}"
        raise UsageError(what, error.found, error.expected, error.fix) from None


def place_of(phase: str, names: Sequence[str]) -> int:
    """The index of a phase, from 0, by its name or its number from 1.

    Raises:
        UsageError: there is no such phase.
    """
    places = {str(place + 1): place for place in range(len(names))}
    places |= {name: place for place, name in enumerate(names)}
    if phase not in places:
        expected = f"one of {', '.join(names)}, or a number from 1 to {len(names)}"
        raise UsageError("--phase", phase, expected)
    return places[phase]


def _phase(table: Any, number: int, path: str) -> PhaseSpec:
    where = f"phase {number} of {path}"
    if not isinstance(table, dict):
        raise UsageError(where, table, "a [[stage]] table")
    name = table.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"name of {where}", name, "a text")
    where = f"phase {name!r} of {path}"
    values = _by_field(table, where)
    unit, until = _end(values, where)
    settings = {key: value for key, value in values.items() if key not in _OWN}
    rates = any(key in RATES for key in settings)
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
    """Values by field, all of which a phase can set."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        field = key.replace("-", "_")
        if field in values:
            raise UsageError(f"key of {where}", key, "given once")
        if field not in SETTINGS and field not in _OWN:
            _reject_key(key, field, where)
        values[field] = value
    return values


def _reject_key(key: str, field: str, where: str) -> None:
    flags = {name: known.flag for known in all_fields().values() for name in known.keys}
    if field in flags:
        expected = "a setting that can change during a run"
        fix = f"set {flags[field]} on the command line, for the whole run"
        raise UsageError(f"key of {where}", key, expected, fix)
    close = difflib.get_close_matches(field, [*SETTINGS, *_OWN], n=1, cutoff=0.0)
    expected = f"a known key, the closest is {close[0].replace('_', '-')}"
    raise UsageError(f"key of {where}", key, expected)


def _end(values: dict[str, Any], where: str) -> tuple[Unit | None, int]:
    given = [key for key in _ENDS if key in values]
    if len(given) > 1:
        found = " and ".join(key.replace("_", "-") for key in given)
        raise UsageError(f"end of {where}", found, "one of them")
    if not given:
        return None, 0
    until = values[given[0]]
    if type(until) is not int or until < 1:
        what = f"{given[0].replace('_', '-')} of {where}"
        raise UsageError(what, until, "a whole number >= 1")
    return _ENDS[given[0]], until


def _typed(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings with their values as the fields hold them.

    Raises:
        UsageError: a value is of another type.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name.endswith("data_path") and isinstance(value, list):
            # TOML has numbers, so a weight may be one; the command line has words only.
            value = [repr(word) if type(word) in (int, float) else word for word in value]
        section = SETTINGS[name]
        config = RunConfig.from_dict({section: {name: value}}, where)
        found[name] = getattr(getattr(config, section), name)
    return found
