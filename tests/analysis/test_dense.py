"""Dense models beside: their matrices, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_moe.analysis.dense import DENSE, open_dense
from megatron_moe.errors import UsageError

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def dense(kind: str, folder: Path, vocab_size: int = 30) -> Any:
    begin = CLASSES[kind]
    config = getattr(transformers, f"{begin}Config")(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
    )
    model = getattr(transformers, f"{begin}ForCausalLM")(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", DENSE)
def test_matrices_are_the_class_s_own(tmp_path: Path, kind: str) -> None:
    model = dense(kind, tmp_path / "beside")
    found = open_dense(tmp_path / "beside")
    assert (found.label, found.hidden_size, found.width) == ("beside", 16, 20)
    assert list(found.layers) == [0, 1]
    for layer, weights in found.layers.items():
        for name in ("gate", "up", "down"):
            own = getattr(model.model.layers[layer].mlp, f"{name}_proj").weight
            assert torch.equal(getattr(weights, name).whole(), own)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "mixtral"},
            r"model_type in .* must be one of llama, mistral, qwen2, qwen3",
        ),
        ({"num_hidden_layers": 3}, r"without model\.layers\.2\.mlp\.gate_proj"),
        ({"intermediate_size": 21}, r"gate_proj\.weight .* must be \[21, 16\]"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    dense("llama", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(UsageError, match=said):
        open_dense(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    values = load_file(file)
    values["model.layers.0.mlp.up_proj.weight"] = torch.zeros(20, 16, dtype=torch.int8)
    save_file(values, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"up_proj\.weight|int8|I8"):
        open_dense(tmp_path)
