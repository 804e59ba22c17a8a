"""A dense model beside: read by the command, part of what decides a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_moe.analysis.analyses.expert_similarity import ExpertSimilarity
from megatron_moe.analysis.dense import open_dense
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.run import RunOptions, analyse
from megatron_moe.analysis.sample import Sample
from tests.analysis.families import make, save
from tools.analyze_moe import main


def _dense(folder: Path, hidden: int = 16, layers: int = 2) -> Path:
    """A Mistral whose matrices are those of the first expert of the MoE model in `_saved`."""
    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.MistralForCausalLM(config)
    if hidden == 16:
        with torch.no_grad():
            for layer, own in zip(model.model.layers, make("mixtral").model.layers, strict=False):
                gate, up = own.mlp.experts.gate_up_proj[0].chunk(2)
                layer.mlp.gate_proj.weight.copy_(gate)
                layer.mlp.up_proj.weight.copy_(up)
                layer.mlp.down_proj.weight.copy_(own.mlp.experts.down_proj[0])
    model.save_pretrained(folder)
    return folder


def test_a_result_with_a_dense_model_is_another(tmp_path: Path) -> None:
    """The dense model lacks the last layer; each of its layers is the first expert there."""
    model = open_model(save(make("mixtral"), tmp_path / "moe"))
    sample = Sample(domains=(), seq_length=1, batch_size=1)
    dense = open_dense(_dense(tmp_path / "dense"))

    def names(beside: object) -> list[list[str]]:
        options = RunOptions(out=tmp_path / "out", beside=beside)  # type: ignore[arg-type]
        found = analyse(model, sample, [ExpertSimilarity()], options, lambda _: None)
        result = found["similarity"]
        if beside is not None:
            cosine_LPRR = result.arrays["cosine_LPRR"]
            assert cosine_LPRR[:2, :, 4, 0] == pytest.approx(1, abs=1e-6)
        return result.arrays["names_LR"].tolist()

    experts = [str(e) for e in range(4)]
    assert names(None) == [experts] * 3
    assert names(dense) == [[*experts, f"dense {i}"] for i in (0, 1, 1)]
    assert names(None) == [experts] * 3


def test_another_hidden_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(make("mixtral"), tmp_path / "moe")
    words = ["--load", str(tmp_path / "moe"), "--dense", str(_dense(tmp_path / "dense", 8))]
    with pytest.raises(SystemExit) as error:
        main([*words, "--out", str(tmp_path / "out")])
    assert error.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--dense must be a model with the hidden size of moe (16) (got 8)" in last
    assert not (tmp_path / "out").exists()
