"""A file of phases: what it may contain, and how it is rejected, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moe.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron_moe.config.phases import read_phases
from megatron_moe.config.presets import PRESETS
from megatron_moe.errors import UsageError

TWO = """
[[stage]]
name = "one"
until-tokens = 1000
objective = "ul2"

[[stage]]
name = "two"
"""


def _read(text: str, directory: Path):
    path = directory / "stages.toml"
    path.write_text(text)
    return read_phases(str(path))


def test_keys_are_flags_with_hyphens_or_underscores(tmp_path):
    one, two = _read(TWO + "seq_length = 64\nlr-decay-style = 'WSD'\nsft-pack = false", tmp_path)
    assert (one.name, one.unit, one.until, one.settings) == (
        "one",
        "tokens",
        1000,
        {"objective": "ul2"},
    )
    assert (two.unit, two.lr_from, one.lr_from) == (None, "stage", "run")
    changed = two.applied(RunConfig())
    assert (changed.data.seq_length, changed.optimizer.lr_decay_style) == (64, "WSD")
    assert changed.objective.sft_pack is False
    assert two.label == f"phase 'two' of {tmp_path / 'stages.toml'}"


def test_a_phase_has_the_command_lines_settings_and_none_of_the_phase_before(tmp_path):
    one, two = _read(TWO + "hidden-dropout = 0.5\nmicro-batch-size = 3", tmp_path)
    base = PRESETS["openmoe-8b-32e"]
    first = one.applied(base)
    assert first == replace(base, objective=replace(base.objective, objective="ul2"))
    second = two.applied(base)
    assert second.objective.objective == "causal"
    assert (second.model.hidden_dropout, second.train.micro_batch_size) == (0.5, 3)
    assert replace(second, model=base.model, train=base.train) == base


def test_rates_of_a_phase_use_no_numbers_of_steps_of_the_run(tmp_path):
    base = PRESETS["openmoe-8b-32e"]
    of_run, of_phase, kept = _read(
        TWO.replace('name = "two"', 'name = "two"\nlr = 1e-3\nuntil-tokens = 2000')
        + '[[stage]]\nname = "three"\nlr = 0.005\nlr-warmup-init = 0.005\nlr-from = "run"',
        tmp_path,
    )
    assert of_run.applied(base).optimizer == base.optimizer
    own = of_phase.applied(base).optimizer
    assert (own.lr, own.lr_decay_style) == (1e-3, "inverse-square-root")
    assert (own.lr_warmup_iters, own.lr_warmup_init, own.lr_decay_iters) == (0, 0.0, None)
    expected = replace(base.optimizer, lr=0.005, lr_warmup_init=0.005)
    assert kept.applied(base).optimizer == expected


def test_a_phase_that_names_data_uses_none_of_the_command_lines(tmp_path):
    data = DataConfig(train_data_path=("a",), valid_data_path=("b",), data_root="/data")
    base = RunConfig(data=data, optimizer=OptimizerConfig(), train=TrainConfig())
    text = TWO + 'data-path = [0.25, "c", 3, "d"]\n[[stage]]\nname = "x"\nmixture = "v2"'
    one, two, three = _read(text.replace('"two"', '"two"\nuntil-tokens = 2000'), tmp_path)
    assert one.applied(base).data == data
    found = two.applied(base).data
    assert found == replace(DataConfig(), data_path=("0.25", "c", "3", "d"))
    assert three.applied(base).data == replace(DataConfig(), mixture="v2", data_root="/data")


REJECTED = {
    "a typing error": (
        TWO + "lr-decay-stile = 'linear'",
        "key of phase 'two' of {file} must be a known key, the closest is lr-decay-style (got "
        "'lr-decay-stile')",
    ),
    "a model's size": (
        TWO + "num-layers = 8",
        "key of phase 'two' of {file} must be a setting that can change during a run (got "
        "'num-layers'); set --num-layers on the command line, for the whole run",
    ),
    "a layout": (
        TWO + "tensor-model-parallel-size = 2",
        "must be a setting that can change during a run (got 'tensor-model-parallel-size')",
    ),
    "the vocabulary": (
        TWO + "vocab-size = 2",
        "must be a setting that can change during a run (got 'vocab-size')",
    ),
    "a flag by its documented name": (
        TWO + "kernel-impl = 'native'",
        "(got 'kernel-impl'); set --kernel-impl on the command line, for the whole run",
    ),
    "a flag by its other name": (
        TWO + "moe-dispatch-impl = 'native'",
        "(got 'moe-dispatch-impl'); set --kernel-impl on the command line, for the whole run",
    ),
    "a word for a number": (
        TWO + 'seq-length = "long"',
        "seq_length in data of phase 'two' of {file} must be a whole number (got 'long')",
    ),
    "a number for a switch": (TWO + "sft-pack = 1", "must be true or false (got 1)"),
    "an unknown choice": (
        TWO + 'objective = "bert"',
        "must be 'causal' or 'prefix-lm' or 'ul2' or 'sft' (got 'bert')",
    ),
    "one path for a list": (TWO + 'data-path = "c"', "must be a list, each text (got 'c')"),
    "a switch in a list": (TWO + "data-path = [true]", "must be a list, each text (got [True])"),
    "the same key twice": (
        TWO + "seq-length = 8\nseq_length = 8",
        "key of phase 'two' of {file} must be given once (got 'seq_length')",
    ),
    "no name": ("[[stage]]\nlr = 1.0", "name of phase 1 of {file} must be a text (got None)"),
    "an empty name": (
        '[[stage]]\nname = " "',
        "name of phase 1 of {file} must be a text (got ' ')",
    ),
    "one name twice": (
        TWO.replace('"two"', '"one"'),
        "name of each phase in {file} must be unique (got 'one')",
    ),
    "two ends": (
        TWO.replace("until-tokens = 1000", "until-tokens = 1000\nuntil-iteration = 3"),
        "end of phase 'one' of {file} must be one of them (got 'until-iteration and until-tokens')",
    ),
    "an end that is no number": (
        TWO.replace("until-tokens = 1000", "until-tokens = 1e12"),
        "until-tokens of phase 'one' of {file} must be a whole number >= 1 (got 1000000000000.0)",
    ),
    "an end of 0": (TWO.replace("= 1000", "= 0"), "must be a whole number >= 1 (got 0)"),
    "an open phase in the middle": (
        TWO.replace("until-tokens = 1000", ""),
        "end of phase 'one' of {file} must be until-iteration, until-samples or until-tokens (got "
        "None); only the last may be open",
    ),
    "an unknown origin": (
        TWO + 'lr-from = "epoch"',
        "lr-from of phase 'two' of {file} must be run or stage (got",
    ),
    "no phases": ("", "content of {file} must be one or more [[stage]] tables (got [])"),
    "something else": (
        "stages = 3",
        "content of {file} must be one or more [[stage]] tables (got ['stages'])",
    ),
    "a table": ("[stage]\nname = 'x'", "must be one or more [[stage]] tables (got ['stage'])"),
    "no tables": ("stage = [1]", "phase 1 of {file} must be a [[stage]] table (got 1)"),
    "no TOML": ("[[stage", "--phases must be a TOML file (got '{file}')"),
    "too deep": ("a = " + "[" * 100_000, "--phases must be a TOML file (got '{file}')"),
}


@pytest.mark.parametrize("name", list(REJECTED))
def test_invalid_files_are_rejected_by_phase_and_key(name, tmp_path):
    text, expected = REJECTED[name]
    with pytest.raises(UsageError) as error:
        _read(text, tmp_path)
    assert expected.format(file=tmp_path / "stages.toml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"--phases must be a readable TOML file \(got ./nowhere"):
        read_phases("/nowhere.toml")


def test_resolving_phases_needs_no_torch(tmp_path):
    path = tmp_path / "stages.toml"
    path.write_text(TWO.replace("1000", "5000"))
    script = (
        "import sys\n"
        "from megatron_moe.config.cli import parse_args\n"
        "from megatron_moe.config.validate import validate\n"
        "from megatron_moe.training.phases import resolve_run_schedule\n"
        f"config = parse_args(['--phases', {str(path)!r}, '--train-iters', '9']).config\n"
        "validate(config)\n"
        "assert len(resolve_run_schedule(config, 1).phases) == 2\n"
        "sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
