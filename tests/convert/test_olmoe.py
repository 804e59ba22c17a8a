"""OLMoE gives the logits, the routing and the loss of `transformers`' own class, here and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.convert.formats import ConversionTarget, read, write
from megatron_moe.convert.llama import ARCHITECTURES, configuration, to_architecture
from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.upcycle import Upcycling, upcycle
from megatron_moe.errors import UsageError
from megatron_moe.model.counting import count_parameters
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.checkpoint.layouts import Case, build, load
from tests.convert.cases import model_of
from tests.support.pool import Pool
from tools.convert_checkpoint import main

VOCAB = 96
TOKENS = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(2))


def olmoe(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random one, saved by its own class; returned in fp32 as it comes back from there."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "initializer_range": 0.3,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(1)
    made = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
    made.to(dtype).save_pretrained(directory)
    return transformers.OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def loaded(model: LogicalModel) -> ReferenceOpenMoE:
    reference = ReferenceOpenMoE(model.config.model, model.config.moe, VOCAB, seed=None)
    reference.load_logical((name, tensor.whole().float()) for name, tensor in model.tensors.items())
    return reference.eval()


@torch.no_grad()
def same(model: LogicalModel, module: Any) -> None:
    """Logits, mean loss, and the experts of every token in every layer."""
    theirs = module(TOKENS, labels=TOKENS, output_router_logits=True)
    for training in (False, True):  # nothing drops in either
        ours = loaded(model)(TOKENS[:, :-1], TOKENS[:, 1:], training_capacity=training)
        torch.testing.assert_close(ours.logits, theirs.logits[:, :-1], rtol=1e-4, atol=2e-5)
        assert ours.cross_entropy_BS is not None
        loss = torch.nn.functional.cross_entropy(
            theirs.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
        )
        torch.testing.assert_close(ours.cross_entropy_BS.mean(), loss, rtol=1e-4, atol=2e-5)
        for routing, logits in zip(ours.routing, theirs.router_logits, strict=True):
            top = logits.view(2, -1, 8)[:, :-1].flatten(0, 1).softmax(-1).topk(3)
            assert torch.equal(routing.ids_TK, top.indices)
            torch.testing.assert_close(routing.probs_TK, top.values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ],
    ids=["as many key heads", "2 key heads", "1 key head, tied"],
)
def test_logits_loss_and_routing_are_the_class_s(tmp_path: Path, change: dict[str, Any]) -> None:
    module = olmoe(tmp_path / "olmoe", **change)
    model = read("hf", tmp_path / "olmoe")
    same(model, module)
    scales = model.tensors["layers.1.attention.query_norm.weight"]
    assert scales.shape == (32,)
    # As published: one matrix for each expert.
    names = load_file(tmp_path / "olmoe/model.safetensors")
    assert "model.layers.2.mlp.experts.7.down_proj.weight" in names


def test_generation_with_a_cache_is_the_class_s(tmp_path: Path) -> None:
    module = olmoe(tmp_path / "olmoe", num_key_value_heads=2)
    expected = module.generate(TOKENS[:, :5], max_new_tokens=8, do_sample=False, eos_token_id=None)
    reference = loaded(read("hf", tmp_path / "olmoe"))
    cache, new, ids = reference.new_cache(2), TOKENS[:, :5], TOKENS[:, :5]
    with torch.no_grad():
        for _ in range(8):
            x, _ = reference.hidden_states_with_cache(new, cache)
            new = reference.logits(x[:, -1:]).argmax(-1)
            ids = torch.cat((ids, new), 1)
    assert torch.equal(ids, expected)


def test_the_settings_of_the_published_file(tmp_path: Path) -> None:
    """`config.json` of OLMoE-1B-7B-0924, whose sizes give the 6.92 billion of its paper."""
    config = configuration(PUBLISHED, ARCHITECTURES["OlmoeForCausalLM"], "config.json")
    counts = count_parameters(config.model, config.moe, PUBLISHED["vocab_size"])
    assert round(counts.total / 1e9, 2) == 6.92
    assert round(counts.activated / 1e9, 2) == 1.28
    assert (config.model.norm_epsilon, config.model.rotary_base) == (1e-5, 1e4)
    assert config.moe.moe_expert_capacity_factor is None
    assert config.moe.moe_eval_capacity_factor is None


PUBLISHED: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}


def test_by_the_command_line_and_through_training_s_format(tmp_path: Path) -> None:
    module = olmoe(tmp_path / "olmoe", torch.bfloat16)
    flags = ["--from", "hf", "--load", str(tmp_path / "olmoe"), "--to", "native"]
    assert main([*flags, "--save", str(tmp_path / "native"), "--verify-logits"]) == 0
    same(read("native", tmp_path / "native"), module)


def parallel_losses(rank: int, world_size: int, *, directory: Path) -> torch.Tensor:
    """Cross entropy [B, S] of the checkpoint, trained on two ranks that split heads and experts."""
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    flags |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    base, found = Case(2, flags).config(), read("native", directory).config
    checkpoint = replace(base.checkpoint, finetune=True)
    config = replace(base, model=found.model, moe=found.moe, checkpoint=checkpoint)
    run = build(Case(2, flags), config)
    load(run, directory, identity=None, with_optimizer=False, with_rng=False)
    with torch.no_grad():
        found_losses: torch.Tensor = run.wrapped[0](TOKENS[:, :-1], TOKENS[:, 1:])[0]
    return found_losses


def test_the_parallel_model_computes_the_class_s_losses(tmp_path: Path, pool: Pool) -> None:
    module = olmoe(tmp_path / "olmoe", num_key_value_heads=2)
    target = ConversionTarget(format="native", path=tmp_path / "native")
    write(read("hf", tmp_path / "olmoe"), target, lambda _: None)
    with torch.no_grad():
        logits = module(TOKENS[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.mT, TOKENS[:, 1:], reduction="none")
    for found in pool.run(parallel_losses, 2, directory=tmp_path / "native"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_topk_prob": True}, r"norm_topk_prob in .* must be False \(got True\)"),
        ({"clip_qkv": 8.0}, r"clip_qkv in .* must be None \(got 8.0\)"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 16}, r"head_dim in .* must be hidden_size .* \(got 16\)"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads .* divisor of .* \(got 3\)"),
        ({"num_experts": 9}, r"shape of model.layers.0.mlp.gate.weight .* must be \[9, 32\]"),
        ({"num_experts_per_tok": 9}, "--moe-router-topk"),
        ({"num_experts": "8"}, "num_experts .* must be an integer"),
    ],
)
def test_what_ours_cannot_be_is_rejected(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    olmoe(tmp_path / "olmoe")
    path = tmp_path / "olmoe/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=said):
        read("hf", tmp_path / "olmoe")


def test_written_again_it_is_the_class_s_own_file(tmp_path: Path) -> None:
    """Tensor for tensor, and loaded by the class, which computes the same."""
    module = olmoe(tmp_path / "olmoe", num_key_value_heads=2)
    flags = ["--from", "hf", "--load", str(tmp_path / "olmoe"), "--to", "hf"]
    flags += ["--architecture", "OlmoeForCausalLM", "--save", str(tmp_path / "again")]
    assert main([*flags, "--verify-logits"]) == 0
    found, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "olmoe"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert (again.config.pad_token_id, again.config.eos_token_id) == (None, None)  # no tokenizer
    assert type(again) is transformers.OlmoeForCausalLM
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, module(TOKENS).logits)


def test_a_model_of_this_project_is_loaded_by_the_class(tmp_path: Path) -> None:
    """With settings that Llama's and OLMoE's own files do not have: widths that differ, eps."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        kv_channels=8,
        group_query_attention=True,
        num_query_groups=2,
        qk_layernorm=True,
        qk_layernorm_scope="projection",
        ffn_variant="swiglu",
        softmax_scale=8**-0.5,
        norm_epsilon=1e-3,
        rotary_base=77.0,
    )
    moe = MoEConfig(
        num_experts=8,
        moe_layer_freq="1",
        moe_router_topk=3,
        moe_ffn_hidden_size=20,
        moe_shared_expert_intermediate_size=None,
        moe_expert_capacity_factor=1.0,
        moe_eval_capacity_factor=None,
    )
    run = RunConfig(model=model, moe=moe)
    made = model_of(run)
    target = ConversionTarget(
        format="hf", path=tmp_path / "hf", architecture="OlmoeForCausalLM", max_shard=4096
    )
    write(made, target, lambda _: None)
    module = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "hf").eval()
    reference = ReferenceOpenMoE(model, moe, VOCAB, seed=None)
    reference.load_logical((name, tensor.whole()) for name, tensor in made.tensors.items())
    with torch.no_grad():
        ours = reference.eval()(TOKENS, training_capacity=False).logits
        torch.testing.assert_close(module(TOKENS).logits, ours, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("model", {"softmax_scale": 1.0}, "--softmax-scale must be None for .* (got 1.0)"),
        ("model", {"qk_layernorm": False}, "--qk-layernorm must be True for .* (got False)"),
        ("model", {"qk_layernorm_scope": "head"}, "--qk-layernorm-scope must be 'projection'"),
        ("moe", {"moe_layer_freq": "[0,1]"}, "--moe-layer-freq must be '[1]*2' for"),
        ("moe", {"moe_shared_expert_intermediate_size": 8}, "--moe-shared-expert-intermediate"),
        ("moe", {"moe_eval_capacity_factor": 2.0}, "--moe-eval-capacity-factor must be None"),
        ("moe", {"moe_router_type": "toy"}, "--moe-router-type must be 'linear'"),
        ("model", {"kv_channels": 16}, "head_dim in config.json of OlmoeForCausalLM"),
    ],
)
def test_what_the_class_cannot_be_is_rejected(
    section: str, change: dict[str, Any], said: str
) -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        kv_channels=8,
        qk_layernorm=True,
        qk_layernorm_scope="projection",
        ffn_variant="swiglu",
        softmax_scale=None,
    )
    moe = MoEConfig(
        moe_layer_freq="[1]*2",
        moe_shared_expert_intermediate_size=None,
        moe_eval_capacity_factor=None,
    )
    run = RunConfig(model=model, moe=moe)
    assert to_architecture("OlmoeForCausalLM", run, VOCAB, "float32")["num_experts"] == 8
    other = replace(run, **{section: replace(getattr(run, section), **change)})
    with pytest.raises(UsageError) as error:
        to_architecture("OlmoeForCausalLM", other, VOCAB, "float32")
    assert all(part in str(error.value) for part in said.split(".*"))


def test_it_is_not_upcycled(tmp_path: Path) -> None:
    olmoe(tmp_path / "olmoe")
    how = Upcycling(mode="shared", num_experts=4, topk=2, layer_freq="[0,1,1]")
    with pytest.raises(UsageError, match=r"MoE layers of .* must be none for --upcycle"):
        upcycle(read("hf", tmp_path / "olmoe"), how)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_absent_fields_have_the_values_of_their_class(name: str) -> None:
    """A file with its required fields alone, against the same fields in the class of the file."""
    required: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    if name == "OlmoeForCausalLM":
        required |= {"num_experts": 8, "num_experts_per_tok": 3}
    architecture = ARCHITECTURES[name]
    known = {"LlamaForCausalLM": "LlamaConfig", "OlmoeForCausalLM": "OlmoeConfig"}
    theirs = getattr(transformers, known[name])(**required, num_key_value_heads=None)
    config = configuration(required, architecture, "config.json")
    model = config.model
    assert model.norm_epsilon == theirs.rms_norm_eps
    assert model.max_position_embeddings == theirs.max_position_embeddings
    assert model.rotary_base == theirs.rope_parameters["rope_theta"]
    assert model.key_value_heads == theirs.num_key_value_heads
    assert model.kv_channels == (getattr(theirs, "head_dim", None) or 48 // 4)
    assert model.untie_embeddings_and_output_weights == (not theirs.tie_word_embeddings)
    for field, only in architecture.only.items():
        assert getattr(theirs, field) == only, field
    for field, default in architecture.defaults.items():
        assert getattr(theirs, field) == default, field
    if name == "OlmoeForCausalLM":
        assert config.moe.moe_aux_loss_coeff == theirs.router_aux_loss_coef
