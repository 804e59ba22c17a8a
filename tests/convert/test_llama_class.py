"""Upcycled from Llama, a model starts with the logits and the loss of `transformers` own Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megatron_moe.convert.formats import read
from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.upcycle import Upcycling, upcycle
from megatron_moe.model.reference import ReferenceOpenMoE
from tools.convert_checkpoint import main

VOCAB = 60
TOKENS = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(2))
HOW = Upcycling(mode="shared", num_experts=4, topk=2, layer_freq="[0,1,1]")


def llama(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random one, saved by its own class; returned in fp32 as it comes back from there."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.3,
    }
    options = {k: changes.pop(k) for k in ("max_shard_size",) if k in changes}
    torch.manual_seed(1)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
    made.to(dtype).save_pretrained(directory, **options)
    return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def outcome(model: LogicalModel, training: bool = False) -> tuple[Tensor, Tensor]:
    """Logits, and the mean loss over all next tokens."""
    reference = ReferenceOpenMoE(model.config.model, model.config.moe, VOCAB, seed=None)
    reference.load_logical((name, tensor.whole().float()) for name, tensor in model.tensors.items())
    with torch.no_grad():
        out = reference(TOKENS[:, :-1], TOKENS[:, 1:], training_capacity=training)
    assert out.cross_entropy_BS is not None
    return out.logits, out.cross_entropy_BS.mean()


def theirs(module: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = module(TOKENS, labels=TOKENS)
    return out.logits[:, :-1], out.loss


def same(model: LogicalModel, module: Any) -> None:
    for ours, expected in zip(outcome(model), theirs(module), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    # In training too, where the capacity is smaller: what drops would have added nothing.
    assert torch.equal(outcome(model, training=True)[0], outcome(model)[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
    ids=["2 key heads", "1 key head", "4 key heads", "wide heads", "slow rotation"],
)
def test_upcycled_it_starts_with_llama_s_logits_and_loss(
    tmp_path: Path, tied: bool, change: dict[str, Any]
) -> None:
    module = llama(tmp_path / "llama", tie_word_embeddings=tied, **change)
    dense = read("hf", tmp_path / "llama")
    made = upcycle(dense, HOW)
    assert "layers.2.moe.experts.gate" in made.tensors
    same(dense, module)
    same(made, module)


def test_bf16_in_many_files(tmp_path: Path) -> None:
    module = llama(tmp_path / "llama", torch.bfloat16, max_shard_size="10KB")
    assert len(list((tmp_path / "llama").glob("model-*.safetensors"))) > 3
    made = upcycle(read("hf", tmp_path / "llama"), HOW)
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    same(made, module)


@pytest.mark.parametrize("tied", [False, True])
def test_pytorch_s_own_file_by_the_command_line(tmp_path: Path, tied: bool) -> None:
    """And what is written, read again."""
    module = llama(tmp_path / "llama", tie_word_embeddings=tied)
    file = tmp_path / "llama/model.safetensors"
    torch.save(load_file(file), tmp_path / "llama/pytorch_model.bin")
    file.unlink()
    flags = ["--from", "hf", "--load", str(tmp_path / "llama"), "--upcycle", "shared"]
    flags += ["--num-experts", "4", "--moe-layer-freq", "[0,1,1]", "--upcycle-noise", "0.1"]
    assert main([*flags, "--to", "native", "--save", str(tmp_path / "moe"), "--verify-logits"]) == 0
    same(read("native", tmp_path / "moe"), module)


@pytest.mark.parametrize(("groups", "tied"), [(4, False), (2, False), (2, True)])
def test_trained_here_or_read_it_is_written_for_the_class(
    tmp_path: Path, groups: int, tied: bool
) -> None:
    changes = {"num_key_value_heads": groups, "head_dim": 16, "tie_word_embeddings": tied}
    module = llama(tmp_path / "llama", **changes)
    flags = ["--from", "hf", "--load", str(tmp_path / "llama"), "--to", "native"]
    assert main([*flags, "--save", str(tmp_path / "native")]) == 0
    flags = ["--from", "native", "--load", str(tmp_path / "native"), "--to", "hf"]
    flags += ["--architecture", "LlamaForCausalLM", "--save", str(tmp_path / "again")]
    assert main([*flags, "--verify-logits"]) == 0
    found, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "llama"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert type(again) is transformers.LlamaForCausalLM
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, module(TOKENS).logits)


def test_experts_are_not_written_for_llama_s_class(tmp_path: Path, capsys: Any) -> None:
    llama(tmp_path / "llama")
    flags = ["--from", "hf", "--load", str(tmp_path / "llama"), "--upcycle", "shared"]
    flags += ["--num-experts", "4", "--moe-layer-freq", "[0,1,1]"]
    flags += ["--to", "hf", "--architecture", "LlamaForCausalLM", "--save", str(tmp_path / "x")]
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert "--moe-layer-freq must be '[0]*3' for LlamaForCausalLM (got '[0,1,1]')" in said
    assert not (tmp_path / "x").exists()
    native = ["--from", "hf", "--load", str(tmp_path / "llama"), "--to", "native"]
    assert main([*native, "--architecture", "LlamaForCausalLM", "--save", str(tmp_path / "x")]) == 2
    assert "--architecture must be absent with --to native" in capsys.readouterr().err


def test_the_tokenizer_goes_with_it(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "llama" / name).write_text(name)
    files = read("hf", tmp_path / "llama").tokenizer_files
    assert [file.read_text() for file in files] == ["tokenizer.model", "tokenizer.json"]
