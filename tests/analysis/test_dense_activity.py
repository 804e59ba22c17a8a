"""Activity of a dense model on chosen tokens, against loops over its own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.neuron_activity import NeuronActivity
from megatron_moe.analysis.base import Material
from megatron_moe.analysis.collectors.expert_passes import chosen_tokens
from megatron_moe.analysis.dense import open_dense
from megatron_moe.analysis.dense_activity import dense_activity
from tests.analysis.expert_cases import SEED, check_shown, passed, planted, setting_of, texts
from tests.analysis.test_dense import dense


@torch.no_grad()
def test_sums_against_the_class(tmp_path: Path) -> None:
    model = dense("qwen2", tmp_path / "dense", vocab_size=60)
    sample = texts(tmp_path, rows=5, length=8, batch_size=2)
    found = dense_activity(open_dense(tmp_path / "dense"), sample, SEED)
    assert found is not None
    active, inner, tokens = np.zeros((2, 20)), np.zeros((2, 20)), 0
    entered: dict[int, Any] = {}
    for layer, block in enumerate(model.model.layers):
        block.post_attention_layernorm.register_forward_hook(
            lambda _, given, said, layer=layer: entered.__setitem__(layer, said)
        )
    rows = np.concatenate([batch.tokens_BS for batch in sample.batches()])
    for (domain, row), chosen in chosen_tokens(sample, SEED).items():
        model(torch.from_numpy(rows[domain * 5 + row])[None])
        for position in chosen.positions_N[chosen.sampled_N]:
            tokens += 1
            for layer, block in enumerate(model.model.layers):
                x = entered[layer][0, position]
                act = torch.nn.functional.silu(block.mlp.gate_proj(x))
                active[layer] += (act.abs() > 0.001).numpy()
                inner[layer] += (act * block.mlp.up_proj(x)).abs().numpy()
    assert found.tokens == tokens == 2 * 5 * 7
    assert found.active_LF.tolist() == active.tolist()
    assert found.inner_LF == pytest.approx(inner, rel=1e-4)


@pytest.mark.parametrize("vocab", [60, 30])
def test_beside_experts(tmp_path: Path, vocab: int) -> None:
    dense("llama", tmp_path / "dense", vocab_size=vocab)
    model, sample = planted(tmp_path, "olmoe"), texts(tmp_path, rows=5)
    made, runner = passed(model, sample, ["expert_passes"], tmp_path)
    beside = open_dense(tmp_path / "dense")
    result = NeuronActivity().compute(
        Material(
            model=model,
            setting=setting_of(model, sample),
            collected=made,
            runner=runner,
            draws=2,
            beside=beside,
        )
    )
    check_shown(NeuronActivity(), {"a": result})
    tables = {table.name: table.columns for table in result.tables}
    if vocab == 30:  # ids up to 49
        assert "dense" not in tables
        assert any("its vocabulary lacks some of the tokens" in note for note in result.notes)
        return
    assert tables["dense"]["layer"] == [0, 1]
    active = result.numbers["active neurons of a token, dense model"]
    assert active == pytest.approx(np.mean(tables["dense"]["active"]))
    assert "In the dense model" in NeuronActivity().reading({"a": result})
