"""The command line: where values come from, and what a usage error looks like."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import all_flags, parse_args, parse_or_exit
from megatron_moe.config.presets import PRESETS
from megatron_moe.errors import UsageError
from tests.support.usage_errors import usage_error


def test_no_arguments_give_the_dataclass_defaults():
    command = parse_args([])
    assert command.config == RunConfig()
    assert command.describe is None
    assert command.world_size is None


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_taken_whole(name):
    assert parse_args(["--preset", name]).config == PRESETS[name]


def test_flags_override_a_preset_and_only_their_field():
    config = parse_args(["--lr", "0.5", "--preset", "openmoe-8b-32e", "--num-experts", "64"]).config
    preset = PRESETS["openmoe-8b-32e"]
    assert config == dataclasses.replace(
        preset,
        optimizer=dataclasses.replace(preset.optimizer, lr=0.5),
        moe=dataclasses.replace(preset.moe, num_experts=64),
    )


def test_hyphens_underscores_and_equals_signs_are_one():
    spellings = (["--micro-batch-size", "7"], ["--micro_batch_size", "7"], ["--micro_batch_size=7"])
    assert [parse_args(args).config.train.micro_batch_size for args in spellings] == [7, 7, 7]


def test_values_of_every_kind():
    line = (
        "--data-path 0.3 a 0.7 b --no-mmap-bin-files --sequence-parallel "
        "--moe-expert-capacity-factor None --recompute-modules mlp moe"
    )
    config = parse_args(line.split()).config
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.data.mmap_bin_files is False
    assert config.parallel.sequence_parallel is True
    assert config.moe.moe_expert_capacity_factor is None
    assert config.parallel.recompute_modules == ("mlp", "moe")


def test_a_saved_configuration_comes_back_and_can_be_overridden(tmp_path: Path):
    saved = parse_args(["--preset", "openmoe-tiny", "--data-path", "x", "--lr", "0.25"]).config
    file = tmp_path / "config.json"
    saved.save(file)
    assert parse_args(["--config", str(file)]).config == saved
    changed = parse_args(["--config", str(file), "--seed", "9"]).config
    assert changed == dataclasses.replace(saved, train=dataclasses.replace(saved.train, seed=9))


def test_settings_of_a_checkpoint_are_where_other_flags_start():
    """The reader gets what names the checkpoint and the tokenizer, and no other flag."""
    seen = []

    def inherit(base: RunConfig, given: RunConfig) -> RunConfig:
        seen.append(given)
        assert base.optimizer == PRESETS["openmoe-tiny"].optimizer
        return dataclasses.replace(base, model=dataclasses.replace(base.model, hidden_size=96))

    line = "--load ck --ckpt_step=7 --preset openmoe-tiny --use-checkpoint-args --num-layers 3"
    config = parse_args(line.split(), inherit=inherit).config
    assert (config.model.hidden_size, config.model.num_layers) == (96, 3)
    (given,) = seen
    assert (given.checkpoint.load, given.checkpoint.ckpt_step) == ("ck", 7)
    assert given.model == PRESETS["openmoe-tiny"].model
    off = [*line.split(), "--no-use-checkpoint-args"]
    assert parse_args(off, inherit=inherit).config.model.hidden_size != 96
    with pytest.raises(UsageError, match="--use-checkpoint-args must be absent for this command"):
        parse_args(line.split())


@pytest.mark.parametrize(
    ("args", "described"),
    [
        (["--describe"], "text"),
        (["--describe", "--preset", "openmoe-tiny"], "text"),
        (["--describe", "json"], "json"),
        (["--describe=json", "--world-size", "8"], "json"),
    ],
)
def test_describe_with_and_without_a_value(args, described):
    assert parse_args(args).describe == described


USAGE_ERRORS = {
    "--hidden-sizes 12": ("--hidden-sizes", "--hidden-size"),
    "--expert-parallel-size 2": ("--expert-parallel-size", "--expert-model-parallel-size"),
    "--micro_batchsize=2": ("--micro-batchsize", "--micro-batch-size"),
    "--no-sequence-paralel": ("--no-sequence-paralel", "--no-sequence-parallel"),
    "--hidden-size twelve": ("--hidden-size", "twelve", "an integer"),
    "--hidden-size 1.5": ("--hidden-size", "1.5", "an integer"),
    "--lr fast": ("--lr", "fast", "a number"),
    "--optimizer foo": ("--optimizer", "foo", "adam, sgd"),
    "--recompute-modules mlp foo": ("--recompute-modules", "foo", "core_attn, mlp, moe"),
    "--moe-min-capacity": ("--moe-min-capacity", "an integer"),
    "--hidden-size 3 4": ("argument must be preceded by a flag", "'4'"),
    "--describe xml": ("--describe", "xml", "text, json"),
    "--preset openmoe-9b": ("--preset", "openmoe-9b", "openmoe-8b-32e"),
    "--preset openmoe-tiny --config c.json": (
        "--preset",
        "used without --config",
        "give one of the two",
    ),
    "--world-size 3": ("--world-size must be used with --describe (got 3)",),
    "--config /nowhere.json": ("--config", "/nowhere.json", "a readable file"),
}


@pytest.mark.parametrize("line", list(USAGE_ERRORS))
def test_a_usage_error_is_one_line_that_names_it_and_exits_with_2(line, capsys):
    error = usage_error(parse_or_exit, line.split(), capsys)
    for expected in USAGE_ERRORS[line]:
        assert expected in error


@pytest.mark.parametrize("width", ["20", "200"])
def test_the_line_does_not_depend_on_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(UsageError) as error:
        parse_args(["--moe-shared-expert-intermediate-size", "wide"])
    assert error.value.what == "--moe-shared-expert-intermediate-size"
    assert error.value.found == "wide"
    assert error.value.expected == "an integer or None"


def test_a_saved_configuration_with_an_unknown_setting_is_rejected(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model": {"hiden_size": 3}}))
    with pytest.raises(UsageError, match="hiden_size"):
        parse_args(["--config", str(file)])


def test_help_names_every_flag_and_imports_neither_torch_nor_megatron_core():
    program = (
        "import sys\n"
        "from megatron_moe.config.cli import parse_args\n"
        "try:\n    parse_args(['--help'])\n"
        "except SystemExit as e:\n    code = e.code\n"
        "print([m for m in ('torch', 'megatron') if m in sys.modules], code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
    missing = [flag for flag in all_flags() if flag not in done.stdout]
    assert missing == []
    assert len(all_flags()) > 100
