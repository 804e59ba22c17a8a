"""Muon against singular value decompositions of whole matrices, against torch's, and in saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config import OptimizerConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import initial_tensor, logical_parameters
from megatron_moe.model.sharding.shards import ParamShard, Piece
from megatron_moe.training.optim.muon import Muon
from megatron_moe.training.optim.orthogonalize import COEFFICIENTS, coefficients
from tests.parity.cases import LAYOUTS, SLOW_LAYOUTS, VOCAB
from tests.training.optim.adafactor_ranks import RATE, logical_gradient
from tests.training.optim.muon_ranks import muon_config, muon_load, muon_save, muon_steps
from tests.training.optim.test_adafactor import assembled

_FLAGS = {layout.name: (layout.world_size, layout.flags) for layout in LAYOUTS}
_EIGHT = {layout.name: (layout.world_size, layout.flags) for layout in SLOW_LAYOUTS}
_QUICK = ("1", "TP2", "TP2xEP2")
_SLOW = ("TP2xETP2", "PP2", "DP2", "EP2", "EP2xETP2")
DECAY = 0.1


def decomposed(matrix: Tensor, settings: OptimizerConfig) -> Tensor:
    """What Newton-Schulz computes: its polynomials of the singular values."""
    norm = float(matrix.norm())
    if norm == 0:
        return matrix
    left, values, right = torch.linalg.svd(matrix / norm, full_matrices=False)
    for a, b, c in coefficients(settings.muon_coefficient_type, settings.muon_num_ns_steps):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


def scale(out: int, into: int, settings: OptimizerConfig) -> float:
    found = {
        "spectral": max(out, into) ** 0.5,
        "unit_rms_norm": (out / into) ** 0.5,
        "shape_scaling": max(1, out / into) ** 0.5,
    }[settings.muon_scale_mode]
    return found * settings.muon_extra_scale_factor


def update_of(name: str, momentum: Tensor, blocks: int, settings: OptimizerConfig) -> Tensor:
    """Of a whole logical tensor; experts and blocks of gates one by one."""
    expert = "experts" in name
    parts = []
    for matrix in momentum if expert else [momentum]:
        count = blocks if "gate" in name else 1
        pieces = matrix.chunk(count, dim=1 if expert else 0)
        out, into = pieces[0].shape[::-1] if expert else pieces[0].shape
        found = [scale(out, into, settings) * decomposed(piece, settings) for piece in pieces]
        parts.append(torch.cat(found, dim=1 if expert else 0))
    return torch.stack(parts) if expert else parts[0]


def plain(count: int, **setup: Any) -> dict[tuple[str, str], Tensor]:
    """Weights and state of all logical tensors after ``count`` steps, in fp64."""
    config = muon_config(**setup)
    settings, found = config.optimizer, {}
    for name, parameter in logical_parameters(config.model, config.moe, VOCAB).items():
        weight = initial_tensor(name, parameter, config.train.seed)
        weight = (weight.bfloat16() if setup["bf16"] else weight).double()
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        orthogonal = parameter.kind in ("attention", "ffn", "expert", "shared")
        for number in range(count):
            gradient = logical_gradient(name, parameter.shape, number).double()
            if weight.dim() > 1:
                weight = weight * (1 - RATE * DECAY)
            if orthogonal:
                first = settings.muon_momentum * first + (1 - settings.muon_momentum) * gradient
                source = first
                if settings.muon_use_nesterov:
                    source = settings.muon_momentum * first
                    source = source + (1 - settings.muon_momentum) * gradient
                blocks = config.model.gate_blocks
                weight = weight - RATE * update_of(name, source, blocks, settings)
                continue
            b1, b2 = settings.adam_beta1, settings.adam_beta2
            first = b1 * first + (1 - b1) * gradient
            second = b2 * second + (1 - b2) * gradient**2
            root = (second / (1 - b2 ** (number + 1))).sqrt() + settings.adam_eps
            weight = weight - RATE * first / (1 - b1 ** (number + 1)) / root
        found["weight", name] = weight
        if orthogonal:
            found["momentum_buffer", name] = first
        else:
            found["exp_avg", name], found["exp_avg_sq", name] = first, second
    return found


def require_close(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key].double(), tensor, rtol=1e-4, atol=2e-5 if key[0] == "weight" else 1e-8,
            msg=lambda text, key=key: f"{key}: {text}",
        )  # fmt: skip


def setup_of(flags: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"flags": flags, "variant": "released", "bf16": False, "settings": settings}


@pytest.mark.parametrize(
    "name", [*_QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW)]
)
def test_every_layout_is_the_decomposition(name, pool):
    world, flags = _FLAGS[name]
    found = pool.run(muon_steps, world, count=3, **setup_of(flags))
    require_close(assembled(found), plain(3, **setup_of(flags)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_EIGHT))
def test_layouts_of_eight_ranks(name, pool):
    world, flags = _EIGHT[name]
    found = pool.run(muon_steps, world, count=2, **setup_of(flags))
    require_close(assembled(found), plain(2, **setup_of(flags)))


SETTINGS = {
    "summed over ranks": {"muon_tp_mode": "distributed"},
    "Nesterov, outputs over inputs": {
        "muon_use_nesterov": True,
        "muon_scale_mode": "unit_rms_norm",
        "muon_momentum": 0.8,
    },
    "simple, at least one": {
        "muon_coefficient_type": "simple",
        "muon_num_ns_steps": 3,
        "muon_scale_mode": "shape_scaling",
        "muon_extra_scale_factor": 0.2,
    },
}


SLOW_SETTINGS = [pytest.param(name, marks=pytest.mark.slow) for name in list(SETTINGS)[1:]]


@pytest.mark.parametrize("name", [next(iter(SETTINGS)), *SLOW_SETTINGS])
def test_settings_over_two_ranks(name, pool):
    world, flags = _FLAGS["TP2xETP2"]
    setup = setup_of(flags, **SETTINGS[name])
    found = pool.run(muon_steps, world, count=2, **setup)
    require_close(assembled(found), plain(2, **setup))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper-port", "grouped-head-norm", "grouped-projection-norm"])
def test_other_models(variant, pool):
    world, flags = _FLAGS["TP2"]
    setup = {**setup_of(flags), "variant": variant, "bf16": variant == "paper-port"}
    found = pool.run(muon_steps, world, count=2, **setup)
    require_close(assembled(found), plain(2, **setup))


@pytest.mark.parametrize("name", ["1", "TP2"])
def test_query_key_and_value_as_one_matrix(name, pool):
    """All their rows below each other, whole also over two ranks."""
    world, flags = _FLAGS[name]
    setup = setup_of(flags, muon_split_qkv=False)
    found = assembled(pool.run(muon_steps, world, count=1, **setup))
    config = muon_config(**setup)
    table = logical_parameters(config.model, config.moe, VOCAB)
    names = [f"layers.0.attention.{kind}.weight" for kind in ("query", "key", "value")]
    starts = [initial_tensor(n, table[n], config.train.seed).double() for n in names]
    gradients = [logical_gradient(n, table[n].shape, 0).double() for n in names]
    whole = 0.05 * torch.cat(gradients)
    update = scale(*whole.shape, config.optimizer) * decomposed(whole, config.optimizer)
    for n, start, part in zip(names, starts, update.split([len(s) for s in starts]), strict=True):
        expected = start * (1 - RATE * DECAY) - RATE * part
        torch.testing.assert_close(found["weight", n].double(), expected, rtol=1e-4, atol=2e-5)


def test_blocks_of_ranks_are_matrices_on_request(pool):
    """`blockwise`: the down projection [H, F] is two matrices [H, F / 2] over two ranks."""
    world, flags = _FLAGS["TP2"]
    setup = setup_of(flags, muon_tp_mode="blockwise")
    found = assembled(pool.run(muon_steps, world, count=1, **setup))
    config = muon_config(**setup)
    name = "layers.0.ffn.down.weight"
    parameter = logical_parameters(config.model, config.moe, VOCAB)[name]
    start = initial_tensor(name, parameter, config.train.seed).double()
    momentum = 0.05 * logical_gradient(name, parameter.shape, 0).double()
    halves = [decomposed(half, config.optimizer) for half in momentum.chunk(2, dim=1)]
    update = scale(*parameter.shape, config.optimizer) * torch.cat(halves, dim=1)
    expected = start * (1 - RATE * DECAY) - RATE * update
    torch.testing.assert_close(found["weight", name].double(), expected, rtol=1e-4, atol=2e-5)
    whole = plain(1, **setup)["weight", name]
    assert (expected - whole).abs().max() > 0.01


def test_where_settings_coincide_it_is_torchs():
    """torch.optim.Muon has the polynomial `simple`, in bf16, with 0.2 sqrt(max(out, in))."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 24), (24, 40), (32, 32)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    shards = {}
    for weight in ours:
        shape = tuple(weight.shape)
        piece = Piece(
            name="layers.0.ffn.up.weight",
            logical_shape=shape,
            view_shape=shape,
            offsets=(0, 0),
            sizes=shape,
            select=lambda t: t,
        )
        shards[weight] = ParamShard(
            param=weight, local_name="w", pieces=(piece,), writer=True, expert=False
        )
    settings = OptimizerConfig(
        optimizer="muon",
        muon_coefficient_type="simple",
        muon_use_nesterov=True,
        muon_extra_scale_factor=0.2,
    )
    groups: Any = SimpleNamespace(tp=None, expt_tp=None)
    mine = Muon([{"params": ours}], shards, {"layers.0.ffn.up.weight": "ffn"}, settings, groups)
    mine.param_groups[0].update(lr=0.1, weight_decay=0.1)
    (simple,) = COEFFICIENTS["simple"]
    reference = torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=simple,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(a.shape, generator=generator)
            a.grad = b.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # The reference rounds its products to bf16.
        assert (a - b).norm() / b.norm() < 5e-3


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("TP2", "EP2"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("1", "TP2xETP2"), ("TP2xETP2", "EP2"), ("EP2xETP2", "1"), ("PP2", "TP2")))],
)  # fmt: skip
def test_state_saved_by_one_layout_loads_in_another(saved, loaded, pool, tmp_path):
    world, flags = _FLAGS[saved]
    setup = {**setup_of({}), "bf16": saved == "TP2xETP2"}
    there = pool.run(muon_save, world, directory=tmp_path, **{**setup, "flags": flags})
    world, flags = _FLAGS[loaded]
    here = pool.run(muon_load, world, directory=tmp_path, **{**setup, "flags": flags})
    before, now = (assembled([result[0] for result in results]) for results in (there, here))
    assert before.keys() == now.keys()
    assert {kind for kind, _ in before} == {"weight", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    for key, tensor in before.items():
        assert torch.equal(tensor, now[key]), key
    after = [assembled([result[1] for result in results]) for results in (there, here)]
    for key, tensor in after[0].items():
        torch.testing.assert_close(after[1][key], tensor, rtol=1e-4, atol=2e-5, msg=str(key))
        assert not torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--use-distributed-optimizer", "--use-distributed-optimizer"),
        ("--muon-momentum 1", "--muon-momentum"),
        ("--muon-num-ns-steps 0", "--muon-num-ns-steps"),
        ("--muon-scale-mode frobenius", "--muon-scale-mode"),
        ("--muon-extra-scale-factor nan", "--muon-extra-scale-factor"),
    ],
)
def test_invalid_values_are_rejected_by_flag(line, flag):
    with pytest.raises(UsageError) as error:
        validate(parse_args(f"--train-iters 3 --optimizer muon {line}".split()).config)
    assert flag in str(error.value)
