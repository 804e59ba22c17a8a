"""What a step that is captured in a CUDA graph cannot have (`--cuda-graph`).

A captured step repeats what the device did, with the same memory and the same numbers from the
host. So nothing may depend on what the host does anew in each step, and shapes must stay.
"""

from __future__ import annotations

from megatron_moe.config.run import RunConfig, flag_of
from megatron_moe.errors import UsageError

ANEW = "the host decides it anew in each step"
SHAPES = "the number or the shape of micro-batches changes"
UNTRIED = "it has not been captured yet"
STATES = "Megatron-Core reads random states around the embedding"
WAITS = "the host waits for the device"


def _obstacles(config: RunConfig) -> list[tuple[str, object, object, str]]:
    """Fields with the value that they have, the only one that can be captured, and why."""
    model, moe, parallel, train = config.model, config.moe, config.parallel, config.train
    log, objective = config.logging, config.objective
    balance = moe.moe_router_load_balancing_type
    kinds = balance if isinstance(balance, tuple) else (balance,)
    per_step = next((k for k in kinds if k in ("global_aux_loss", "quantile_balancing")), None)
    policy = moe.moe_token_drop_policy
    return [
        ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size, 1, UNTRIED),
        ("sequence_parallel", parallel.sequence_parallel, False, STATES),
        ("overlap_grad_reduce", parallel.overlap_grad_reduce, False, ANEW),
        ("overlap_param_gather", parallel.overlap_param_gather, False, ANEW),
        ("recompute_granularity", parallel.recompute_granularity, None, "it saves random states"),
        ("fp8_format", config.precision.fp8_format, None, UNTRIED),
        ("hidden_dropout", model.hidden_dropout, 0.0, ANEW),
        ("attention_dropout", model.attention_dropout, 0.0, ANEW),
        ("moe_input_jitter_eps", moe.moe_input_jitter_eps, None, ANEW),
        ("moe_router_force_load_balancing", moe.moe_router_force_load_balancing, False, ANEW),
        ("moe_router_enable_expert_bias", moe.moe_router_enable_expert_bias, False, ANEW),
        ("moe_router_document_pool", moe.moe_router_document_pool, None, ANEW),
        ("moe_router_load_balancing_type", per_step, None, ANEW),
        ("moe_token_drop_policy", None if policy in ("position", "probs") else policy, None, ANEW),
        ("moe_router_type", moe.moe_router_type, "linear", UNTRIED),
        ("moe_token_dispatcher_type", moe.moe_token_dispatcher_type, "alltoall", WAITS),
        ("rampup_batch_size", train.rampup_batch_size, None, SHAPES),
        ("stages", train.stages, None, SHAPES),
        ("reset_position_ids", objective.reset_position_ids, False, UNTRIED),
        ("reset_attention_mask", objective.reset_attention_mask, False, UNTRIED),
        ("routing_trace_dir", log.routing_trace_dir, None, "the host writes every pass"),
        ("routing_replay_dir", log.routing_replay_dir, None, "the host reads every pass"),
        ("timing_log_level", max(log.timing_log_level, 1), 1, WAITS),
    ]


def check_graph(config: RunConfig) -> None:
    """Check that nothing stands against `--cuda-graph`.

    Raises:
        UsageError: the first setting with which a step cannot be captured.
    """
    if config.parallel.cuda_graph == "none":
        return
    with_flag, found = "with --cuda-graph full", config.parallel.transformer_impl
    if found != "local":
        raise UsageError("--transformer-impl", found, f"local {with_flag}", UNTRIED)
    for name, value, capturable, why in _obstacles(config):
        if value != capturable:
            raise UsageError(flag_of(name), value, f"{_words(name, capturable)} {with_flag}", why)


def _words(name: str, capturable: object) -> str:
    """What a setting must be."""
    if name in ("moe_token_drop_policy", "moe_router_load_balancing_type"):
        return "another one"
    if name == "timing_log_level":
        return "0 or 1"
    return "unset" if capturable is None or capturable is False else str(capturable)
