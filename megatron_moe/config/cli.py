"""The command line of a run, generated from the configuration dataclasses.

Every field of every section is a flag: its name with hyphens, or as its metadata says. Underscores
are accepted as well. Values come from, in increasing order of precedence: the dataclass defaults,
`--preset NAME` or `--config FILE`, the other flags. Nothing here imports torch, so that help and
errors are immediate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import tyro

from megatron_moe.config import megatron_preset
from megatron_moe.config.fields import ConfigField, expected_of, fields_of, flag_named
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.run import RunConfig, all_fields
from megatron_moe.config.shorthand import Shorthands, expand
from megatron_moe.config.words import HELP, Translation, split, translate
from megatron_moe.errors import UsageError, exit_on_usage_error, raise_errors

DescribeFormat = Literal["text", "json"]


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What the settings are based on, and whether to train or only to describe."""

    preset: str | None = None
    """Start from a published model: openmoe-tiny, openmoe-base-16e, openmoe-8b-32e or
    openmoe-34b-32e, or one of these with `-released`. `megatron`: what a script of Megatron-LM
    leaves unsaid is as in Megatron-LM; it gives the sizes."""
    config: str | None = None
    """Start from the `config.json` of a saved run."""
    use_checkpoint_args: bool = False
    """Start from the model, the tokenizer and the precision of the checkpoint of `--load`; other
    settings are those of `--preset` or `--config`."""
    describe: DescribeFormat | None = None
    """Print the resolved configuration, parameters and FLOPs, and exit; needs no launcher. Without
    a value, `text`."""
    world_size: int | None = None
    """Ranks to describe; `None` means the launcher's, or the fewest that the layout needs. Training
    always runs on the launcher's."""


_OUTSIDE: dict[str, type[Any]] = {"invocation": Invocation, "shorthands": Shorthands}
"""Groups of flags that are no section of the run's configuration."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for."""

    config: RunConfig
    describe: DescribeFormat | None = None
    world_size: int | None = None
    """As given; `None` without the flag."""
    notes: tuple[str, ...] = ()
    """Lines for the log: what the flags of Megatron-LM mean here."""


InheritSettings = Callable[[RunConfig, RunConfig], RunConfig | None]
"""Replaces settings by those of a checkpoint, for `--use-checkpoint-args`; None without one."""


def parse_args(
    argv: Sequence[str] | None = None,
    prog: str = "pretrain_openmoe.py",
    examples: str = "",
    inherit: InheritSettings | None = None,
) -> Command:
    """Read a command line.

    Args:
        argv: arguments without the program's name; `None` takes this process's.
        prog: name shown in the help.
        examples: printed before the help, which is long.
        inherit: reads checkpoints, which this package cannot; without it `--use-checkpoint-args`
            is an error.

    Raises:
        UsageError: an unknown preset; or all unknown flags, flags of Megatron-LM that have no
            meaning here and values of another type, together. Ranges and rules between flags are
            checked by `validate`.
        SystemExit: `-h` or `--help`, after printing it, with code 0.
    """
    args = _complete_describe(list(sys.argv[1:] if argv is None else argv))
    if examples and set(HELP) & set(args):
        print(examples)
    translation = translate(split(args), all_flags())
    if translation.errors:  # all of them are reported; no checkpoint is read before
        inherit = _keep
    base, inherited = _defaults(list(translation.words), inherit)
    options, errors = _parse_all(translation.words, inherited or base, prog)
    flags = _flags_in([*args, *translation.words])
    by_megatron = options is not None and options.invocation.preset == megatron_preset.NAME
    has_model = inherited is not None
    errors += megatron_preset.missing(flags, has_model) if by_megatron else ()
    raise_errors([*translation.errors, *errors])
    if options.invocation.world_size is not None and options.invocation.describe is None:
        fix = "the launcher sets how many ranks a run has"
        given = options.invocation.world_size
        raise UsageError("--world-size", given, "used with --describe", fix)
    config = expand(options.shorthands, _config_of(options), _given(flags))
    return Command(
        config=megatron_preset.completed(config, flags, has_model) if by_megatron else config,
        describe=options.invocation.describe,
        world_size=options.invocation.world_size,
        notes=_notes(translation, flags),
    )


def parse_or_exit(
    argv: Sequence[str] | None = None, prog: str = "pretrain_openmoe.py", examples: str = ""
) -> Command:
    """`parse_args`, with an error as one line on standard error and exit code 2."""
    with exit_on_usage_error(prog):
        return parse_args(argv, prog, examples)


def all_flags() -> dict[str, Any]:
    """Every flag, `--no-` forms and accepted aliases included, with the type of its value."""
    flags: dict[str, Any] = {}
    for known in _all_known():
        for flag in known.flags:
            flags[flag] = known.type
            if known.type is bool:
                flags["--no-" + flag[2:]] = known.type
    return flags


@functools.cache
def _sections() -> dict[str, type[Any]]:
    """The groups of flags in the order of the help."""
    return _OUTSIDE | {name: type(section) for name, section in RunConfig().sections.items()}


def _names_given(args: list[str]) -> frozenset[str]:
    """Names of the fields that these words set; with `--help`, of all."""
    known = _all_known()
    if set(HELP) & set(args):
        return frozenset(field.name for field in known)
    flags = _flags_in(args)
    return frozenset(field.name for field in known if flags & set(field.flags))


@functools.lru_cache(maxsize=256)
def _options_type(names: frozenset[str]) -> type[Any]:
    """RunConfig with the invocation in front, for a help with one titled group per section.

    Args:
        names: fields to read. Tyro takes a millisecond for each, so a command line is read with
            those that it sets.
    """
    fields: list[Any] = []
    for name, section in _sections().items():
        described = _with_flags(section, names)
        fields.append((name, described, field(default_factory=described)))
    options = dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)
    options.__doc__ = "Pretrain an OpenMoE language model. Flag names are Megatron-LM's."
    return options


def _with_flags(section: type[Any], names: frozenset[str]) -> type[Any]:
    """Fields of a section that carry their flags and ranges in tyro's terms.

    With all of them a subclass, in which tyro finds the docstrings of the fields. A class of its
    own in any case: the sections do not depend on the library that parses the command line.
    """
    plain = {known.name: known for known in dataclasses.fields(section)}
    fields: list[Any] = [
        (known.name, _tyro_type(known), field(default=plain[known.name].default))
        for known in fields_of(section).values()
        if known.name in names
    ]
    bases = (section,) if len(fields) == len(fields_of(section)) else ()
    made = dataclasses.make_dataclass(
        section.__name__, fields, bases=bases, frozen=True, kw_only=True
    )
    made.__doc__ = section.__doc__
    return made


def _tyro_type(known: ConfigField) -> Any:
    """The type of a field with its documented flag, and its range as part of the metavariable."""
    # The flag named after the field is tyro's own choice; in the help it comes after its alias.
    options: dict[str, Any] = {"aliases": [known.flag]} if len(known.flags) > 1 else {}
    if known.range is not None:
        options["metavar"] = f"{_metavar(known.type)} {known.range}"
    return Annotated[known.type, tyro.conf.arg(**options)] if options else known.type


def _metavar(hint: Any) -> str:
    """As tyro writes it: `INT`, `{None}|FLOAT`, `{None}|{INT INT INT}`, `[INT [INT ...]]`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and Ellipsis in arguments:
        word = _metavar(arguments[0])
        return f"[{word} [{word} ...]]"
    if typing.get_origin(hint) is tuple:
        return "{" + " ".join(map(_metavar, arguments)) + "}"
    if arguments:
        return "|".join(sorted(map(_metavar, arguments), reverse=True))
    return "{None}" if hint is type(None) else hint.__name__.upper()


def _config_of(options: Any) -> RunConfig:
    """The sections of the parsed options."""
    return RunConfig(**{name: getattr(options, name) for name in RunConfig().sections})


def _completed(based_on: dict[str, Any], read: Any) -> SimpleNamespace:
    """All sections, with the values that were read in place of those that they are based on."""
    sections = {}
    for name, values in based_on.items():
        found = getattr(read, name)
        own = {part.name: getattr(found, part.name) for part in dataclasses.fields(found)}
        sections[name] = dataclasses.replace(values, **own)
    return SimpleNamespace(**sections)


def _complete_describe(args: list[str]) -> list[str]:
    """`--describe` alone means `--describe text`."""
    completed: list[str] = []
    for index, arg in enumerate(args):
        completed.append(arg)
        following = args[index + 1 : index + 2]
        if arg == "--describe" and (not following or following[0].startswith("-")):
            completed.append("text")
    return completed


def _keep(base: RunConfig, given: RunConfig) -> RunConfig:
    return base


def _defaults(
    args: list[str], inherit: InheritSettings | None
) -> tuple[RunConfig, RunConfig | None]:
    """The configuration that the other flags start from: without a checkpoint, and with its
    settings, if the command line asks for them and there is one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--config", nargs="?")
    found, _ = first.parse_known_args(args)
    base = _preset_or_file(found)
    groups = split(args)
    flag = flag_named("use_checkpoint_args")
    given = [group.flag for group in groups if group.flag in (flag, f"--no-{flag[2:]}")]
    if not given or given[-1] != flag:
        return base, None
    if inherit is None:
        raise UsageError(flag, True, "absent for this command")
    flags = {flag for name in _NAMES_OF_CHECKPOINT for flag in all_fields()[name].flags}
    flags |= {f"--no-{flag[2:]}" for flag in flags}
    words = [word for group in groups if group.flag in flags for word in group.words]
    options, _ = _parse(words, base, "")
    return base, inherit(base, _config_of(options))


_NAMES_OF_CHECKPOINT = (
    *("load", "ckpt_step", "allow_missing_load", "checkpoint_fallback"),
    *("tokenizer_type", "tokenizer_model", "vocab_size"),
)
"""Fields that say where the settings of `--use-checkpoint-args` come from, or replace them."""


def _preset_or_file(found: argparse.Namespace) -> RunConfig:
    if found.preset and found.config:
        raise UsageError("--preset", found.preset, "used without --config", "give one of the two")
    if found.config:
        return RunConfig.load(found.config)
    presets = {**PRESETS, megatron_preset.NAME: megatron_preset.DEFAULTS}
    if found.preset and found.preset not in presets:
        raise UsageError("--preset", found.preset, f"one of {', '.join(presets)}")
    return presets[found.preset] if found.preset else RunConfig()


def _parse_all(
    words: Sequence[str], defaults: RunConfig, prog: str
) -> tuple[Any, list[UsageError]]:
    """The options of all flags whose values fit, and an error for each of the others."""
    errors: list[UsageError] = []
    groups = split(words)
    while True:
        try:
            options, unknown = _parse([word for g in groups for word in g.words], defaults, prog)
        except UsageError as error:
            errors.append(error)
            known = _field_of(error.what)
            rest = [group for group in groups if known is None or group.flag not in known.flags]
            if known is None or len(rest) == len(groups):
                return None, errors
            groups = rest
            continue
        if unknown:
            fix = "see --help"
            errors.append(UsageError("argument", unknown[0], "preceded by a flag", fix))
        return options, errors


def _parse(args: list[str], defaults: RunConfig, prog: str) -> tuple[Any, list[str]]:
    """Let tyro parse, and turn its boxed errors into a `UsageError`."""
    names = _names_given(args)
    kind = _options_type(names)
    based_on: dict[str, Any] = {name: section() for name, section in _OUTSIDE.items()}
    based_on |= defaults.sections
    sections: dict[str, Any] = {}
    for part in dataclasses.fields(kind):
        values = based_on[part.name]
        own = {name: getattr(values, name) for name in fields_of(type(values)) if name in names}
        sections[part.name] = part.default_factory(**own)  # type: ignore[misc,call-arg,operator]
    # Tyro reads the documentation of fields from their sources, which takes longer than the rest.
    undocumented = () if set(HELP) & set(args) else (tyro.conf.HelptextFromCommentsOff,)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide_terminal(args):
            read, unknown = tyro.cli(
                kind,
                args=args,
                default=kind(**sections),
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes, *undocumented),
                return_unknown_args=True,
            )
            return _completed(based_on, read), unknown
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise _bad_value(errors.getvalue(), args)


@contextlib.contextmanager
def _wide_terminal(args: list[str]) -> typing.Iterator[None]:
    """Widen the terminal for errors: flags are read back from tyro's box, which must not wrap them.

    Help keeps the width of the terminal.
    """
    if set(HELP) & set(args):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _bad_value(boxed: str, args: list[str]) -> UsageError:
    """Name in one line the flag and its bad value."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    match = re.search(r"--[a-z][a-z0-9-]*", text)
    flag = match.group() if match else "the command line"
    known = _field_of(flag)
    if known is None:
        return UsageError(flag, " ".join(args), "arguments as in --help")
    given = [group for group in split(args) if group.flag in known.flags]
    return UsageError(known.flag, " ".join(given[-1].values), expected_of(known.type))


def _field_of(flag: str) -> ConfigField | None:
    """The field that a flag sets, whichever of its names is used."""
    return next((known for known in _all_known() if flag in known.flags), None)


def _all_known() -> list[ConfigField]:
    """Every field that a flag sets, those outside of the run's configuration first."""
    outside = [known for section in _OUTSIDE.values() for known in fields_of(section).values()]
    return [*outside, *all_fields().values()]


def _given(flags: set[str]) -> set[str]:
    """Names of the fields that flags of `_flags_in` set."""
    return {known.name for known in _all_known() if flags & set(known.flags)}


def _flags_in(words: Sequence[str]) -> set[str]:
    """The flags among words; `--flag` for `--no-flag` as well."""
    flags = {group.flag for group in split(words)}
    return flags | {"--" + flag[5:] for flag in flags if flag.startswith("--no-")}


def _notes(translation: Translation, flags: set[str]) -> tuple[str, ...]:
    """What the flags of Megatron-LM mean here, and what differs that none of them says."""
    parts = [f"{', '.join(given)} ({here})" for here, given in translation.accepted.items()]
    lines = [f" flags of Megatron-LM, and what runs here: {'; '.join(parts)}"] if parts else []
    short = {flag for known in fields_of(Shorthands).values() for flag in known.flags}
    if (parts or short & flags) and not {"--preset", "--config"} & flags:
        lines += megatron_preset.unsaid(flags)
    return tuple(lines)
