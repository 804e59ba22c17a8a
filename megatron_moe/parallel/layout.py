"""How a run is laid out over its ranks: every degree checked before any process group exists.

World = TP x PP x DP for the dense part and ETP x EP x PP x EDP for the experts of the same ranks
("parallel folding", arXiv 2504.14960): a pipeline stage's ranks are divided twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.moe import moe_layer_pattern
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A valid layout. Sizes are numbers of ranks unless said otherwise."""

    world_size: int
    tp: int
    """Tensor-parallel size of attention and dense feed-forward layers."""
    pp: int
    """Pipeline stages."""
    vp: int | None
    """Model chunks per rank of the interleaved schedule; `None` for one chunk."""
    ep: int
    """Expert-parallel size."""
    etp: int
    """Tensor-parallel size of one expert."""
    dp: int
    """Data-parallel size of everything but experts."""
    edp: int
    """Data-parallel size of experts."""
    sequence_parallel: bool
    num_microbatches: int
    """Micro-batches of one data-parallel rank in a step."""
    micro_batch_size: int
    """Sequences."""
    global_batch_size: int
    """Sequences."""
    seq_length: int
    """Tokens of one sequence."""
    layers_per_chunk: int

    @property
    def num_chunks(self) -> int:
        """Model chunks on each rank."""
        return self.vp or 1

    def layers_of(self, pp_rank: int, chunk: int) -> range:
        """The layers (0-based) of one chunk; chunk c of stage r follows chunk c of stage r - 1."""
        first = (chunk * self.pp + pp_rank) * self.layers_per_chunk
        return range(first, first + self.layers_per_chunk)


def resolve_layout(
    config: RunConfig, world_size: int, padded_vocab_size: int | None = None
) -> Layout:
    """Work out the layout of a run and check all of it.

    Args:
        config: the run's configuration.
        world_size: ranks.
        padded_vocab_size: V after padding, if known already.

    Raises:
        UsageError: the first rule that does not hold: flag, value and valid values.
    """
    parallel, model, moe = config.parallel, config.model, config.moe
    has_moe = any(moe_layer_pattern(moe.moe_layer_freq, model.num_layers))
    tp = _degree("--tensor-model-parallel-size", parallel.tensor_model_parallel_size)
    pp = _degree("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size)
    ep = _degree("--expert-model-parallel-size", parallel.expert_model_parallel_size)
    etp = _expert_tensor_size(parallel, tp, has_moe)
    _check_world(world_size, tp, pp, ep, etp)
    _check_widths(config, tp, padded_vocab_size)
    _check_experts(config, tp, ep, etp, has_moe)
    vp = _virtual_stages(parallel, model.num_layers, pp)
    layers_per_chunk = model.num_layers // (pp * (vp or 1))
    _check_overlap(parallel)
    _check_recomputation(parallel, layers_per_chunk)
    dp = world_size // (tp * pp)
    micro = _degree("--micro-batch-size", config.train.micro_batch_size)
    global_batch = _global_batch(config.train.global_batch_size, micro, dp)
    num_microbatches = global_batch // (micro * dp)
    _check_interleaving(vp, pp, num_microbatches, micro * dp)
    _check_rampup(config, global_batch, micro * dp, pp if vp else 1)
    return Layout(
        world_size=world_size,
        tp=tp,
        pp=pp,
        vp=vp,
        ep=ep,
        etp=etp,
        dp=dp,
        edp=world_size // (etp * ep * pp),
        # Over one rank it is the identity.
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        num_microbatches=num_microbatches,
        micro_batch_size=micro,
        global_batch_size=global_batch,
        seq_length=config.data.seq_length,
        layers_per_chunk=layers_per_chunk,
    )


def _degree(flag: str, value: int) -> int:
    if value < 1:
        raise UsageError(flag, value, "at least 1")
    return value


def _divides(flag: str, degree: int, of_flag: str, total: int) -> None:
    """`total` must be a multiple of `degree`."""
    if total % degree:
        raise UsageError(flag, degree, f"a divisor of {of_flag} ({total}): {_divisors(total)}")


def _divisors(total: int) -> str:
    found = [str(d) for d in range(1, min(total, 4096) + 1) if total % d == 0]
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "")


def _expert_tensor_size(parallel: ParallelConfig, tp: int, has_moe: bool) -> int:
    given = parallel.expert_tensor_parallel_size
    if given is None:
        # A model without experts has nothing to split; TP keeps its rank grid the dense one.
        return tp
    _degree("--expert-tensor-parallel-size", given)
    if not has_moe:
        raise UsageError(
            "--expert-tensor-parallel-size", given, "no value in a model without MoE layers"
        )
    return given


def _check_world(world_size: int, tp: int, pp: int, ep: int, etp: int) -> None:
    dense = "--tensor-model-parallel-size x --pipeline-model-parallel-size"
    expert = (
        "--expert-tensor-parallel-size x --expert-model-parallel-size"
        " x --pipeline-model-parallel-size"
    )
    if world_size % (tp * pp):
        raise UsageError(
            dense, f"{tp} x {pp}", f"a divisor of the {world_size} ranks: {_divisors(world_size)}"
        )
    if world_size % (etp * ep * pp):
        raise UsageError(
            expert,
            f"{etp} x {ep} x {pp}",
            f"a divisor of the {world_size} ranks: {_divisors(world_size)}",
        )


def _check_widths(config: RunConfig, tp: int, padded_vocab_size: int | None) -> None:
    flag, model = "--tensor-model-parallel-size", config.model
    _divides(flag, tp, "--num-attention-heads", model.num_attention_heads)
    _divides(flag, tp, "--ffn-hidden-size", model.ffn_hidden_size)
    shared = config.moe.moe_shared_expert_intermediate_size
    if shared is not None:
        _divides(flag, tp, "--moe-shared-expert-intermediate-size", shared)
    if padded_vocab_size is not None:
        _divides(flag, tp, "the padded vocabulary", padded_vocab_size)
    if config.parallel.sequence_parallel:
        _divides(flag, tp, "--seq-length", config.data.seq_length)


def _check_experts(config: RunConfig, tp: int, ep: int, etp: int, has_moe: bool) -> None:
    if not has_moe:
        if ep > 1:
            raise UsageError("--expert-model-parallel-size", ep, "1 in a model without MoE layers")
        return
    _divides("--expert-model-parallel-size", ep, "--num-experts", config.moe.num_experts)
    width = config.moe.moe_ffn_hidden_size
    if width is None:
        _divides("--expert-tensor-parallel-size", etp, "--ffn-hidden-size", _ffn(config))
    else:
        _divides("--expert-tensor-parallel-size", etp, "--moe-ffn-hidden-size", width)
    if tp > 1 and not config.parallel.sequence_parallel:
        raise UsageError(
            "--sequence-parallel",
            False,
            f"True: MoE layers with --tensor-model-parallel-size {tp} need it",
        )


def _ffn(config: RunConfig) -> int:
    return config.model.ffn_hidden_size


def _virtual_stages(parallel: ParallelConfig, num_layers: int, pp: int) -> int | None:
    """Chunks per rank, `None` for one; checks that the layers come out even."""
    layers_flag = "--num-layers-per-virtual-pipeline-stage"
    stages_flag = "--num-virtual-stages-per-pipeline-rank"
    layers = parallel.num_layers_per_virtual_pipeline_stage
    stages = parallel.num_virtual_stages_per_pipeline_rank
    _divides("--pipeline-model-parallel-size", pp, "--num-layers", num_layers)
    per_rank = num_layers // pp
    if layers is not None and stages is not None:
        raise UsageError(stages_flag, stages, f"no value beside {layers_flag} {layers}: give one")
    if layers is not None:
        _degree(layers_flag, layers)
        _divides(layers_flag, layers, "the layers of one pipeline rank", per_rank)
        stages = per_rank // layers
    if stages is None:
        return None
    _degree(stages_flag, stages)
    _divides(stages_flag, stages, "the layers of one pipeline rank", per_rank)
    if stages == 1:
        return None
    if pp == 1:
        flag, value = (layers_flag, layers) if layers is not None else (stages_flag, stages)
        raise UsageError(
            flag, value, "no value with --pipeline-model-parallel-size 1: interleaving needs stages"
        )
    return stages


def _check_interleaving(vp: int | None, pp: int, num_microbatches: int, step: int) -> None:
    if vp is not None and num_microbatches % pp:
        raise UsageError(
            "--global-batch-size",
            num_microbatches * step,
            f"a multiple of micro-batch x data-parallel x pipeline size ({step * pp})",
            "the interleaved schedule takes micro-batches in groups of the pipeline size",
        )


def _check_rampup(config: RunConfig, global_batch: int, step: int, stages: int) -> None:
    meaning = "micro-batch x data-parallel" + (" x pipeline" if stages > 1 else "") + " size"
    BatchSizes.of(config.train, global_batch).check_divides(step * stages, meaning)


def _global_batch(given: int | None, micro: int, dp: int) -> int:
    if given is None:
        return micro * dp
    if given < 1 or given % (micro * dp):
        raise UsageError(
            "--global-batch-size",
            given,
            f"a multiple of micro-batch x data-parallel size ({micro} x {dp} = {micro * dp})",
        )
    return given


def _check_overlap(parallel: ParallelConfig) -> None:
    if not parallel.overlap_param_gather:
        return
    for flag, value in (
        ("--use-distributed-optimizer", parallel.use_distributed_optimizer),
        ("--overlap-grad-reduce", parallel.overlap_grad_reduce),
    ):
        if not value:
            raise UsageError(flag, value, "True: --overlap-param-gather needs it")


def _check_recomputation(parallel: ParallelConfig, layers_per_chunk: int) -> None:
    method, layers = parallel.recompute_method, parallel.recompute_num_layers
    if parallel.recompute_granularity == "full":
        if method is None:
            raise UsageError(
                "--recompute-method", None, "uniform or block with --recompute-granularity full"
            )
        if layers is None or not 1 <= layers <= layers_per_chunk:
            raise UsageError(
                "--recompute-num-layers",
                layers,
                f"1 to {layers_per_chunk}, the layers of one model chunk",
            )
        return
    for flag, value in (("--recompute-method", method), ("--recompute-num-layers", layers)):
        if value is not None:
            raise UsageError(flag, value, "no value without --recompute-granularity full")
    if parallel.recompute_granularity == "selective" and not parallel.recompute_modules:
        raise UsageError("--recompute-modules", (), "at least one of core_attn, mlp, moe")
