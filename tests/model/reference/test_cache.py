"""Reading with a cache gives what one pass over the whole row gives, logits and routing alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.reference import ReferenceOpenMoE

RELEASED = ModelConfig(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=12,
    num_attention_heads=2,
    kv_channels=6,
    max_position_embeddings=24,
)
PAPER = replace(
    RELEASED,
    ffn_variant="swiglu",
    untie_embeddings_and_output_weights=False,
    softmax_scale=None,
)
GROUPED = replace(
    RELEASED,
    num_attention_heads=6,
    group_query_attention=True,
    num_query_groups=3,
    qk_layernorm=True,
    qk_layernorm_scope="projection",
    softmax_scale=None,
)
MOE = MoEConfig(
    num_experts=5,
    moe_layer_freq="[0,1,1]",
    moe_shared_expert_intermediate_size=10,
    moe_eval_capacity_factor=None,
)
VOCAB = 30
VARIANTS = {
    "released": (RELEASED, MOE),
    "paper": (PAPER, replace(MOE, moe_shared_expert_placement="parallel")),
    "multi-query": (replace(RELEASED, group_query_attention=True), MOE),
    "grouped, norm of heads": (replace(GROUPED, qk_layernorm_scope="head"), MOE),
    "grouped, norm of projections": (GROUPED, MOE),
    "contextual": (RELEASED, replace(MOE, moe_router_type="contextual")),
    "norm": (RELEASED, replace(MOE, moe_router_type="norm", moe_router_norm_rank=2)),
    "token hash": (RELEASED, replace(MOE, moe_router_type="token_hash")),
    "biased sigmoids": (
        RELEASED,
        replace(MOE, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    ),
}


def _model(variant: str = "released") -> ReferenceOpenMoE:
    model, moe = VARIANTS[variant]
    reference = ReferenceOpenMoE(model, moe, VOCAB, seed=None, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():  # of order one, so that mistakes show
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return reference.eval()


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def _full(model: ReferenceOpenMoE, row: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [S, V] of a row alone, and by MoE layer the experts of each token [S, K]."""
    output = model(row[None], training_capacity=False)
    return output.logits[0], [routing.ids_TK for routing in output.routing]


@torch.no_grad()
def _read(model: ReferenceOpenMoE, tokens: Tensor, cuts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Likewise of rows [B, S], in pieces of the given lengths, through a cache."""
    cache = model.new_cache(tokens.shape[0])
    logits, ids = [], []
    for piece in tokens.split(cuts, dim=1):
        x, routing = model.hidden_states_with_cache(piece, cache)
        logits.append(model.logits(x))
        ids.append([r.ids_TK.unflatten(0, piece.shape) for r in routing])
    assert cache.lengths == [tokens.shape[1]] * tokens.shape[0]
    return torch.cat(logits, dim=1), [torch.cat(each, dim=1) for each in zip(*ids, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 4, 2], [7, 1, 1, 1, 1, 1]])
def test_reading_in_pieces_equals_one_pass(variant: str, cuts: list[int]) -> None:
    model, tokens = _model(variant), _tokens(2, 12)
    logits, ids = _read(model, tokens, cuts)
    for row in range(2):
        expected, routed = _full(model, tokens[row])
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
        for found, right in zip(ids, routed, strict=True):
            assert torch.equal(found[row], right)


@torch.no_grad()
def test_rows_of_different_lengths_are_as_each_alone() -> None:
    model = _model()
    rows = [list(row) for row in _tokens(3, 20)]
    cache = model.new_cache(3, slots=13)
    read = [0, 0, 0]
    # Prompts of different lengths, one missing at first; a token each; pieces of different lengths,
    # one empty, whose padding goes beyond the last slot.
    for counts in ([3, 8, 0], [1, 0, 5], [1, 1, 1], [5, 0, 2], [1, 1, 1]):
        padded = torch.full((3, max(counts)), 29)
        for row, count in enumerate(counts):
            padded[row, :count] = torch.tensor(rows[row][read[row] : read[row] + count])
        x, routing = model.hidden_states_with_cache(padded, cache, counts)
        logits = model.logits(x)
        kept = [r.kept_TK.unflatten(0, padded.shape) for r in routing]
        for row, count in enumerate(counts):
            assert all(k[row, :count].all() and not k[row, count:].any() for k in kept)
            if count == 0:
                continue
            expected, _ = _full(model, torch.tensor(rows[row][: read[row] + count]))
            new = slice(read[row], read[row] + count)
            torch.testing.assert_close(logits[row, :count], expected[new], rtol=1e-9, atol=1e-9)
            read[row] += count
    assert cache.lengths == read == [11, 10, 9]


@pytest.mark.parametrize("variant", ["released", "contextual"])
@torch.no_grad()
def test_rows_that_are_kept_go_on(variant: str) -> None:
    model, tokens = _model(variant), _tokens(3, 10)
    cache = model.new_cache(3, slots=10)
    model.hidden_states_with_cache(tokens[:, :7], cache, [7, 1, 6])
    cache.select_rows([2, 0])
    assert cache.lengths == [6, 7]
    rest = torch.stack([tokens[2, 6:9], tokens[0, 7:10]])
    x, _ = model.hidden_states_with_cache(rest, cache)
    for place, (row, start) in enumerate(((2, 6), (0, 7))):
        expected, _ = _full(model, tokens[row, : start + 3])
        torch.testing.assert_close(model.logits(x)[place], expected[start:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_full_cache_ends_exactly_at_its_last_slot() -> None:
    model, tokens = _model(), _tokens(1, 8)
    cache = model.new_cache(1, slots=8)
    model.hidden_states_with_cache(tokens, cache)
    with pytest.raises(UsageError, match=r"tokens of a row must be <= .* cache \(8\) \(got 9\)"):
        model.hidden_states_with_cache(tokens[:, :1], cache)
    assert cache.lengths == [8]


def test_what_a_cache_cannot_do_is_refused() -> None:
    model = _model()
    with pytest.raises(UsageError, match=r"slots of the KV cache must be .*\(24\) \(got 25\)"):
        model.new_cache(1, slots=25)
    cache = model.new_cache(2)
    for counts in ([1], [1, 4], [1, -1]):
        with pytest.raises(UsageError, match="new tokens"):
            model.hidden_states_with_cache(_tokens(2, 3), cache, counts)
    with pytest.raises(UsageError, match="new tokens"):
        model.hidden_states_with_cache(_tokens(3, 3), cache)
    model.moe = replace(MOE, moe_eval_capacity_factor=2.0)
    with pytest.raises(UsageError, match=r"--moe-eval-capacity-factor must be None .*got 2\.0"):
        model.hidden_states_with_cache(_tokens(2, 3), cache)


def test_the_cache_has_the_heads_of_keys() -> None:
    cache = _model("grouped, norm of projections").new_cache(2, slots=16)
    assert {tensor.shape for tensor in (*cache.keys, *cache.values)} == {(2, 3, 16, 6)}


def test_memory_is_taken_once() -> None:
    model = _model()
    cache = model.new_cache(2, slots=16)
    before = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    assert cache.keys[0].shape == (2, 2, 16, 6)
    with torch.no_grad():
        for token in _tokens(2, 16).split(1, dim=1):
            model.hidden_states_with_cache(token, cache)
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == before
