"""What to run: configuration dataclasses, presets and the command line generated from them."""

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, capacity_group_tokens, moe_layer_pattern
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.precision import PrecisionConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "TrainConfig",
    "capacity_group_tokens",
    "moe_layer_pattern",
]
