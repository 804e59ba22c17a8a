"""Which values each numeric flag can have: one table, checked before anything else is.

Rules between flags are where their meaning is (layout, plan, data); here is what no run can mean.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; `None` is always allowed where a flag may have it."""

    low: float
    high: float = math.inf
    above: bool = False
    """Whether ``low`` itself is left out."""
    below: bool = False
    """Whether ``high`` itself is left out."""

    def holds(self, value: float) -> bool:
        """Whether ``value`` is a finite number of the range; NaN never is."""
        low = self.low < value if self.above else self.low <= value
        high = value < self.high if self.below else value <= self.high
        return low and high and math.isfinite(value)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


COUNT = Range(1)
"""Something there is at least one of."""
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1, below=True)
"""A probability or a decay that must leave something."""

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        [
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "kv_channels",
            "max_position_embeddings",
            "num_experts",
            "moe_router_topk",
            "moe_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_min_capacity",
            "moe_capacity_group_size",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "num_virtual_stages_per_pipeline_rank",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "recompute_num_layers",
            "seq_length",
            "vocab_size",
            "make_vocab_size_divisible_by",
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "train_samples",
            "eval_interval",
            "exit_interval",
            "save_interval",
            "keep_last",
            "keep_every",
            "log_interval",
            "lr_decay_iters",
            "lr_wsd_decay_iters",
            "adafactor_min_dim",
            "ul2_inputs_length",
        ],
        COUNT,
    ),
    **dict.fromkeys(
        [
            "init_variance_scale",
            "embedding_init_method_std",
            "router_init_method_std",
            "logit_z_loss_coeff",
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
            "num_workers",
            "eval_iters",
            "domain_eval_iters",
            "seed",
            "lr",
            "min_lr",
            "lr_warmup_iters",
            "lr_warmup_init",
            "weight_decay",
            "clip_grad",
            "ckpt_step",
            "freeze_router_after",
            "vocab_extra_ids",
        ],
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        [
            "rotary_base",
            "norm_epsilon",
            "softmax_scale",
            "moe_expert_capacity_factor",
            "moe_eval_capacity_factor",
            "distributed_timeout_minutes",
            "adam_eps",
            "device_peak_tflops",
            "adafactor_decay_rate",
            "adafactor_clip_threshold",
        ],
        POSITIVE,
    ),
    **dict.fromkeys(
        ["attention_dropout", "hidden_dropout", "adam_beta1", "adam_beta2", "sgd_momentum"], SHARE
    ),
}
"""By field name, which is unique over all sections."""


def check_ranges(config: RunConfig) -> None:
    """Check every number of a configuration.

    Raises:
        UsageError: the first one outside its range, by flag.
    """
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            allowed = RANGES[field.name]
            if not allowed.holds(value):
                raise UsageError("--" + field.name.replace("_", "-"), value, str(allowed))
