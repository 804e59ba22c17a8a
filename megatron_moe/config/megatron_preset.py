"""`--preset megatron`: what a script of Megatron-LM leaves unsaid, as Megatron-LM has it.

A flag that a script does not give has Megatron-LM's default, which is another model than this
program's default: dropless, no shared expert, every layer MoE, top-k before the softmax, losses
summed over layers. Where that default is not built (LayerNorm, biases, GELU, learned positions) or
Megatron-LM has none, the script must say what it wants. Some defaults follow from other flags:

    --ffn-hidden-size            8/3 of --hidden-size, rounded down to a multiple of 64 (SwiGLU)
    --kv-channels                --hidden-size / --num-attention-heads
    --moe-eval-capacity-factor   --moe-expert-capacity-factor: there is one for both
    --moe-layer-freq             no MoE layer without --num-experts
    --lr-decay-samples           --train-samples: a schedule in sequences
    --fp8-recipe                 delayed, with --fp8-format
    --muon-momentum              0.9, and --muon-tp-mode blockwise, with --optimizer muon

Without the preset, `unsaid` lists the same differences. Source: arguments.py and
transformer_config.py of Megatron-LM, core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from megatron_moe.config.fields import fields_of
from megatron_moe.config.megatron_flags import entries
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import CheckpointConfig, OptimizerConfig
from megatron_moe.errors import UsageError

NAME = "megatron"

DEFAULTS = RunConfig(
    model=ModelConfig(
        norm_epsilon=1e-5,
        ffn_variant="swiglu",
        softmax_scale=None,
        untie_embeddings_and_output_weights=False,
        scale_tied_logits=False,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        init_method_std=0.02,
        embedding_init_method_std=0.02,
        router_init_method_std=0.02,
        logit_z_loss_coeff=0.0,
    ),
    moe=MoEConfig(
        moe_layer_freq="1",
        moe_shared_expert_intermediate_size=None,
        moe_shared_expert_placement="parallel",
        moe_capacity_rule="megatron",
        moe_expert_capacity_factor=None,
        moe_eval_capacity_factor=None,
        moe_token_drop_policy="probs",
        moe_ignore_padding_tokens=False,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.0,
        moe_z_loss_coeff=0.0,
        moe_loss_convention="megatron",
        moe_router_pre_softmax=False,
    ),
    optimizer=OptimizerConfig(lr_decay_style="linear"),
    checkpoint=CheckpointConfig(allow_missing_load=True),
)
"""Megatron-LM's defaults that do not follow from other flags."""

_SIZES = ("--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings")
REQUIRED = (*_SIZES, "--seq-length", "--micro-batch-size", "--lr")
"""Flags without a default in Megatron-LM."""

_GATED = ("--swiglu", "--ffn-variant")
_INITIAL = ("--embedding-init-method-std", "--router-init-method-std")
"""Follow from `--init-method-std`."""
_DERIVED = {
    "--num-experts": "a model without experts",
    "--ffn-hidden-size": "8/3 of --hidden-size",
    "--kv-channels": "--hidden-size / --num-attention-heads",
    "--ffn-variant": "GELU between two matrices, without --swiglu",
}
"""Defaults that follow from others, in words."""


def completed(config: RunConfig, given: Collection[str], has_model: bool = False) -> RunConfig:
    """The configuration with the defaults that follow from other flags.

    Args:
        config: `DEFAULTS` with the flags of the command line.
        given: the flags of the command line, by this program's names and by Megatron-LM's.
        has_model: whether the settings of the model are a checkpoint's (`--use-checkpoint-args`).
    """
    samples, rate = config.train.train_samples, config.optimizer
    if samples is not None and rate.lr_decay_iters is None and rate.lr_decay_samples is None:
        config = replace(config, optimizer=replace(rate, lr_decay_samples=samples))
    if config.optimizer.optimizer == "muon":
        muon = config.optimizer
        if "--muon-momentum" not in given:
            muon = replace(muon, muon_momentum=0.9)
        if "--muon-tp-mode" not in given:
            muon = replace(muon, muon_tp_mode="blockwise")
        config = replace(config, optimizer=muon)
    if config.precision.fp8_format is not None and "--fp8-recipe" not in given:
        config = replace(config, precision=replace(config.precision, fp8_recipe="delayed"))
    return config if has_model else _complete_model(config, given)


def _complete_model(config: RunConfig, given: Collection[str]) -> RunConfig:
    model, moe = config.model, config.moe
    if "--ffn-hidden-size" not in given:
        model = replace(model, ffn_hidden_size=int(4 * model.hidden_size * 2 / 3) // 64 * 64)
    if "--kv-channels" not in given:
        model = replace(model, kv_channels=model.hidden_size // model.num_attention_heads)
    if "--moe-eval-capacity-factor" not in given:
        moe = replace(moe, moe_eval_capacity_factor=moe.moe_expert_capacity_factor)
    if not {"--num-experts", "--moe-layer-num-experts"} & set(given):
        moe = replace(moe, moe_layer_freq=f"[0]*{model.num_layers}")
    return replace(config, model=model, moe=moe)


def missing(given: Collection[str], has_model: bool = False) -> Iterator[UsageError]:
    """An error for each flag that a script must give, with the preset.

    Megatron-LM requires it as well, or has a default that is not built here. Arguments as of
    `completed`: a checkpoint has all that makes a model.
    """
    for flag in REQUIRED:
        if flag not in given and not (has_model and flag in _SIZES):
            yield UsageError(flag, None, f"given with --preset {NAME}, as in Megatron-LM")
    if has_model:
        return
    if not set(_GATED) & set(given):
        expected = f"given with --preset {NAME}"
        yield UsageError("--swiglu", None, expected, "Megatron-LM's default, GELU, is not built")
    for entry in entries():
        if entry.unsaid and not {entry.flags[0], *entry.unless} & set(given):
            says = " ".join((entry.flags[0], *(entry.values or ())))
            fix = f"Megatron-LM's default, {entry.unsaid}, is not built"
            yield UsageError(says, None, f"given with --preset {NAME}", fix)


def unsaid(given: Collection[str]) -> list[str]:
    """Lines on the settings that a command line leaves unsaid and Megatron-LM has otherwise.

    Args:
        given: the flags of the command line, as for `completed`.
    """
    found = [f"  {flag}: {here}, in Megatron-LM {there}" for flag, here, there in _differs(given)]
    if not found:
        return []
    return [
        " the command line has flags of Megatron-LM and leaves unsaid what differs there"
        f" (--preset {NAME} takes Megatron-LM's):",
        *found,
    ]


def _differs(given: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Flag, value here and value in Megatron-LM, of each difference that no flag decides."""
    here = RunConfig()
    for name, section in here.sections.items():
        theirs = getattr(DEFAULTS, name)
        for key, known in fields_of(type(section)).items():
            value, other = getattr(section, key), getattr(theirs, key)
            if set(known.flags) & set(given):
                continue
            if known.flag in _INITIAL and "--init-method-std" in given:
                continue
            if known.flag in _DERIVED:
                if known.flag != "--ffn-variant" or "--swiglu" not in given:
                    yield known.flag, value, _DERIVED[known.flag]
            elif known.flag in REQUIRED:
                yield known.flag, value, "required"
            elif value != other:
                yield known.flag, value, other
    of_samples = {"--train-samples", "--lr-decay-samples", "--lr-decay-iters"} & set(given)
    if of_samples == {"--train-samples"}:
        yield "--lr-decay-samples", "the learning rate counts steps", "--train-samples"
    if {"--fp8-format", "--fp8-recipe"} & set(given) == {"--fp8-format"}:
        yield "--fp8-recipe", here.precision.fp8_recipe, "delayed"
    for entry in entries():
        if entry.unsaid and not {entry.flags[0], *entry.unless} & set(given):
            yield entry.flags[0], " ".join(entry.values or ("given",)), entry.unsaid
