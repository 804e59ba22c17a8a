"""Weights as the family's own class has them; other files refused, nothing written, nothing run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.foreign import ForeignModel, open_foreign
from megatron_moe.errors import UsageError
from tests.analysis.families import SETTINGS, make, save

DOCUMENTATION = Path(__file__).parents[2] / "docs/analyses/families.md"
LAYERS = {
    "mixtral": [0, 1, 2],
    "olmoe": [0, 1, 2],
    "qwen2_moe": [1, 3],
    "qwen3_moe": [0, 2],
    "deepseek": [1, 2],
    "deepseek_v2": [1, 2],
    "deepseek_v3": [1, 2],
    "flex_olmo": [0, 1, 2],
    "glm4_moe": [1, 2],
    "gpt_oss": [0, 1, 2],
    "minimax_m2": [0, 1, 2],
}


def check(found: ForeignModel, model: Any) -> None:
    """Every matrix against the class's own parameters."""
    rest = set(range(len(model.model.layers))) - {weights.layer for weights in found.layers}
    assert set(found.dense) == rest
    for index, dense in found.dense.items():
        for name in ("gate", "up", "down"):
            own = getattr(model.model.layers[index].mlp, f"{name}_proj").weight
            assert torch.equal(getattr(dense, name).whole(), own)
    for weights in found.layers:
        block = model.model.layers[weights.layer].mlp
        router = getattr(block, "gate", None) or block.router
        assert torch.equal(weights.router.whole(), router.weight)
        logit_bias = getattr(router, "bias", None)
        assert (weights.router_bias is None) == (logit_bias is None)
        if logit_bias is not None:
            assert torch.equal(weights.router_bias.whole(), logit_bias)
        both, down = block.experts.gate_up_proj, block.experts.down_proj
        assert len(weights.experts) == found.settings.num_experts == len(both)
        for e, expert in enumerate(weights.experts):
            if logit_bias is None:
                (gate, up), its_down = both[e].chunk(2), down[e]
            else:  # GPT-OSS: transposed, in alternating columns
                gate, up, its_down = both[e].T[::2], both[e].T[1::2], down[e].T
                biases = block.experts.gate_up_proj_bias[e]
                assert torch.equal(expert.gate_bias.whole(), biases[::2])
                assert torch.equal(expert.up_bias.whole(), biases[1::2])
                assert torch.equal(expert.down_bias.whole(), block.experts.down_proj_bias[e])
            assert torch.equal(expert.gate.whole(), gate)
            assert torch.equal(expert.up.whole(), up)
            assert torch.equal(expert.up.rows(3, 7), up[3:7])
            assert torch.equal(expert.down.whole(), its_down)
        shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
        assert (weights.shared is None) == (shared is None)
        if shared is not None:
            for name in ("gate", "up", "down"):
                matrix = getattr(weights.shared, name).whole()
                assert torch.equal(matrix, getattr(shared, f"{name}_proj").weight)
        gated = getattr(block, "shared_expert_gate", None)
        assert (weights.shared_gate is None) == (gated is None)
        if gated is not None:
            assert torch.equal(weights.shared_gate.whole(), gated.weight)
        bias = getattr(router, "e_score_correction_bias", None)
        bias = getattr(block, "e_score_correction_bias", bias)
        assert (weights.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(weights.bias.whole(), bias)


@pytest.mark.parametrize("kind", all_families())
@pytest.mark.parametrize("original", [True, False], ids=["published names", "stacked"])
def test_weights_are_the_class_s_own(tmp_path: Path, kind: str, original: bool) -> None:
    model = make(kind, torch.bfloat16)
    save(model, tmp_path / "m", save_original_format=original, max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    found = open_foreign(tmp_path / "m")
    assert [weights.layer for weights in found.layers] == LAYERS[kind]
    check(found, model)


def test_pytorch_s_own_files(tmp_path: Path) -> None:
    model = make("olmoe")
    save(model, tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    check(open_foreign(tmp_path), model)


def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    save(make("olmoe"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin"):
        open_foreign(tmp_path)
    assert not (tmp_path / "ran").exists()


def _edit(path: Path, **changes: Any) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "llama"},
            r"model_type .* must be one of deepseek, .*, mixtral, olmoe, qwen2_m.* \(got 'llama'\)",
        ),
        ({"model_type": None}, r"model_type .* must be one of .* \(got None\)"),
        ({"model_type": ["mixtral"]}, "model_type"),
        ({"num_local_experts": 5}, r"gate.weight .* must be \[5, 16\] .* \(got \[4, 16\]\)"),
        ({"num_hidden_layers": 4}, "without model.layers.3"),
        ({"intermediate_size": 13}, r"shape of .*experts.0.w1.weight .* must be \[13, 16\]"),
        ({"hidden_size": "wide"}, r"hidden_size .* must be an integer .* \(got 'wide'\)"),
        ({"hidden_act": 7}, "config.json must be valid for Mixtral .*got .*hidden_act"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers .* must be an integer from 1 to 65536"),
        (
            {"num_experts_per_tok": 5},
            r"num_experts_per_tok .* must be <= .* experts \(4\) \(got 5\)",
        ),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    save(make("mixtral"), tmp_path)
    _edit(tmp_path / "config.json", **changes)
    with pytest.raises(UsageError, match=said):
        open_foreign(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    save(make("deepseek_v3"), tmp_path)
    file = tmp_path / "model.safetensors"
    values = load_file(file)
    del values["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(values, file)
    with pytest.raises(UsageError, match=r"without model\.layers\.2\.mlp\.gate\.e_score"):
        open_foreign(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        open_foreign(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json must be .* \(got 'missing'\)"):
        open_foreign(tmp_path)


def test_a_rule_that_the_class_does_not_have_is_refused(tmp_path: Path) -> None:
    save(make("deepseek_v2"), tmp_path)
    _edit(tmp_path / "config.json", topk_method="other")
    with pytest.raises(UsageError, match=r"topk_method of DeepSeek-V2 must be .* \(got 'other'\)"):
        open_foreign(tmp_path)


def test_without_the_package_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(
        UsageError, match=r"transformers must be installed .*'missing'.*megatron-moe\[hf\]"
    ):
        open_foreign(tmp_path)


def test_the_table_is_tested_whole() -> None:
    assert set(all_families()) == set(SETTINGS) == set(LAYERS)


def test_every_family_is_documented() -> None:
    rows = DOCUMENTATION.read_text().partition("|---|")[2].splitlines()
    listed = [row.split("`")[1] for row in rows if row.startswith("| `")]
    assert sorted(listed) == list(all_families())


def test_a_file_in_the_folder_is_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the documentation, for a model that is OLMoE under another name."""
    from megatron_moe.analysis import families, family

    recipe = (
        DOCUMENTATION.read_text().split("```python\n")[1].split("```")[0].replace("NewMoe", "Olmoe")
    )
    sizes = recipe.replace("rule=plain", 'width="intermediate_size", rule=plain')
    (tmp_path / "new_moe.py").write_text(sizes)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(family, "_FAMILIES", dict(family.all_families()))
    family.all_families.cache_clear()
    try:
        assert "new_moe" in family.all_families()
        save(make("olmoe"), tmp_path / "m")
        _edit(tmp_path / "m/config.json", model_type="new_moe")
        assert open_foreign(tmp_path / "m").settings.family.label == "New-MoE"
    finally:
        family.all_families.cache_clear()
        monkeypatch.undo()
        sys.modules.pop("megatron_moe.analysis.families.new_moe")


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def test_a_quantization_config_beside_plain_weights_says_nothing(tmp_path: Path) -> None:
    """As the published script that converts DeepSeek-V3 to bf16 leaves it.

    In fp32 here: the attention kernel for bf16 does not take widths as small as these.
    """
    from megatron_moe.analysis.foreign_routing import load_foreign

    model = make("deepseek_v3")
    save(model, tmp_path)
    _edit(tmp_path / "config.json", quantization_config=FP8)
    found = open_foreign(tmp_path)
    check(found, model)
    tokens = torch.arange(12).reshape(2, 6)
    logits = load_foreign(found).run(tokens, logits=True).logits_BSV
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_an_error_whatever_the_configuration_says(
    tmp_path: Path, named: bool, dtype: torch.dtype
) -> None:
    save(make("deepseek_v3"), tmp_path)
    if named:
        _edit(tmp_path / "config.json", quantization_config=FP8)
    values = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    values[name] = values[name].abs().to(dtype)
    values[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"o_proj\.weight.* (bf16 first|quantized weights)"):
        open_foreign(tmp_path)


def test_layers_behind_the_network_are_not_activated(tmp_path: Path) -> None:
    """DeepSeek-V3's layer for multi-token prediction: another MoE layer, and its own projection."""
    from megatron_moe.analysis.foreign import foreign_overview
    from megatron_moe.analysis.foreign_routing import load_foreign

    model = make("deepseek_v3")
    save(model, tmp_path)
    before = foreign_overview(open_foreign(tmp_path))
    values, extra = load_file(tmp_path / "model.safetensors"), 0
    for name, tensor in list(values.items()):
        if name.startswith("model.layers.2."):
            values[name.replace("layers.2.", "layers.3.")] = tensor.clone()
            extra += tensor.numel()
    values["model.layers.3.eh_proj.weight"] = torch.zeros(16, 32)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_foreign(tmp_path)
    found = foreign_overview(opened)
    assert (before["outside"], found["outside"]) == (0, extra + 16 * 32)
    assert found["parameters"] == before["parameters"] + extra + 16 * 32
    assert found["activated"] == before["activated"]
    tokens = torch.arange(12).reshape(2, 6)
    logits = load_foreign(opened).run(tokens, logits=True).logits_BSV
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)
