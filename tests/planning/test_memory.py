"""Memory of parameters, gradients and optimizer state, worked by hand."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config import (
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning.memory import CATEGORIES, MemoryByCategory, state_memory

VOCAB = 128
CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        kv_channels=16,
        ffn_variant="swiglu",
    ),
    moe=MoEConfig(num_experts=4, moe_layer_freq="[0,1]", moe_shared_expert_intermediate_size=128),
    train=TrainConfig(bf16=True),
    parallel=ParallelConfig(
        tensor_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        use_distributed_optimizer=True,
    ),
)
DENSE = (2 * 4 * 64 * 64 + 2 * 3 * 64 * 128 + 2 * 128 * 64) // 2 + 4 * 64 + 6 * 64
"""Two attentions, a dense layer and the shared expert, both embeddings, half of each; and, whole,
the router and six norms."""
EXPERT = 4 * 3 * 64 * 128 // 2
"""Two of four experts."""


def _states(config: RunConfig, ranks: int) -> list[MemoryByCategory]:
    return list(state_memory(config, resolve_layout(config, ranks, VOCAB), VOCAB))


def test_state_worked_by_hand() -> None:
    """Four ranks: TP 2 x DP 2, EP 2 x EDP 2. Both buffers are multiples of 128 already."""
    (state,) = _states(CONFIG, 4)
    assert (DENSE, EXPERT) == (49792, 49152)
    assert state.parameters == 2 * (DENSE + EXPERT)
    assert state.gradients == 4 * (DENSE + EXPERT)
    assert state.optimizer == 12 * (DENSE + EXPERT) // 2
    assert state.total == 2 * 98944 + 4 * 98944 + 6 * 98944


def test_state_of_experts_is_shared_by_fewer_ranks() -> None:
    """Four ranks, EP 2: four share the state of dense parameters, two that of experts."""
    parallel = ParallelConfig(expert_model_parallel_size=2, use_distributed_optimizer=True)
    (state,) = _states(replace(CONFIG, parallel=parallel), 4)
    dense = 2 * (DENSE - 640) + 640
    assert state.optimizer == 12 * dense // 4 + 12 * EXPERT // 2


def test_unsharded_state_is_18_bytes_a_parameter_in_bf16_and_16_in_fp32() -> None:
    parallel = replace(CONFIG.parallel, use_distributed_optimizer=False)
    (bf16,) = _states(replace(CONFIG, parallel=parallel), 4)
    assert bf16.total == 18 * (DENSE + EXPERT)
    (fp32,) = _states(replace(CONFIG, parallel=parallel, train=TrainConfig()), 4)
    assert fp32.total == 16 * (DENSE + EXPERT)


def test_buffers_are_padded_for_the_ranks_that_share_them() -> None:
    """Over 3 data-parallel ranks a buffer is a multiple of 384 elements."""
    parallel = ParallelConfig(use_distributed_optimizer=True)
    (state,) = _states(replace(CONFIG, parallel=parallel), 3)
    dense, expert = 2 * (DENSE - 640) + 640, 2 * EXPERT
    padded = sum(-(-held // 384) * 384 for held in (dense, expert))
    assert padded > dense + expert
    assert (state.gradients, state.optimizer) == (4 * padded, 4 * padded)


def test_adafactor_keeps_rows_and_columns() -> None:
    """One rank, factored from 64 on: every matrix but the router [4, 64] and the norms."""
    optimizer = OptimizerConfig(optimizer="adafactor", adafactor_min_dim=64)
    config = replace(CONFIG, parallel=ParallelConfig(), optimizer=optimizer, train=TrainConfig())
    (state,) = _states(config, 1)
    attention, ffn = 2 * 4 * (64 + 64), 2 * 3 * (64 + 128)
    experts, embeddings = 4 * 3 * (64 + 128), 2 * (128 + 64)
    kept = attention + ffn + experts + embeddings + 4 * 64 + 6 * 64
    assert state.optimizer == 4 * kept


def test_muon_keeps_one_moment_of_matrices_and_two_of_all_else() -> None:
    """Two ranks: their parts of matrices, and of the rest the embeddings alone are divided."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    config = replace(
        CONFIG, parallel=parallel, optimizer=OptimizerConfig(optimizer="muon"), train=TrainConfig()
    )
    (state,) = _states(config, 2)
    matrices = 2 * 4 * 64 * 64 + 2 * 3 * 64 * 128 + 4 * 3 * 64 * 128
    others = 2 * 128 * 64 // 2 + 4 * 64 + 6 * 64
    assert state.optimizer == 4 * matrices // 2 + 8 * others


def test_sum_and_names() -> None:
    one = MemoryByCategory(parameters=1, logits=2)
    assert (one + one).to_dict() == {
        **dict.fromkeys(CATEGORIES, 0),
        "parameters": 2,
        "logits": 4,
    } | {"total": 6}
