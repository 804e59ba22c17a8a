"""From a dense model to experts: the loss at the start, what is copied, what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.convert.formats import ConversionTarget, write
from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.upcycle import Upcycling, upcycle
from megatron_moe.errors import UsageError
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.convert.cases import CONFIG, VOCAB, model_of
from tools.convert_checkpoint import main

DENSE = replace(CONFIG, moe=replace(CONFIG.moe, moe_layer_freq="[0]*4"))
HOW = Upcycling(mode="shared", num_experts=4, topk=2, layer_freq="[0,1,0,1]")


def dense_model(config: RunConfig = DENSE, dtype: torch.dtype = torch.float32) -> LogicalModel:
    return model_of(config, dtype)


def logits(model: LogicalModel, router: float | None = None) -> Tensor:
    """Of a prompt, nothing dropping; with the router's weights scaled."""
    moe = replace(model.config.moe, moe_eval_capacity_factor=None)
    reference = ReferenceOpenMoE(model.config.model, moe, VOCAB, seed=None)
    scale = 1.0 if router is None else router
    reference.load_logical(
        (name, t.whole().float() * (scale if "router" in name else 1.0))
        for name, t in model.tensors.items()
    )
    tokens = torch.tensor([[5, 90, 3, 3, 41, 17, 8, 66], [1, 2, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        return reference.eval()(tokens, training_capacity=False).logits


@pytest.mark.parametrize("variant", ["gated-swiglu", "swiglu"])
@pytest.mark.parametrize("change", [{}, {"noise": 0.5}, {"fresh": 0.5}])
def test_the_shared_way_starts_exactly_where_the_dense_model_is(
    variant: Any, change: dict[str, float]
) -> None:
    dense = dense_model(replace(DENSE, model=replace(DENSE.model, ffn_variant=variant)))
    assert torch.equal(logits(upcycle(dense, replace(HOW, **change))), logits(dense))


def test_the_copies_are_the_dense_layer_when_the_router_is_undecided() -> None:
    dense = dense_model()
    made = upcycle(dense, replace(HOW, mode="copy"))
    expected = logits(dense)
    torch.testing.assert_close(logits(made, router=0.0), expected, rtol=1e-4, atol=1e-5)
    # And the nearer to that, the smaller the router's weights are.
    apart = [float((logits(made, router=s) - expected).abs().max()) for s in (3.0, 0.3, 0.03)]
    assert apart[0] > 3 * apart[1] > 9 * apart[2] > 0


def test_what_is_copied() -> None:
    dense = dense_model(dtype=torch.bfloat16)
    made = upcycle(dense, HOW).tensors
    assert made["layers.0.ffn.up.weight"] is dense.tensors["layers.0.ffn.up.weight"]
    gate = dense.tensors["layers.1.ffn.gate.weight"].whole().t()
    assert all(torch.equal(each, gate) for each in made["layers.1.moe.experts.gate"].whole())
    assert not made["layers.1.moe.experts.down"].whole().any()
    norm = dense.tensors["layers.3.ffn_norm.weight"].whole()
    assert torch.equal(made["layers.3.shared_norm.weight"].whole(), norm)
    assert "layers.1.ffn.up.weight" not in made
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


def test_noise_is_each_expert_s_own_and_of_the_size_asked_for() -> None:
    dense = dense_model()
    how = replace(HOW, mode="copy", noise=0.1)
    made = upcycle(dense, how).tensors["layers.1.moe.experts.up"]
    plain = dense.tensors["layers.1.ffn.up.weight"].whole().t()
    noise = made.whole() - plain
    assert float(noise.std() / plain.std()) == pytest.approx(0.1, rel=0.1)
    assert (noise[0] - noise[1]).abs().max() > 0
    assert torch.equal(made.rows(2, 3)[0], made.whole()[2])  # in whatever order it is read
    other = upcycle(dense, replace(how, seed=7)).tensors["layers.1.moe.experts.up"].whole()
    assert not torch.equal(other, made.whole())


def test_fresh_units_are_the_same_in_all_matrices_of_an_expert() -> None:
    dense = dense_model()
    made = upcycle(dense, replace(HOW, mode="copy", fresh=0.25)).tensors
    width = DENSE.model.ffn_hidden_size
    for expert in range(4):
        plain = {n: dense.tensors[f"layers.1.ffn.{n}.weight"].whole().t() for n in ("gate", "up")}
        gate = (made["layers.1.moe.experts.gate"].whole()[expert] != plain["gate"]).any(0)
        up = (made["layers.1.moe.experts.up"].whole()[expert] != plain["up"]).any(0)
        down = dense.tensors["layers.1.ffn.down.weight"].whole().t() * 2  # E / k
        rows = (made["layers.1.moe.experts.down"].whole()[expert] != down).any(1)
        assert up.sum() == width // 4
        assert torch.equal(gate, up.repeat(2))  # both halves of the gate
        assert torch.equal(rows, up)
    first, second = made["layers.1.moe.experts.up"].whole()[:2]
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topk": 5}, r"--moe-router-topk must be between 1 and --num-experts \(4\) \(got 5\)"),
        ({"layer_freq": "[0]*4"}, "--moe-layer-freq"),
        ({"layer_freq": "[0,1]"}, "--moe-layer-freq"),
        ({"noise": -1.0}, r"--upcycle-noise must be a finite number >= 0 \(got -1.0\)"),
        ({"fresh": 1.5}, r"--upcycle-fresh must be from 0 to 1 \(got 1.5\)"),
    ],
)
def test_impossible_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        upcycle(dense_model(), replace(HOW, **change))


def test_a_model_with_experts_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"MoE layers of the case must be none for --upcycle \(got \[1, 3\]\)"
    ):
        upcycle(model_of(), HOW)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(dense_model(), ConversionTarget(format="native", path=tmp_path / "dense"), lambda _: None)
    flags = ["--from", "native", "--load", str(tmp_path / "dense"), "--to", "native"]
    flags += ["--save", str(tmp_path / "moe"), "--verify"]
    upcycling = ["--upcycle", "shared", "--num-experts", "4", "--moe-layer-freq", "[0,1,0,1]"]
    assert main([*flags, *upcycling, "--upcycle-noise", "0.01"]) == 0
    capsys.readouterr()
    assert main([*flags, "--num-experts", "4"]) == 2
    assert "--num-experts must be absent without --upcycle (got 4)" in capsys.readouterr().err
    assert main([*flags, "--upcycle", "copy"]) == 2
    assert "--num-experts must be given with --upcycle (got None)" in capsys.readouterr().err
