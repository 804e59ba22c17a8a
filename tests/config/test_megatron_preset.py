"""`--preset megatron`: Megatron-LM's defaults, and what a script without it leaves unsaid."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.megatron_preset import DEFAULTS
from megatron_moe.config.presets import PRESETS
from megatron_moe.errors import UsageError, UsageErrors

SIZES = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 8 --max-position-embeddings 128 "
    "--seq-length 128 --micro-batch-size 2 --lr 1e-4 "
)
MODEL = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
SCRIPT = SIZES + MODEL + "--num-experts 8 "
PRESET = "--preset megatron "


def test_what_a_script_leaves_unsaid_is_megatron_lms() -> None:
    """Read from arguments.py and transformer_config.py of Megatron-LM 0.16.1."""
    config = parse_args((PRESET + SCRIPT).split()).config
    model, moe, optimizer = config.model, config.moe, config.optimizer
    # int(4 * 256 * 2 / 3) = 682, and 682 // 64 * 64 = 640.
    assert (model.ffn_hidden_size, model.kv_channels, model.ffn_variant) == (640, 32, "swiglu")
    assert (model.softmax_scale, model.norm_epsilon, model.rotary_base) == (None, 1e-5, 10000)
    assert not model.untie_embeddings_and_output_weights
    assert not model.scale_tied_logits
    assert (model.attention_dropout, model.hidden_dropout) == (0.1, 0.1)
    assert model.logit_z_loss_coeff == 0
    stds = (model.embedding_init_method_std, model.router_init_method_std)
    assert (model.init_method_std, *stds) == (0.02, 0.02, 0.02)
    assert (moe.moe_layer_freq, moe.moe_router_topk) == ("1", 2)
    assert not moe.moe_router_pre_softmax
    assert moe.moe_ffn_hidden_size is None
    assert moe.moe_shared_expert_intermediate_size is None
    assert (moe.moe_expert_capacity_factor, moe.moe_eval_capacity_factor) == (None, None)
    assert (moe.moe_capacity_rule, moe.moe_token_drop_policy) == ("megatron", "probs")
    assert moe.moe_router_load_balancing_type == "aux_loss"
    assert (moe.moe_aux_loss_coeff, moe.moe_z_loss_coeff) == (0, 0)
    assert moe.moe_loss_convention == "megatron"
    assert (optimizer.lr_decay_style, optimizer.min_lr, optimizer.lr_warmup_iters) == (
        "linear",
        0,
        0,
    )
    assert (optimizer.used_weight_decay, optimizer.used_clip_grad) == (0.01, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert config.checkpoint.allow_missing_load


def test_what_the_script_says_stays() -> None:
    said = (
        "--ffn-hidden-size 512 --kv-channels 16 --moe-router-pre-softmax --moe-layer-freq 2 "
        "--moe-expert-capacity-factor 1.5 --exit-on-missing-checkpoint "
        "--untie-embeddings-and-output-weights"
    )
    config = parse_args((PRESET + SCRIPT + said).split()).config
    assert (config.model.ffn_hidden_size, config.model.kv_channels) == (512, 16)
    assert (config.moe.moe_router_pre_softmax, config.moe.moe_layer_freq) == (True, "2")
    # There is one factor in Megatron-LM.
    assert (config.moe.moe_expert_capacity_factor, config.moe.moe_eval_capacity_factor) == (
        1.5,
        1.5,
    )
    assert not config.checkpoint.allow_missing_load
    assert config.model.untie_embeddings_and_output_weights


def test_scales_are_delayed_unless_the_script_says_otherwise() -> None:
    def recipe(line: str) -> str:
        return parse_args((PRESET + SIZES + MODEL + line).split()).config.precision.fp8_recipe

    assert recipe("--fp8-format hybrid") == recipe("--fp8-hybrid") == "delayed"
    assert recipe("--fp8-format hybrid --fp8-recipe blockwise") == "blockwise"
    assert recipe("") == "tensorwise"
    notes = parse_args(["--swiglu", "--fp8-format", "hybrid"]).notes
    assert any("--fp8-recipe: tensorwise, in Megatron-LM delayed" in line for line in notes)
    assert not any("--fp8-recipe" in line for line in parse_args(["--swiglu"]).notes)


def test_a_script_without_experts_is_a_dense_model() -> None:
    config = parse_args((PRESET + SIZES + MODEL).split()).config
    assert config.moe.moe_layer_freq == "[0]*4"


def test_what_the_script_must_say_is_shown_at_once() -> None:
    with pytest.raises(UsageError) as error:
        parse_args((PRESET + "--num-layers 4 --lr fast --mtp-num-layers 1").split())
    lines = str(error.value).split("\n  ")[1:]
    missing = [line.split()[0] for line in lines if "--preset megatron" in line]
    assert missing == [
        "--hidden-size",
        "--num-attention-heads",
        "--max-position-embeddings",
        "--seq-length",
        "--micro-batch-size",
        "--swiglu",
        "--normalization",
        "--position-embedding-type",
        "--disable-bias-linear",
    ]
    assert any(line.startswith("--lr must be a number") for line in lines)
    assert any("(MTP) is not built" in line for line in lines)


def test_a_flag_that_says_the_same_is_enough() -> None:
    other = MODEL.replace("--position-embedding-type rope", "--use-rotary-position-embeddings")
    parse_args((PRESET + SIZES + other).split())


def test_without_a_preset_the_differences_that_nobody_says_are_listed() -> None:
    notes = parse_args((SCRIPT + "--moe-router-pre-softmax").split()).notes
    listed = {line.split(":")[0].strip(): line for line in notes[2:]}
    assert listed["--moe-expert-capacity-factor"].endswith(": 1.25, in Megatron-LM None")
    assert listed["--softmax-scale"].endswith(": 1.0, in Megatron-LM None")
    assert listed["--ffn-hidden-size"].endswith(": 512, in Megatron-LM 8/3 of --hidden-size")
    assert listed["--moe-loss-convention"].endswith(": openmoe, in Megatron-LM megatron")
    said = {"--num-layers", "--moe-router-pre-softmax", "--normalization", "--num-experts", "--lr"}
    assert said & set(listed) == set()
    # Everything that the preset changes and the line does not say, and nothing else.
    for preset in (PRESET, ""):
        config = parse_args((preset + SCRIPT + "--moe-router-pre-softmax").split()).config
        if not preset:
            ours = config
    changed = {
        f.name
        for section in ("model", "moe", "optimizer", "checkpoint")
        for f in dataclasses.fields(getattr(ours, section))
        if getattr(getattr(ours, section), f.name) != getattr(getattr(DEFAULTS, section), f.name)
    }
    flags = {"--" + name.replace("_", "-") for name in changed}
    assert set(listed) - flags <= {"--ffn-hidden-size", "--kv-channels"}


@pytest.mark.parametrize("flag", ["--swiglu", "--use-flash-attn"])
def test_one_flag_that_only_megatron_lm_has_is_enough_for_the_list(flag: str) -> None:
    assert any("--softmax-scale: 1.0" in line for line in parse_args([flag]).notes)


def test_all_said_or_no_flag_of_megatron_lm_lists_nothing() -> None:
    assert parse_args(SIZES.split()).notes == ()
    assert parse_args(["--preset", "openmoe-tiny", "--use-mcore-models"]).notes[1:] == ()


def test_a_checkpoint_has_the_sizes_that_a_script_leaves_unsaid() -> None:
    """`--use-checkpoint-args`: nothing of the model is required, derived or replaced."""
    rest = "--use-checkpoint-args --load ck --seq-length 64 --micro-batch-size 1 --lr 1"
    line = (PRESET + rest).split()
    saved = PRESETS["openmoe-8b-32e"]

    def inherit(base: RunConfig, given: RunConfig) -> RunConfig:
        return replace(base, model=saved.model, moe=saved.moe)

    config = parse_args(line, inherit=inherit).config
    assert (config.model, config.moe) == (saved.model, saved.moe)
    with pytest.raises(UsageErrors, match="--num-layers must be given with --preset megatron"):
        parse_args(line, inherit=lambda base, given: None)


def test_with_train_samples_the_learning_rate_counts_sequences() -> None:
    """Also without a length of its own, which matters with a ramp-up of the batch size."""
    optimizer = parse_args((PRESET + SCRIPT + "--train-samples 800").split()).config.optimizer
    assert (optimizer.lr_decay_samples, optimizer.lr_decay_iters) == (800, None)
    notes = parse_args(["--train-samples", "800", "--use-mcore-models"]).notes
    assert any("--lr-decay-samples: the learning rate counts steps" in line for line in notes)


def test_muon_is_megatron_lms() -> None:
    """Its command line's momentum, and each rank's block as a matrix."""
    optimizer = parse_args((PRESET + SCRIPT + "--optimizer muon").split()).config.optimizer
    assert (optimizer.muon_momentum, optimizer.muon_tp_mode) == (0.9, "blockwise")
    said = "--optimizer muon --muon-momentum 0.8 --muon-tp-mode duplicated"
    optimizer = parse_args((PRESET + SCRIPT + said).split()).config.optimizer
    assert (optimizer.muon_momentum, optimizer.muon_tp_mode) == (0.8, "duplicated")
    ours = parse_args(["--optimizer", "muon", "--muon-nesterov", "--muon-no-split-qkv"]).config
    assert (ours.optimizer.muon_momentum, ours.optimizer.muon_tp_mode) == (0.95, "duplicated")
    assert ours.optimizer.muon_use_nesterov
    assert not ours.optimizer.muon_split_qkv
