"""The command line of a run, generated from the configuration dataclasses.

Every field of every section is a flag, named as the field with hyphens (underscores are accepted
too). Values come from, weakest first: the dataclass defaults, `--preset NAME` or `--config FILE`,
the other flags. Nothing here imports torch, so help and errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import tyro

from megatron_moe.config.presets import PRESETS
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UsageError, exit_on_usage_error

DescribeFormat = Literal["text", "json"]


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """Where the settings start from, and whether to train or only to describe."""

    preset: str | None = None
    """Start from a published model: openmoe-tiny, openmoe-base-16e, openmoe-8b-32e or
    openmoe-34b-32e, or one of these with `-released`."""
    config: str | None = None
    """Start from the `config.json` of a saved run."""
    describe: DescribeFormat | None = None
    """Print the resolved configuration, parameters and FLOPs, and end; no launcher needed. The
    value may be left out and is then `text`."""
    world_size: int | None = None
    """Ranks to describe; `None` takes the launcher's, or the fewest that the layout needs. Training
    always takes the launcher's."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for."""

    config: RunConfig
    describe: DescribeFormat | None = None
    world_size: int | None = None
    """As given; `None` if the flag was not used."""


def parse_args(
    argv: Sequence[str] | None = None, prog: str = "pretrain_openmoe.py", examples: str = ""
) -> Command:
    """Read a command line.

    Args:
        argv: arguments without the program's name; `None` takes this process's.
        prog: name shown in the help.
        examples: printed before the help, which is long.

    Raises:
        UsageError: an unknown flag (names the closest one), a bad value, an unknown preset.
        SystemExit: `-h` or `--help`, after printing it, with code 0.
    """
    args = _complete_describe(list(sys.argv[1:] if argv is None else argv))
    if examples and {"-h", "--help"} & set(args):
        print(examples)
    options, unknown = _parse(args, _defaults(args), prog)
    if unknown:
        _refuse_unknown(unknown)
    if options.invocation.world_size is not None and options.invocation.describe is None:
        fix = "the launcher says how many ranks a run has"
        raise UsageError("--world-size", options.invocation.world_size, "--describe with it", fix)
    sections = {f.name: getattr(options, f.name) for f in dataclasses.fields(RunConfig)}
    return Command(
        config=RunConfig(**sections),
        describe=options.invocation.describe,
        world_size=options.invocation.world_size,
    )


def parse_or_exit(
    argv: Sequence[str] | None = None, prog: str = "pretrain_openmoe.py", examples: str = ""
) -> Command:
    """`parse_args`, with an error as one line on standard error and exit code 2."""
    with exit_on_usage_error(prog):
        return parse_args(argv, prog, examples)


def flag_of(name: str) -> str:
    """The flag of a field: `micro_batch_size` -> `--micro-batch-size`."""
    return "--" + name.replace("_", "-")


def all_flags() -> dict[str, Any]:
    """Every flag, `--no-` forms included, with the type of its value."""
    flags: dict[str, Any] = {}
    sections = [Invocation, *(type(getattr(RunConfig(), f.name)) for f in _sections())]
    for section in sections:
        for name, hint in typing.get_type_hints(section).items():
            flags[flag_of(name)] = hint
            if hint is bool:
                flags["--no-" + flag_of(name)[2:]] = hint
    return flags


def _sections() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(RunConfig)


def _options_type() -> type[Any]:
    """RunConfig with the invocation in front, for a help with one titled group per section."""
    hints = typing.get_type_hints(RunConfig)
    fields: list[Any] = [("invocation", Invocation, field(default_factory=Invocation))]
    fields += [(f.name, hints[f.name], field(default_factory=hints[f.name])) for f in _sections()]
    options = dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)
    options.__doc__ = "Pretrain an OpenMoE language model. Flag names are Megatron-LM's."
    return options


def _complete_describe(args: list[str]) -> list[str]:
    """`--describe` alone means `--describe text`."""
    completed: list[str] = []
    for index, arg in enumerate(args):
        completed.append(arg)
        following = args[index + 1 : index + 2]
        if arg == "--describe" and (not following or following[0].startswith("-")):
            completed.append("text")
    return completed


def _defaults(args: list[str]) -> RunConfig:
    """The configuration that the other flags start from."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    first.add_argument("--config", nargs="?")
    found, _ = first.parse_known_args(args)
    if found.preset and found.config:
        raise UsageError("--preset", found.preset, "no --config beside it", "give one of the two")
    if found.config:
        return RunConfig.load(found.config)
    if found.preset and found.preset not in PRESETS:
        raise UsageError("--preset", found.preset, f"one of {', '.join(PRESETS)}")
    return PRESETS[found.preset] if found.preset else RunConfig()


def _parse(args: list[str], defaults: RunConfig, prog: str) -> tuple[Any, list[str]]:
    """Let tyro parse, and turn its boxed errors into a `UsageError`."""
    kind = _options_type()
    default = kind(**{f.name: getattr(defaults, f.name) for f in _sections()})
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide_terminal(args):
            return tyro.cli(
                kind,
                args=args,
                default=default,
                prog=prog,
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        _refuse_value(errors.getvalue(), args)


@contextlib.contextmanager
def _wide_terminal(args: list[str]) -> typing.Iterator[None]:
    """Errors are read back from tyro's box, which must not break flags; help keeps its width."""
    if {"-h", "--help"} & set(args):
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


def _refuse_value(boxed: str, args: list[str]) -> NoReturn:
    """Say in one line which flag has which bad value."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    match = re.search(r"--[a-z][a-z0-9-]*", text)
    flag = match.group() if match else "the command line"
    hint = all_flags().get(flag)
    if hint is None:
        raise UsageError(flag, " ".join(args), "arguments as in --help")
    raise UsageError(flag, " ".join(_values_after(flag, args)), expected_of(hint))


def _values_after(flag: str, args: list[str]) -> list[str]:
    """What the user wrote after a flag, up to the next flag."""
    values: list[str] = []
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name.replace("_", "-") == flag:
            values = [value] if value else []
            for following in args[index + 1 :]:
                if following.startswith("--"):
                    break
                values.append(following)
    return values


def expected_of(hint: Any) -> str:
    """A type in words: `an integer`, `one of adam, sgd`."""
    if hint in _WORDS:
        return _WORDS[hint]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        return f"values, each {expected_of(arguments[0])}"
    return " or ".join(expected_of(argument) for argument in arguments)


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "no value (--flag or --no-flag)",
    type(None): "None",
}


def _refuse_unknown(unknown: list[str]) -> NoReturn:
    """Name the flag that the user probably meant."""
    first = next((arg for arg in unknown if arg.startswith("-")), unknown[0])
    if not first.startswith("-"):
        raise UsageError("argument", first, "a flag before every value", "see --help")
    name = first.partition("=")[0].replace("_", "-")
    close = difflib.get_close_matches(name, all_flags(), n=1, cutoff=0.0)
    raise UsageError("flag", name, f"a known flag, the closest is {close[0]}", "see --help")
