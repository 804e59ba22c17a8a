"""Whether a checkpoint is compatible with the run that loads it: all differences, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_moe.checkpoint.index import LogicalTensor, Name
from megatron_moe.checkpoint.metadata import RunIdentity
from megatron_moe.checkpoint.tensor_files import DTYPES
from megatron_moe.config import RunConfig
from megatron_moe.config.run import flag_of
from megatron_moe.model.logical import expert_width
from megatron_moe.model.sharding.blocks import MODEL, Part

_MODEL_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "qk_layernorm",
    "qk_layernorm_scope",
    "ffn_variant",
    "untie_embeddings_and_output_weights",
)
_MOE_SHAPE = (
    "num_experts",
    "moe_layer_num_experts",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_placement",
)
_MODEL_MATHS = (
    "rotary_base",
    "norm_epsilon",
    "softmax_scale",
    "scale_tied_logits",
    "zero_padding_activations",
)
_MOE_MATHS = (
    *("moe_router_topk", "moe_router_type", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_context_decay", "moe_router_norm_rank"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
)
"""Settings that change what the model computes, but no shape."""


def config_differences(
    saved: RunConfig, ours: RunConfig, *, resume: bool, optimizer: bool
) -> Iterator[str]:
    """Settings that differ and that the weights or the optimizer state depend on.

    Args:
        saved: the checkpoint's.
        ours: this run's.
        resume: whether the run resumes the saved one rather than starting a new one from its
            weights; then settings that change what the model computes count, too.
        optimizer: whether optimizer state is loaded.
    """
    for name in _MODEL_SHAPE + (_MODEL_MATHS if resume else ()):
        yield from _line(name, getattr(saved.model, name), getattr(ours.model, name))
    groups = [run.model.key_value_heads for run in (saved, ours)]
    yield from _line("num_query_groups", *groups)
    for name in _MOE_SHAPE + (_MOE_MATHS if resume else ()):
        yield from _line(name, getattr(saved.moe, name), getattr(ours.moe, name))
    widths = [expert_width(run.model, run.moe) for run in (saved, ours)]
    yield from _line("moe_ffn_hidden_size", *widths)
    if saved.model.num_layers == ours.model.num_layers and saved.moe_layers != ours.moe_layers:
        yield from _line("moe_layer_freq", saved.moe.moe_layer_freq, ours.moe.moe_layer_freq)
    yield from _line("bf16", saved.train.bf16, ours.train.bf16)
    if resume and (_has_padding(saved) or _has_padding(ours)):
        name = "moe_ignore_padding_tokens"
        yield from _line(name, getattr(saved.moe, name), getattr(ours.moe, name))
    if resume:
        yield from _line("seq_length", saved.data.seq_length, ours.data.seq_length)
    if optimizer:
        yield from _line("optimizer", saved.optimizer.optimizer, ours.optimizer.optimizer)


def _has_padding(run: RunConfig) -> bool:
    """Whether rows may have padding; the objectives of a phase table are not known here."""
    return run.objective.has_padding or run.train.stages is not None


def _line(name: str, saved: Any, ours: Any) -> Iterator[str]:
    if saved != ours:
        yield f"{flag_of(name)}: {saved} in the checkpoint, {ours} in this run"


def identity_differences(saved: RunIdentity, ours: RunIdentity, *, resume: bool) -> Iterator[str]:
    """Differences of vocabulary, tokenizer and, if the run resumes the saved one, data.

    A converted checkpoint may not know its tokenizer, and never its data: an empty value fits any.
    """
    names = {
        "padded_vocab_size": "padded vocabulary",
        "tokenizer_hash": "tokenizer",
        "data_fingerprint": "training data",
    }
    for name, label in names.items():
        first, second = getattr(saved, name), getattr(ours, name)
        if first not in ("", second) and (resume or name != "data_fingerprint"):
            yield f"{label}: {first} in the checkpoint, {second} in this run"


def wanted_tensors(parts: Iterable[Part]) -> list[list[Any]]:
    """Kind, name, shape and dtype of the logical tensors that a rank needs, as JSON values."""
    found: dict[Name, list[Any]] = {}
    for part in parts:
        entry = [part.kind, part.name, list(part.shape), DTYPES[part.values.dtype]]
        found[part.kind, part.name] = entry
    return list(found.values())


def tensor_differences(
    saved: dict[Name, LogicalTensor], wanted: Iterable[list[Any]]
) -> Iterator[str]:
    """Tensors that are missing, too many, or of another shape or dtype.

    Args:
        saved: the checkpoint's tensors.
        wanted: of all ranks, from `wanted_tensors`. Kinds of which nothing is wanted are ignored:
            a run may leave optimizer state unread.
    """
    expected = {(kind, name): (tuple(shape), dtype) for kind, name, shape, dtype in wanted}
    kinds = {kind for kind, _ in expected}
    for kind in sorted(kinds - {kind for kind, _ in saved}):
        yield f"no {kind} in the checkpoint"
    present = {kind for kind, _ in saved}
    for (kind, name), (shape, dtype) in expected.items():
        tensor = saved.get((kind, name))
        what = name if kind == MODEL else f"{kind} of {name}"
        if tensor is None:
            if kind in present:
                yield f"{what}: missing in the checkpoint, {_described(shape, dtype)} in this run"
        elif (tensor.shape, tensor.dtype) != (shape, dtype):
            yield (
                f"{what}: {_described(tensor.shape, tensor.dtype)} in the checkpoint, "
                f"{_described(shape, dtype)} in this run"
            )
    for kind, name in sorted(saved.keys() - expected.keys()):
        if kind in kinds:
            what = name if kind == MODEL else f"{kind} of {name}"
            yield f"{what}: in the checkpoint, not in this run"


def _described(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype} {list(shape)}"
