"""Rules between flags: each is an error that names the flag, in one pass, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pretrain_openmoe
from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.presets import PRESETS
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]

INVALID = {
    "--qk-layernorm-scope projection": (
        "--qk-layernorm-scope must be used with --qk-layernorm (got 'projection')"
    ),
    "--group-query-attention --num-query-groups 0": "--num-query-groups must be >= 1 (got 0)",
    "--fp8-recipe mxfp8": "--fp8-recipe must be used with --fp8-format (got 'mxfp8')",
    "--num-layers-at-start-in-bf16 0": (
        "--num-layers-at-start-in-bf16 must be used with --fp8-format (got 0)"
    ),
    "--fp8-format e4m3 --fp8-margin 1": (
        "--fp8-margin must be used with --fp8-recipe delayed (got 1)"
    ),
    "--fp8-format e4m3 --fp8-amax-history-len 1024 --fp8-recipe blockwise": (
        "--fp8-amax-history-len must be used with --fp8-recipe delayed (got 1024)"
    ),
    "--fp8-format e4m3 --fp8-amax-compute-algo max": (
        "--fp8-amax-compute-algo must be used with --fp8-recipe delayed (got 'max')"
    ),
    "--fp8-format e4m3 --num-layers-at-end-in-bf16 0": (
        "--num-layers-at-end-in-bf16 must be used with --first-last-layers-bf16 (got 0)"
    ),
    "--fp8-format hybrid --fp8-recipe delayed --recompute-granularity selective"
    " --recompute-modules layernorm": (
        "--recompute-modules must be other modules with --fp8-recipe delayed (got 'layernorm');"
        " Megatron-Core does not recompute norms with delayed scales; use another recipe"
    ),
    "--fp8-format hybrid --fp8-recipe delayed --first-last-layers-bf16": (
        "--first-last-layers-bf16 must be unset with --fp8-recipe delayed (got True);"
        " Megatron-Core updates delayed scales for all layers together; use another recipe"
    ),
    "--fp8-format e4m3 --first-last-layers-bf16 --num-layers-at-start-in-bf16 3": (
        "--first-last-layers-bf16 must be set for fewer than the 4 layers of the model (got 4);"
        " no layer is left in FP8"
    ),
    "--train-iters 3 --train-samples 8": (
        "--train-iters must be used without --train-samples (got 3); give one of the two"
    ),
    "--save-interval 2": "--save-interval must be used with --save (got 2)",
    "--async-save": "--async-save must be used with --save (got True)",
    "--keep-every 3": "--keep-every must be used with --keep-last (got 3)",
    "--finetune": "--finetune must be used with --load (got True)",
    "--checkpoint-fallback": "--checkpoint-fallback must be used with --load (got True)",
    "--checkpoint-fallback --load x --ckpt-step 4": (
        "--checkpoint-fallback must be used without --ckpt-step (got True); it selects the step"
        " itself"
    ),
    "--data-path a --mixture v2": "--mixture must be used without --data-path (got 'v2')",
    "--data-path a --data-args-path b": (
        "--data-args-path must be used without --data-path (got 'b')"
    ),
    "--mixture v1 --valid-data-path 1 a 2 b": (
        "--valid-data-path must be used without --mixture (got '1 a 2 b')"
    ),
    "--data-path a --train-data-path b": (
        "--train-data-path must be used without --data-path (got 'b')"
    ),
    "--data-args-path f --mixture v1": (
        "--mixture must be used without --data-args-path (got 'v1')"
    ),
    "--data-path a --valid-data-path b": (
        "--valid-data-path must be used without --data-path (got 'b')"
    ),
    "--mixture v1 --train-data-path a": (
        "--train-data-path must be used without --mixture (got 'a')"
    ),
    "--data-path a --data-root /data": "--data-root must be used with --mixture (got '/data')",
    "--data-root /data": "--data-root must be used with --mixture (got '/data')",
    "--seq-length 4096": "--seq-length must be <= --max-position-embeddings (2048) (got 4096)",
    "--objective ul2 --eod-mask-loss": (
        "--eod-mask-loss must be unset with --objective ul2 (got True); rows of several parts have"
        " ends of their own and define their loss mask themselves"
    ),
    "--objective sft --eod-mask-loss": "--eod-mask-loss must be unset with --objective sft",
    "--objective ul2 --reset-position-ids": (
        "--reset-position-ids must be unset with --objective ul2 (got True); as in the paper,"
        " inputs and targets are one row with positions from its start"
    ),
    "--objective ul2 --reset-attention-mask": (
        "--reset-attention-mask must be unset with --objective ul2 (got True)"
    ),
    "--objective ul2 --ul2-inputs-length 32 --ul2-fill-rows": (
        "--ul2-inputs-length must be used without --ul2-fill-rows (got 32)"
    ),
    "--objective ul2 --seq-length 64 --ul2-inputs-length 63": (
        "--ul2-inputs-length must be >= 2 and <= --seq-length - 2 (62) (got 63)"
    ),
    "--moe-capacity-rule megatron --moe-min-capacity 2": (
        "--moe-min-capacity must be unset with --moe-capacity-rule megatron, which has no minimum"
        " (got 2)"
    ),
    "--num-layers 4 --moe-layer-freq [0,1]*2 --moe-layer-capacity-factors 1 1.5 2": (
        "--moe-layer-capacity-factors must be 2 numbers, one for each MoE layer (got '1.0 1.5 2.0')"
    ),
    "--num-layers 4 --moe-layer-freq [0,1]*2 --moe-layer-capacity-factors 1 2"
    " --moe-expert-capacity-factor None": (
        "--moe-layer-capacity-factors must be used with a --moe-expert-capacity-factor"
        " (got '1.0 2.0')"
    ),
    "--num-layers 4 --moe-layer-freq [0,1]*2 --moe-layer-capacity-factors 1 2"
    " --moe-target-drop-rate 0.1": (
        "--moe-layer-capacity-factors must be used without --moe-target-drop-rate (got '1.0 2.0');"
        " give one of the two"
    ),
    "--moe-capacity-factor-range 1 2": (
        "--moe-capacity-factor-range must be used with --moe-target-drop-rate"
    ),
    "--moe-target-drop-rate 0.1 --moe-capacity-factor-range 2 1": (
        "--moe-capacity-factor-range must be two numbers, the smaller one first (got '2.0 1.0')"
    ),
    "--moe-target-drop-rate 0.1 --moe-capacity-factor-range 2 3": (
        "--moe-expert-capacity-factor must be from 2.0 to 3.0, --moe-capacity-factor-range, of"
        " --moe-target-drop-rate (got 1.25)"
    ),
    "--moe-a2a-overlap-chunks 2": (
        "--moe-a2a-overlap-chunks must be used with --moe-expert-impl batched (got 2);"
        " chunks are of slots, and only these experts compute them in local layers"
    ),
    "--moe-a2a-overlap-chunks 2 --moe-expert-impl batched --fp8-format e4m3 --fp8-emulate": (
        "--moe-a2a-overlap-chunks must be 1 with --fp8-emulate (got 2);"
        " scales of emulated FP8 are those of all slots"
    ),
    "--moe-expert-impl grouped --moe-dropless-buffer-factor 1.5": (
        "--moe-dropless-buffer-factor must be used with --moe-expert-capacity-factor None"
        " (got 1.5); with a capacity factor, capacity bounds the buffer"
    ),
    "--moe-expert-capacity-factor None --moe-dropless-buffer-factor 1.5": (
        "--moe-dropless-buffer-factor must be used with --moe-expert-impl grouped (got 1.5);"
        " other experts do not compute packed rows everywhere"
    ),
    "--moe-expert-capacity-factor None --moe-expert-impl grouped --moe-dropless-buffer-factor 1.5"
    " --moe-token-drop-policy fair": (
        "--moe-token-drop-policy must be another one with --moe-dropless-buffer-factor (got"
        " 'fair'); fair divides the slots of an expert, and a bounded buffer has rows of a rank"
    ),
    "--fp8-format hybrid --fp8-emulate --moe-expert-impl grouped": (
        "--moe-expert-impl must be auto with --fp8-emulate (got 'grouped');"
        " emulated FP8 has GEMMs of its own, over all slots"
    ),
    "--min-lr 1 --lr 0.1": "--min-lr must be <= --lr (0.1) (got 1.0)",
    "--lr-warmup-init 1 --lr 0.1": "--lr-warmup-init must be <= --lr (0.1) (got 1.0)",
    "--lr-wsd-decay-iters 4": (
        "--lr-wsd-decay-iters must be used with --lr-decay-style WSD (got 4)"
    ),
    "--lr-decay-style WSD": (
        "--lr-wsd-decay-iters must be a number of steps with --lr-decay-style WSD (got None)"
    ),
    "--optimizer sgd --use-distributed-optimizer": (
        "--use-distributed-optimizer must be unset with --optimizer sgd (got True); Megatron-Core"
        " shards the state of Adam only"
    ),
    "--optimizer adafactor --use-distributed-optimizer": (
        "--use-distributed-optimizer must be unset with --optimizer adafactor (got True); it cuts"
        " parameters at any element; Adafactor needs whole rows and columns"
    ),
    "--moe-layer-num-experts 4 8 16": (
        "--moe-layer-num-experts must be 2 numbers, one for each MoE layer (got '4 8 16')"
    ),
    "--moe-layer-num-experts 1 8": "--moe-layer-num-experts must be >= --moe-router-topk (2) (got",
    "--moe-layer-num-experts 4 8 --num-experts 16": (
        "--num-experts must be 8, the largest of --moe-layer-num-experts, or left out (got 16)"
    ),
    "--moe-layer-num-experts 4 9 --moe-router-num-groups 2 --moe-router-group-topk 1": (
        "--moe-router-num-groups must be a divisor of --num-experts (9) (got 2)"
    ),
    "--optimizer muon --use-distributed-optimizer": (
        "--use-distributed-optimizer must be unset with --optimizer muon (got True); it cuts"
        " parameters at any element; Muon needs whole matrices"
    ),
    "--optimizer adafactor --weight-decay 0.1": (
        "--weight-decay must be 0 with --optimizer adafactor, which has no weight decay (got 0.1)"
    ),
}


@pytest.mark.parametrize("line", INVALID)
def test_flags_that_contradict_each_other_are_rejected_by_name(line: str) -> None:
    config = parse_args(line.split()).config
    with pytest.raises(UsageError) as error:
        validate(config)
    assert str(error.value).startswith(INVALID[line])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "--save-interval 2 --save x",
        "--keep-every 3 --keep-last 1",
        "--checkpoint-fallback --load x",
        "--train-data-path a --valid-data-path b --test-data-path c",
        "--mixture v2 --data-root /data",
        "--objective ul2 --seq-length 64 --ul2-inputs-length 62",
        "--objective sft --reset-position-ids --reset-attention-mask",
        "--objective prefix-lm --eod-mask-loss",
        "--ul2-inputs-length 32 --ul2-fill-rows",
        "--min-lr 0.1 --lr 0.1",
        "--lr-decay-style WSD --lr-wsd-decay-iters 4",
        "--optimizer adafactor --weight-decay 0",
        "--fp8-format hybrid --fp8-recipe delayed --fp8-margin 1 --fp8-amax-history-len 1024"
        " --fp8-amax-compute-algo max",
        "--fp8-format e4m3 --first-last-layers-bf16 --num-layers-at-start-in-bf16 0"
        " --num-layers-at-end-in-bf16 3",
    ],
)
def test_flags_that_fit_each_other_are_accepted(line: str) -> None:
    validate(parse_args(line.split()).config)


def test_presets_and_defaults_are_valid() -> None:
    for config in (RunConfig(), *PRESETS.values()):
        validate(config)


TABLE = """
[[stage]]
name = "one"
until-iteration = 8

[[stage]]
name = "two"
"""

INVALID_PHASES = {
    "a setting out of range": (
        TABLE + "seq-length = 0",
        "",
        "phase 'two' of {file}: --seq-length must be >= 1 (got 0)",
    ),
    "rules between a phase's settings": (
        TABLE + "min-lr = 0.5",
        "",
        "phase 'two' of {file}: --min-lr must be <= --lr (0.0003) (got 0.5)",
    ),
    "a phase's setting and the command line's": (
        TABLE + "objective = 'ul2'",
        "--eod-mask-loss",
        "phase 'two' of {file}: --eod-mask-loss must be unset with --objective ul2 (got True)",
    ),
    "the command line alone": (
        TABLE,
        "--log-interval 0",
        "--log-interval must be >= 1 (got 0)",
    ),
    "a rule of the whole run": (
        TABLE,
        "--save-interval 2",
        "--save-interval must be used with --save (got 2)",
    ),
    "a ramp-up of the whole run": (
        TABLE,
        "--rampup-batch-size 4 4 16",
        "--rampup-batch-size must be used without --phases (got '4 4 16'); set it in the phase that"
        " ramps",
    ),
    "a length although the last phase has an end": (
        TABLE + "until-iteration = 18",
        "--train-samples 99",
        "--train-samples must be unset: phase 'two' of {file}, the last one, has an end (got 99)",
    ),
}


@pytest.mark.parametrize("name", INVALID_PHASES)
def test_each_phase_is_validated_and_named(name: str, tmp_path: Path) -> None:
    text, line, message = INVALID_PHASES[name]
    path = tmp_path / "phases.toml"
    path.write_text(text)
    config = parse_args(["--phases", str(path), *line.split()]).config
    with pytest.raises(UsageError) as error:
        validate(config)
    assert str(error.value).startswith(message.format(file=path))


def test_a_phase_may_replace_what_would_not_fit_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "phases.toml"
    path.write_text(TABLE.replace("until", "lr = 1.0\nuntil") + "min-lr = 0.0")
    config = parse_args(["--phases", str(path), "--min-lr", "0.5", "--lr", "0.1"]).config
    validate(config)


@pytest.mark.parametrize("mode", [[], ["--describe"]])
def test_training_and_describe_reject_the_same(mode: list[str]) -> None:
    command = parse_args(["--save-interval", "2", *mode])
    with pytest.raises(UsageError, match="--save-interval must be used with --save"):
        pretrain_openmoe.execute(command)


def test_validation_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from megatron_moe.config.cli import parse_args\n"
        "from megatron_moe.config.validate import validate\n"
        "validate(parse_args(['--preset', 'openmoe-8b-32e']).config)\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_importing_the_configuration_needs_neither_torch_nor_tyro() -> None:
    script = (
        "import sys, megatron_moe.config\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'tyro')))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
