"""The constraints of a layout, one function each, which raise `UsageError` with flag and value."""

from __future__ import annotations

from typing import get_args

from megatron_moe.config.parallel import ParallelConfig, RecomputedModule
from megatron_moe.config.precision import PrecisionConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UsageError


def degree(flag: str, value: int) -> int:
    """Check that a size is positive, and return it."""
    if value < 1:
        raise UsageError(flag, value, ">= 1")
    return value


def divides(flag: str, size: int, of_flag: str, total: int) -> None:
    """Check that ``total`` is a multiple of ``size``."""
    if total % size:
        raise UsageError(flag, size, f"a divisor of {of_flag} ({total}): {divisors(total)}")


def divisors(total: int) -> str:
    """The divisors of a size in words, the first twelve."""
    found = [str(d) for d in range(1, min(total, 4096) + 1) if total % d == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")


def expert_tensor_size(parallel: ParallelConfig, tp: int, has_moe: bool) -> int:
    """Ranks that share one expert: the flag's value, or else the tensor-parallel size."""
    given = parallel.expert_tensor_parallel_size
    if given is None:
        # Without experts there is nothing to split, and with TP the rank grid is the dense one.
        return tp
    degree("--expert-tensor-parallel-size", given)
    if not has_moe:
        raise UsageError(
            "--expert-tensor-parallel-size", given, "unset in a model without MoE layers"
        )
    return given


def check_world(world_size: int, tp: int, pp: int, ep: int, etp: int) -> None:
    """Check that the ranks can be divided, for the dense part and for the experts."""
    dense = "--tensor-model-parallel-size x --pipeline-model-parallel-size"
    expert = (
        "--expert-tensor-parallel-size x --expert-model-parallel-size"
        " x --pipeline-model-parallel-size"
    )
    if world_size % (tp * pp):
        raise UsageError(
            dense, f"{tp} x {pp}", f"a divisor of the {world_size} ranks: {divisors(world_size)}"
        )
    if world_size % (etp * ep * pp):
        raise UsageError(
            expert,
            f"{etp} x {ep} x {pp}",
            f"a divisor of the {world_size} ranks: {divisors(world_size)}",
        )


def check_widths(config: RunConfig, tp: int, padded_vocab_size: int | None) -> None:
    """Check that tensor parallelism divides the sizes that it splits."""
    flag, model = "--tensor-model-parallel-size", config.model
    divides(flag, tp, "--num-attention-heads", model.num_attention_heads)
    if model.group_query_attention:
        divides(flag, tp, "--num-query-groups", model.num_query_groups)
    divides(flag, tp, "--ffn-hidden-size", model.ffn_hidden_size)
    shared = config.moe.moe_shared_expert_intermediate_size
    if shared is not None:
        divides(flag, tp, "--moe-shared-expert-intermediate-size", shared)
    if padded_vocab_size is not None:
        divides(flag, tp, "the padded vocabulary", padded_vocab_size)
    if config.parallel.sequence_parallel:
        divides(flag, tp, "--seq-length", config.data.seq_length)


def check_experts(config: RunConfig, tp: int, ep: int, etp: int, has_moe: bool) -> None:
    """Check that there are experts to distribute, and that the degrees divide them."""
    if not has_moe:
        if ep > 1:
            raise UsageError("--expert-model-parallel-size", ep, "1 in a model without MoE layers")
        return
    by_layer = config.moe.moe_layer_num_experts is not None
    name = "--moe-layer-num-experts" if by_layer else "--num-experts"
    for experts in config.moe.numbers_of_experts:
        divides("--expert-model-parallel-size", ep, name, experts)
    width = config.moe.moe_ffn_hidden_size
    if width is None:
        divides("--expert-tensor-parallel-size", etp, "--ffn-hidden-size", _ffn(config))
    else:
        divides("--expert-tensor-parallel-size", etp, "--moe-ffn-hidden-size", width)
    if tp > 1 and not config.parallel.sequence_parallel:
        expected = f"set for MoE layers with --tensor-model-parallel-size {tp}"
        raise UsageError("--sequence-parallel", False, expected)
    _check_exchange_chunks(config, tp, ep, etp)


def _ffn(config: RunConfig) -> int:
    return config.model.ffn_hidden_size


def _check_exchange_chunks(config: RunConfig, tp: int, ep: int, etp: int) -> None:
    """Check that exchanges in chunks have ranks to exchange with, and a slot for each chunk."""
    flag, chunks = "--moe-a2a-overlap-chunks", config.moe.moe_a2a_overlap_chunks
    if chunks == 1:
        return
    if ep == 1:
        expected = "1 without expert parallelism"
        raise UsageError(flag, chunks, expected, "set --expert-model-parallel-size")
    if etp > 1:
        expected = f"1 with --expert-tensor-parallel-size {etp}"
        fix = "rows of ranks that share an expert are gathered in one piece"
        raise UsageError(flag, chunks, expected, fix)
    rows, tokens = config.train.micro_batch_size, config.data.seq_length
    from megatron_moe.moe.plan import capacity_of  # here, not above: rules need no torch

    capacity = capacity_of(config.moe, rows=rows, row_tokens=tokens, training=True)
    slots = capacity.groups * -(-capacity.slots // tp)
    if chunks > slots:
        raise UsageError(flag, chunks, f"<= {slots}, the slots of an expert on a rank")


def check_layers_in_bf16(precision: PrecisionConfig, layers_per_stage: int) -> None:
    """Check that layers kept in bf16 are those of one stage, as Megatron-Core requires."""
    if not precision.first_last_layers_bf16:
        return
    for flag, layers in (
        ("--num-layers-at-start-in-bf16", precision.num_layers_at_start_in_bf16),
        ("--num-layers-at-end-in-bf16", precision.num_layers_at_end_in_bf16),
    ):
        if layers > layers_per_stage:
            expected = f"<= {layers_per_stage}, the layers of one pipeline stage"
            raise UsageError(flag, layers, expected)


def check_interleaving(vp: int | None, pp: int, num_microbatches: int, step: int) -> None:
    """Check that the micro-batches of an interleaved schedule fill groups of the pipeline size."""
    if vp is not None and num_microbatches % pp:
        raise UsageError(
            "--global-batch-size",
            num_microbatches * step,
            f"a multiple of micro-batch x data-parallel x pipeline size ({step * pp})",
            "the interleaved schedule takes micro-batches in groups of the pipeline size",
        )


def global_batch_sequences(given: int | None, micro: int, dp: int) -> int:
    """Sequences of one step. Checks that they fill whole micro-batches on all replicas."""
    if given is None:
        return micro * dp
    if degree("--global-batch-size", given) % (micro * dp):
        raise UsageError(
            "--global-batch-size",
            given,
            f"a multiple of micro-batch x data-parallel size ({micro} x {dp} = {micro * dp})",
        )
    return given


def check_overlap(parallel: ParallelConfig) -> None:
    """Check what `--overlap-param-gather` needs: sharded parameters and overlapped gradients."""
    if not parallel.overlap_param_gather:
        return
    for flag, value in (
        ("--use-distributed-optimizer", parallel.use_distributed_optimizer),
        ("--overlap-grad-reduce", parallel.overlap_grad_reduce),
    ):
        if not value:
            raise UsageError(flag, value, "set with --overlap-param-gather")


def check_recomputation(
    parallel: ParallelConfig,
    chunk_layers: tuple[int, ...],
    has_moe: bool,
    has_shared: bool = True,
) -> None:
    """Check that the flags of recomputation fit each other and the layers of the model chunks."""
    method, layers = parallel.recompute_method, parallel.recompute_num_layers
    if parallel.recompute_granularity == "full":
        if method is None:
            raise UsageError(
                "--recompute-method", None, "uniform or block with --recompute-granularity full"
            )
        most = max(chunk_layers)
        if layers is None or not 1 <= layers <= most:
            expected = f">= 1 and <= {most}, the layers of one model chunk"
            raise UsageError("--recompute-num-layers", layers, expected)
        if method == "uniform" and any(count % layers for count in chunk_layers):
            counts = ", ".join(map(str, sorted(set(chunk_layers))))
            expected = f"a divisor of the layers of every model chunk ({counts})"
            raise UsageError("--recompute-num-layers", layers, expected)
        return
    for flag, value in (("--recompute-method", method), ("--recompute-num-layers", layers)):
        if value is not None:
            raise UsageError(flag, value, "used with --recompute-granularity full")
    if parallel.recompute_granularity != "selective":
        return
    if not parallel.recompute_modules:
        valid = ", ".join(get_args(RecomputedModule))
        raise UsageError("--recompute-modules", (), f"one or more of {valid}")
    for name in ("moe", "moe_act"):
        if name in parallel.recompute_modules and not has_moe:
            expected = "core_attn, layernorm or mlp"
            raise UsageError("--recompute-modules", name, expected, "no layer has experts")
    if "shared_experts" in parallel.recompute_modules and not (has_moe and has_shared):
        expected = "core_attn, layernorm, mlp or moe"
        raise UsageError(
            "--recompute-modules", "shared_experts", expected, "no layer has a shared expert"
        )
