"""The stage table as a file: what it may say, and how it is refused, without torch."""

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
    assert two.label == f"stage 'two' of {tmp_path / 'stages.toml'}"


def test_a_stage_takes_the_command_line_and_nothing_of_the_stage_before(tmp_path):
    one, two = _read(TWO + "hidden-dropout = 0.5\nmicro-batch-size = 3", tmp_path)
    base = PRESETS["openmoe-8b-32e"]
    first = one.applied(base)
    assert first == replace(base, objective=replace(base.objective, objective="ul2"))
    second = two.applied(base)
    assert second.objective.objective == "causal"
    assert (second.model.hidden_dropout, second.train.micro_batch_size) == (0.5, 3)
    assert replace(second, model=base.model, train=base.train) == base


def test_rates_of_a_stage_take_no_numbers_of_steps_from_the_run(tmp_path):
    base = PRESETS["openmoe-8b-32e"]
    of_run, of_stage, kept = _read(
        TWO.replace('name = "two"', 'name = "two"\nlr = 1e-3\nuntil-tokens = 2000')
        + '[[stage]]\nname = "three"\nlr = 0.005\nlr-warmup-init = 0.005\nlr-from = "run"',
        tmp_path,
    )
    assert of_run.applied(base).optimizer == base.optimizer
    own = of_stage.applied(base).optimizer
    assert (own.lr, own.lr_decay_style) == (1e-3, "inverse-square-root")
    assert (own.lr_warmup_iters, own.lr_warmup_init, own.lr_decay_iters) == (0, 0.0, None)
    expected = replace(base.optimizer, lr=0.005, lr_warmup_init=0.005)
    assert kept.applied(base).optimizer == expected


def test_a_stage_that_names_data_takes_none_of_the_command_lines(tmp_path):
    data = DataConfig(train_data_path=("a",), valid_data_path=("b",), data_root="/data")
    base = RunConfig(data=data, optimizer=OptimizerConfig(), train=TrainConfig())
    text = TWO + 'data-path = [0.25, "c", 3, "d"]\n[[stage]]\nname = "x"\nmixture = "v2"'
    one, two, three = _read(text.replace('"two"', '"two"\nuntil-tokens = 2000'), tmp_path)
    assert one.applied(base).data == data
    found = two.applied(base).data
    assert found == replace(DataConfig(), data_path=("0.25", "c", "3", "d"))
    assert three.applied(base).data == replace(DataConfig(), mixture="v2", data_root="/data")


REFUSED = {
    "a typing error": (
        TWO + "lr-decay-stile = 'linear'",
        "key of stage 'two' of {file} is 'lr-decay-stile', expected a known key, the closest is "
        "lr-decay-style",
    ),
    "a model's size": (
        TWO + "num-layers = 8",
        "key of stage 'two' of {file} is 'num-layers', expected what can change during a run; give "
        "--num-layers on the command line, for the whole run",
    ),
    "a layout": (TWO + "tensor-model-parallel-size = 2", "is 'tensor-model-parallel-size', expec"),
    "the vocabulary": (TWO + "vocab-size = 2", "is 'vocab-size', expected what can change"),
    "a word for a number": (
        TWO + 'seq-length = "long"',
        "seq_length in data of stage 'two' of {file} is 'long', expected a whole number",
    ),
    "a number for a switch": (TWO + "sft-pack = 1", "is 1, expected true or false"),
    "an unknown choice": (TWO + 'objective = "bert"', "expected 'causal' or 'prefix-lm' or 'ul2'"),
    "one path for a list": (TWO + 'data-path = "c"', "is 'c', expected a list, each text"),
    "a switch in a list": (TWO + "data-path = [true]", "expected a list, each text"),
    "the same key twice": (
        TWO + "seq-length = 8\nseq_length = 8",
        "key of stage 'two' of {file} is 'seq_length', expected each key once",
    ),
    "no name": ("[[stage]]\nlr = 1.0", "name of stage 1 of {file} is None, expected a text"),
    "an empty name": ('[[stage]]\nname = " "', "name of stage 1 of {file} is ' '"),
    "one name twice": (TWO.replace('"two"', '"one"'), "name in {file} is 'one', expected another"),
    "two ends": (
        TWO.replace("until-tokens = 1000", "until-tokens = 1000\nuntil-iteration = 3"),
        "end of stage 'one' of {file} is 'until-iteration and until-tokens', expected one of",
    ),
    "an end that is no number": (
        TWO.replace("until-tokens = 1000", "until-tokens = 1e12"),
        "until-tokens of stage 'one' of {file} is 1000000000000.0, expected a whole number",
    ),
    "an end of 0": (TWO.replace("= 1000", "= 0"), "is 0, expected a whole number, at least 1"),
    "an open stage in the middle": (
        TWO.replace("until-tokens = 1000", ""),
        "end of stage 'one' of {file} is None, expected until-iteration, until-samples or",
    ),
    "an unknown origin": (TWO + 'lr-from = "epoch"', "lr-from of stage 'two' of {file} is 'epoch'"),
    "no stages": ("", "content of {file} is [], expected one or more [[stage]] tables"),
    "something else": ("stages = 3", "content of {file} is ['stages'], expected one or more"),
    "a table": ("[stage]\nname = 'x'", "expected one or more [[stage]] tables"),
    "no tables": ("stage = [1]", "stage 1 of {file} is 1, expected a [[stage]] table"),
    "no TOML": ("[[stage", "--stages is '{file}', expected a TOML file"),
    "too deep": ("a = " + "[" * 100_000, "--stages is '{file}', expected a TOML file"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_meant_is_refused_by_stage_and_key(name, tmp_path):
    text, expected = REFUSED[name]
    with pytest.raises(UsageError) as error:
        _read(text, tmp_path)
    assert expected.format(file=tmp_path / "stages.toml") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"--stages is ./nowhere\.toml., expected a readable TOML"):
        read_phases("/nowhere.toml")


def test_reading_a_table_needs_no_torch(tmp_path):
    path = tmp_path / "stages.toml"
    path.write_text(TWO.replace("1000", "5000"))
    script = (
        "import sys\n"
        "from megatron_moe.config.cli import parse_args\n"
        "from megatron_moe.training.phases import resolve_run_schedule\n"
        f"config = parse_args(['--stages', {str(path)!r}, '--train-iters', '9']).config\n"
        "assert len(resolve_run_schedule(config, 1).phases) == 2\n"
        "sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
