"""Megatron-LM checkpoints, written by Megatron-Core itself: the same logits here as there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.convert import model as convert_model
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.model import LogicalModel
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.convert.megatron_ranks import ITERATION, MODEL, save_checkpoint, tokens
from tests.convert.test_formats import Silent, same
from tests.support.pool import Pool


def logits_of(model: LogicalModel) -> torch.Tensor:
    """Of the reference model, in evaluation."""
    moe, size = model.config.moe, model.vocab_size
    reference = ReferenceOpenMoE(model.config.model, moe, size, seed=None)
    reference.load_logical((n, t.whole().float()) for n, t in model.tensors.items())
    with torch.no_grad():
        return reference.eval()(tokens(), training_capacity=False).logits


SINGLE = {"singleton_local_shards": True}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # World size, arguments of `save_checkpoint`, settings of the model.
    "layers and experts stacked, TP 2 and EP 2": (
        2,
        {"tp": 2, "ep": 2},
        {"moe_shared_expert_intermediate_size": 20},
    ),
    "a tensor for each layer, tied": (
        1,
        {"tied": True},
        {"num_layers": 3, "moe_layer_freq": [0, 1, 0]},
    ),
    "a tensor for each layer, expert and half of a gated matrix": (
        2,
        {"ep": 2, "metadata": SINGLE},
        {"moe_shared_expert_intermediate_size": 20},
    ),
    "dense layers between, TP 2": (2, {"tp": 2}, {"num_layers": 4, "moe_layer_freq": 2}),
    "weights normalised over the choices, grouped queries, norms of queries and keys": (
        2,
        {"tp": 2, "ep": 2},
        {"moe_router_pre_softmax": False, "num_query_groups": 2, "qk_layernorm": True},
    ),
    "no experts": (1, {}, {"num_moe_experts": None, "moe_ffn_hidden_size": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_as_megatron_core(
    case: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_model, "PART_BYTES", 300)  # a few rows at a time
    world_size, how, settings = CASES[case]
    shares = pool.run(
        save_checkpoint, world_size, path=str(tmp_path / "m"), model=MODEL | settings, **how
    )
    expected = torch.cat(shares, dim=-1) if how.get("tp", 1) > 1 else shares[0]
    model = read("megatron", tmp_path / "m")
    assert model.step == ITERATION
    write(model, ConversionTarget(format="native", path=tmp_path / "native"), Silent)
    found = read("native", tmp_path / "native")
    same(found, model)
    logits = logits_of(found)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
