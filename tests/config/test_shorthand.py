"""Megatron-LM's shorthands: each is stored as what it stands for, and contradictions are errors."""

from __future__ import annotations

import re

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError

SAME = {
    "--swiglu": "--ffn-variant swiglu",
    "--swiglu --ffn-variant swiglu": "--ffn-variant swiglu",
    "--preset openmoe-tiny-released --swiglu": (
        "--preset openmoe-tiny-released --ffn-variant swiglu"
    ),
    "--no-swiglu": "",
    "--recompute-activations": "--recompute-granularity selective --recompute-modules core_attn",
    "--moe-layer-recompute": "--recompute-granularity selective --recompute-modules core_attn moe",
    "--moe-layer-recompute --recompute-modules mlp": (
        "--recompute-granularity selective --recompute-modules mlp moe"
    ),
    "--moe-layer-recompute --recompute-modules moe": (
        "--recompute-granularity selective --recompute-modules moe"
    ),
    "--save c --save-interval 5 --save-retain-interval 20": (
        "--save c --save-interval 5 --keep-last 1 --keep-every 20"
    ),
    "--moe-layer-num-experts 4 16 --moe-layer-freq [0,0,1,1]": (
        "--moe-layer-num-experts 4 16 --num-experts 16 --moe-layer-freq [0,0,1,1]"
    ),
    "--moe-num-shared-experts 3 --moe-shared-expert-intermediate-size 40": (
        "--moe-shared-expert-intermediate-size 120"
    ),
    # The rule t5x counts no choices: as many slots for each expert take m times the factor.
    "--moe-expert-split-factor 4 --num-experts 6 --moe-ffn-hidden-size 64": (
        "--num-experts 24 --moe-router-topk 8 --moe-ffn-hidden-size 16 "
        "--moe-expert-capacity-factor 5 --moe-eval-capacity-factor 8"
    ),
    "--moe-expert-split-factor 2 --moe-layer-num-experts 4 8 --moe-capacity-rule port "
    "--ffn-hidden-size 96 --moe-router-document-pool 3 4": (
        "--moe-layer-num-experts 8 16 --num-experts 16 --moe-router-topk 4 --moe-capacity-rule "
        "port --ffn-hidden-size 96 --moe-ffn-hidden-size 48 --moe-router-document-pool 6 8"
    ),
    "--moe-expert-split-factor 2 --moe-target-drop-rate 0.1 --moe-expert-capacity-factor None": (
        "--num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 256 --moe-target-drop-rate 0.1 "
        "--moe-expert-capacity-factor None --moe-capacity-factor-range 1 8 "
        "--moe-eval-capacity-factor 4"
    ),
    "--init-method-std 0.008": (
        "--init-method-std 0.008 --embedding-init-method-std 0.008 --router-init-method-std 0.008"
    ),
    "--router-init-method-std 0.5 --init-method-std 0.008": (
        "--init-method-std 0.008 --embedding-init-method-std 0.008 --router-init-method-std 0.5"
    ),
    "--init-method-std 0.008 --embedding-init-method-std 1": (
        "--embedding-init-method-std 1 --init-method-std 0.008 --router-init-method-std 0.008"
    ),
}


@pytest.mark.parametrize("line", list(SAME))
def test_a_shorthand_is_stored_as_what_it_stands_for(line: str) -> None:
    assert parse_args(line.split()).config == parse_args(SAME[line].split()).config


def test_a_saved_run_comes_back_whichever_flags_it_was_started_with(tmp_path) -> None:
    file = tmp_path / "config.json"
    saved = parse_args(["--swiglu", "--init-method-std", "0.01", "--moe-layer-recompute"]).config
    saved.save(file)
    assert parse_args(["--config", str(file)]).config == saved
    assert saved != RunConfig()


@pytest.mark.parametrize(
    ("line", "stds"),
    [
        ("", (1.0, 0.02)),
        ("--init-method-std 0.008", (0.008, 0.008)),
        ("--router-init-method-std 0.5 --init-method-std 0.008", (0.008, 0.5)),
        ("--init-method-std 0.008 --embedding-init-method-std 2", (2.0, 0.008)),
    ],
)
def test_embedding_and_router_start_as_they_say_or_as_the_others(
    line: str, stds: tuple[float, float]
) -> None:
    model = parse_args(line.split()).config.model
    assert (model.embedding_init_method_std, model.router_init_method_std) == stds


def test_a_variance_replaces_the_initialisation_of_the_preset_megatron() -> None:
    line = (
        "--preset megatron --num-layers 2 --hidden-size 64 --num-attention-heads 2 --lr 0.1 "
        "--max-position-embeddings 64 --seq-length 64 --micro-batch-size 1 --swiglu "
        "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear"
    )
    script = line.split()
    model = parse_args(script).config.model
    assert (model.init_method_std, model.in_std(64)) == (0.02, 0.02)
    model = parse_args([*script, "--init-variance-scale", "0.64"]).config.model
    assert model.in_std(64) == 0.1


CONTRADICTIONS = {
    "--swiglu --ffn-variant gated-swiglu": (
        "--swiglu must be used without --ffn-variant gated-swiglu"
    ),
    "--ffn_variant=gated-swiglu --swiglu": (
        "--swiglu must be used without --ffn-variant gated-swiglu"
    ),
    "--recompute-activations --recompute-granularity full": (
        "--recompute-activations must be used without --recompute-granularity full"
    ),
    "--moe-layer-recompute --recompute-granularity full": (
        "--moe-layer-recompute must be used without --recompute-granularity full"
    ),
    "--save-interval 10 --save-retain-interval 25": (
        "--save-retain-interval must be a multiple of --save-interval (10) (got 25)"
    ),
    "--save-retain-interval 25": "--save-retain-interval must be a multiple of --save-interval",
    "--save-interval 5 --save-retain-interval 10 --keep-last 3": (
        "--save-retain-interval must be used without --keep-last 3"
    ),
    "--init-method-std 0.1 --init-variance-scale 0.1": (
        "--init-method-std must be used without --init-variance-scale"
    ),
}


@pytest.mark.parametrize("line", list(CONTRADICTIONS))
def test_a_shorthand_that_contradicts_another_flag_is_an_error(line: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_args(line.split())
    assert CONTRADICTIONS[line] in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--moe-expert-split-factor 3 --moe-ffn-hidden-size 64",
            "--moe-expert-split-factor must be a divisor of the width of an expert (64) (got 3)",
        ),
        (
            "--moe-num-shared-experts 2 --moe-shared-expert-intermediate-size None",
            "--moe-num-shared-experts must be used with a --moe-shared-expert-intermediate-size",
        ),
    ],
)
def test_experts_that_cannot_be_made_are_errors(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_args(line.split())
