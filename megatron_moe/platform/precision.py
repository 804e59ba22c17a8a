"""Whether a device can multiply in FP8."""

from __future__ import annotations

from megatron_moe.config import RunConfig
from megatron_moe.config.precision import ALIGNMENT
from megatron_moe.errors import UsageError
from megatron_moe.platform.transformer_engine import choose_impl


def check_precision(config: RunConfig, device_type: str) -> None:
    """Check that the FP8 GEMMs that are asked for exist, or are emulated.

    Args:
        config: format and layers.
        device_type: of the run's device.

    Raises:
        UsageError: FP8 on a CPU, or without layers of Transformer Engine, or with sizes that its
            GEMMs do not take.
    """
    precision = config.precision
    if precision.fp8_format is None or precision.fp8_emulate:
        return
    if device_type == "cpu":
        fix = "no CPU multiplies in FP8"
        raise UsageError("--fp8-format", precision.fp8_format, "used with --fp8-emulate", fix)
    chosen = choose_impl(config, device_type)
    if chosen.name == "local":
        expected = "used with --transformer-impl transformer_engine or --fp8-emulate"
        fix = f"layers are local ({chosen.reason})"
        raise UsageError("--fp8-format", precision.fp8_format, expected, fix)
    for flags, size in gemm_sizes(config).items():
        multiple = ALIGNMENT[precision.fp8_recipe]
        if size % multiple:
            expected = f"a multiple of {multiple} with --fp8-recipe {precision.fp8_recipe}"
            raise UsageError(flags, size, expected, "Transformer Engine quantizes whole blocks")


def gemm_sizes(config: RunConfig) -> dict[str, int]:
    """Rows and widths of the GEMMs of one rank, but for the rows of experts, which are padded.

    Returns:
        Sizes by the flags that they follow from.
    """
    model, moe, parallel = config.model, config.moe, config.parallel
    tp = parallel.tensor_model_parallel_size
    over = "" if tp == 1 else " / --tensor-model-parallel-size"
    heads, tokens = (
        model.num_attention_heads,
        config.train.micro_batch_size * config.data.seq_length,
    )
    sizes = {
        "--hidden-size": model.hidden_size,
        f"--num-attention-heads x --kv-channels{over}": heads * model.kv_channels // tp,
        f"--num-query-groups x --kv-channels{over}": model.key_value_heads
        * model.kv_channels
        // tp,
        f"--micro-batch-size x --seq-length{over}": tokens // tp,
    }
    if len(config.moe_layers) < model.num_layers:
        sizes[f"--ffn-hidden-size{over}"] = model.ffn_hidden_size // tp
    if config.moe_layers:
        etp = parallel.expert_tensor_parallel_size or tp
        width = moe.moe_ffn_hidden_size or model.ffn_hidden_size
        by = "" if etp == 1 else " / --expert-tensor-parallel-size"
        sizes[f"--moe-ffn-hidden-size{by}"] = width // etp
        shared = moe.moe_shared_expert_intermediate_size
        if shared is not None:
            sizes[f"--moe-shared-expert-intermediate-size{over}"] = shared // tp
    return sizes
