"""What the command prints of a checkpoint, and that damage and differences are found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.convert import inspection
from megatron_moe.convert import model as convert_model
from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.model import LogicalModel, of_tensor
from tests.analysis import families
from tests.convert.cases import CONFIG, VOCAB, model_of
from tools.inspect_checkpoint import main


def save(model: LogicalModel, directory: Path) -> Path:
    write(model, ConversionTarget(format="native", path=directory), lambda _: None)
    return directory


def changed(model: LogicalModel, name: str, tensor: torch.Tensor) -> LogicalModel:
    return replace(model, tensors={**model.tensors, name: of_tensor(tensor)})


def test_overview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(model_of(step=3), tmp_path)
    save(model_of(step=8, dtype=torch.bfloat16), tmp_path)
    assert main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["steps"], found["experts"]) == (8, [3, 8], 4)
    elements = sum(t.bytes for t in model_of().tensors.values()) // 4
    assert found["kinds"] == {"model": {"tensors": 49, "elements": elements, "bytes": 2 * elements}}
    assert found["padded_vocab_size"] == VOCAB
    assert main([str(tmp_path), "--ckpt-step", "3"]) == 0
    said = capsys.readouterr().out
    assert "rank-00000.safetensors" in said
    assert f"49 tensors  {elements} elements  {4 * elements} bytes" in said


def test_facts_of_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_model, "PART_BYTES", 100)  # joined from many parts
    router = torch.randn(4, 16) + 100.0
    odd = torch.ones(16)
    odd[3] = float("nan")
    model = changed(model_of(), "layers.1.moe.router.weight", router)
    save(changed(model, "final_norm.weight", odd), tmp_path)
    assert main([str(tmp_path), "--tensors", "*.router.weight", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["name"], second["name"]) == (
        "layers.1.moe.router.weight",
        "layers.3.moe.router.weight",
    )
    exact = router.double()
    assert first["mean"] == pytest.approx(float(exact.mean()), rel=1e-12)
    assert first["std"] == pytest.approx(float(exact.std(correction=0)), rel=1e-9)
    assert first["largest"] == float(exact.abs().max())
    assert main([str(tmp_path), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 49
    assert [line.split()[0] for line in lines if "NOT FINITE" in line] == ["final_norm.weight"]


def test_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    first = save(model, tmp_path / "first")
    assert main([str(first), "--compare", str(save(model, tmp_path / "same"))]) == 0
    assert capsys.readouterr().out == "no difference\n"
    down = model.tensors["layers.1.moe.experts.down"].whole().clone()
    down[3, 2, 1] += 0.5
    down[0, 0, 0] = float("nan")
    other = changed(model, "layers.1.moe.experts.down", down)
    config = replace(CONFIG, moe=replace(CONFIG.moe, moe_router_topk=1))
    second = save(replace(other, config=config), tmp_path / "second")
    assert main([str(first), "--compare", str(second)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "moe.moe_router_topk: 2 and 1",
        f"layers.1.moe.experts.down: 2 of {down.numel()} elements differ, by up to inf",
    ]
    third = save(model_of(dtype=torch.bfloat16), tmp_path / "third")
    assert main([str(first), "--compare", str(third)]) == 1
    assert "torch.float32 and torch.bfloat16" in capsys.readouterr().out


def test_a_setting_that_files_omit_at_its_default_is_compared_with_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not with nothing, which would print None for the one that has the default."""
    other = replace(CONFIG, moe=replace(CONFIG.moe, moe_router_type="other"))
    models = {Path("first"): model_of(), Path("second"): model_of(other)}
    monkeypatch.setattr(inspection, "read_native", lambda path, step: models[path])
    found = list(inspection.differences(Path("first"), Path("second"), (None, None)))
    assert found == ["moe.moe_router_type: 'linear' and 'other'"]


def test_differences_of_shape_and_of_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For programs, as JSON: another width, and a layer without experts."""
    first = save(model_of(), tmp_path / "first")
    pattern = replace(CONFIG.moe, moe_layer_freq="[0,0,0,1]")
    shape = replace(CONFIG.model, kv_channels=4)
    second = save(model_of(replace(CONFIG, model=shape, moe=pattern)), tmp_path / "second")
    assert main([str(first), "--compare", str(second), "--json"]) == 1
    found = {d["name"]: d["is"] for d in json.loads(capsys.readouterr().out)["differences"]}
    assert found["moe.moe_layer_freq"] == "'([0]*1+[1])*2' and '[0,0,0,1]'"
    assert found["model.kv_channels"] == "8 and 4"
    assert found["layers.0.attention.query.weight"] == "shape [24, 16] and [12, 16]"
    assert found["layers.1.moe.router.weight"] == "only in the first"
    assert found["layers.1.ffn.gate.weight"] == "only in the second"
    assert "layers.0.ffn_norm.weight" in found  # other values: drawn after other shapes
    assert main([str(first), "--compare", str(first), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"differences": []}
    assert main([str(first), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(first), "whole": True}


@pytest.mark.parametrize("damage", ["cut", "missing", "another length", "index", "manifest"])
def test_every_damage_is_found_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    step = save(model_of(), tmp_path / "run") / "iter_0000005"
    name = {"index": "index.json", "manifest": "manifest.json"}.get(damage)
    file = step / (name or "rank-00000.safetensors")
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "another length":
        file.write_bytes(data + b"x")
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.write_bytes(data.replace(b"1", b"2", 1))
    assert main([str(tmp_path / "run"), "--verify"]) == 1
    assert file.name in capsys.readouterr().err


def test_damage_is_exit_1_and_a_wrong_flag_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model_of(), tmp_path / "run")
    assert main([str(tmp_path / "run"), "--verify"]) == 0
    file = tmp_path / "run/iter_0000005/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for flags in (["--verify"], ["--tensors"], ["--compare", str(tmp_path / "run")]):
        assert main([str(tmp_path / "run"), *flags]) == 1
        assert "rank-00000.safetensors has SHA-256" in capsys.readouterr().err
    for flags in (["--ckpt-step", "9"], ["--compare-step", "3"]):
        assert main([str(tmp_path / "run"), *flags]) == 2
    assert main([str(tmp_path / "absent")]) == 2
    file.write_bytes(bytes(data[:-5]) + bytes([data[-5] ^ 1]) + bytes(data[-4:]))
    assert main([str(tmp_path / "run"), "--tensors", "nothing"]) == 2
    assert inspection.overview(tmp_path / "run")["step"] == 5


def test_another_program_s_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = families.make("deepseek_v3")
    families.save(module, tmp_path / "v3")
    assert main([str(tmp_path / "v3"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["experts"], found["top_k"]) == ("DeepSeek-V3", 8, 3)
    total = sum(p.numel() for p in module.parameters()) + 2 * 8  # and the biases, which are buffers
    assert found["parameters"] == total
    assert found["activated"] == total - 2 * (8 - 3) * 3 * 12 * 16
    assert found["bytes"] == 4 * total
    assert found["moe_layers"][1] == {
        "layer": 2,
        "router": [8, 16],
        "dtype": "float32",
        "expert_elements": 3 * 12 * 16,
        "shared_elements": 3 * 12 * 16,
    }
    assert main([str(tmp_path / "v3")]) == 0
    said = capsys.readouterr().out
    rule = "sigmoid over 8, choice by score plus bias, best 2 of 4 groups by their best two, best 3"
    assert f"{rule}, weights sum to 1, times 2.5" in said
    assert "router 8x16 float32  576 elements an expert, 576 shared" in said
    assert main([str(tmp_path / "v3"), "--tensors", "*.1.mlp.gate.weight", "--json"]) == 0
    fact = json.loads(capsys.readouterr().out)
    router = module.model.layers[1].mlp.gate.weight.detach().double()
    assert fact["std"] == pytest.approx(float(router.std(correction=0)), rel=1e-9)


def test_two_of_another_program_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = families.make("olmoe")
    first = families.save(module, tmp_path / "first")
    module.config.norm_topk_prob = True
    with torch.no_grad():
        module.model.layers[1].mlp.gate.weight[0, 0] += 0.5
    second = families.save(module, tmp_path / "second")
    assert main([str(first), "--compare", str(first)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main([str(first), "--compare", str(second)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "norm_topk_prob: False and True",
        "model.layers.1.mlp.gate.weight: 1 of 96 elements differ, by up to 0.5",
    ]
    for flags in (["--verify"], ["--ckpt-step", "3"]):
        assert main([str(first), *flags]) == 2
        assert "must be absent for " in capsys.readouterr().err
    (second / "config.json").write_text('{"model_type": "grok"}')
    assert main([str(second)]) == 2
    assert "must be one of deepseek, deepseek_v2" in capsys.readouterr().err
