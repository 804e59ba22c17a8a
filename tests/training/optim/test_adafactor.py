"""Adafactor against a plain implementation on whole tensors, against torch's, and through saves."""

from __future__ import annotations

from math import prod
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
from megatron_moe.training.optim.adafactor import Adafactor
from megatron_moe.training.optim.factoring import split_dims
from megatron_moe.training.plan import resolve_plan
from tests.parity.cases import LAYOUTS, SLOW_LAYOUTS, VOCAB
from tests.training.optim.adafactor_ranks import (
    MIN_DIM,
    RATE,
    Block,
    config_of,
    load_and_step,
    logical_gradient,
    save_after_two,
    steps,
)

_FLAGS = {layout.name: (layout.world_size, layout.flags) for layout in LAYOUTS}
_RUN = {"1", "TP2", "TP2xETP2", "PP2", "DP2", "EP2", "EP2xETP2"}
_EIGHT = {layout.name: (layout.world_size, layout.flags) for layout in SLOW_LAYOUTS}


class PlainMatrix:
    """Adafactor of one whole matrix or vector, from the paper's algorithm 4 to 6, in fp64."""

    def __init__(self, weight: Tensor, min_dim: int) -> None:
        self.weight = weight.double()
        self.factored = weight.dim() == 2 and min(weight.shape) >= min_dim
        self.full = torch.zeros_like(self.weight)
        self.rows = torch.zeros(weight.shape[:1], dtype=torch.float64)
        self.columns = torch.zeros(weight.shape[-1:], dtype=torch.float64)

    def step(self, gradient: Tensor, step_from_zero: int, rate: float) -> None:
        beta = 1 - (step_from_zero + 1.0) ** -0.8
        squares = gradient.double() ** 2 + 1e-30
        if self.factored:
            self.rows = beta * self.rows + (1 - beta) * squares.mean(1)
            self.columns = beta * self.columns + (1 - beta) * squares.mean(0)
            moment = torch.outer(self.rows, self.columns) / self.rows.mean()
        else:
            self.full = moment = beta * self.full + (1 - beta) * squares
        update = gradient.double() / moment**0.5
        update = update / max(1.0, float((update**2).mean() ** 0.5))
        size = max(1e-3, float((self.weight**2).mean() ** 0.5))
        self.weight = self.weight - rate * size * update


def plain(variant: str, bf16: bool, count: int) -> dict[tuple[str, str], Tensor]:
    """Weights and state of all logical tensors after ``count`` steps; experts one by one."""
    config = config_of({}, variant, bf16)
    table = logical_parameters(config.model, config.moe, VOCAB)
    found: dict[tuple[str, str], Tensor] = {}
    for name, parameter in table.items():
        start = initial_tensor(name, parameter, config.train.seed)
        if bf16:
            start = start.bfloat16().float()
        expert = parameter.kind == "expert"
        matrices = [PlainMatrix(m, MIN_DIM) for m in (start if expert else [start])]
        for number in range(count):
            gradient = logical_gradient(name, parameter.shape, number)
            for matrix, part in zip(matrices, gradient if expert else [gradient], strict=True):
                matrix.step(part, number, RATE)
        whole = torch.stack if expert else _only
        found["weight", name] = whole([m.weight for m in matrices])
        if matrices[0].factored:
            found["variance_row", name] = whole([m.rows for m in matrices])
            found["variance_column", name] = whole([m.columns for m in matrices])
        else:
            found["variance", name] = whole([m.full for m in matrices])
    return found


def _only(tensors: list[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def assembled(results: list[list[Block]]) -> dict[tuple[str, str], Tensor]:
    """Logical tensors from the blocks of all ranks; copies must agree to the bit."""
    whole: dict[tuple[str, str], Tensor] = {}
    shapes: dict[tuple[str, str], Any] = {}
    for blocks in results:
        for kind, name, shape, view, offsets, block in blocks:
            assert prod(view) == prod(shape)
            target = whole.setdefault((kind, name), torch.full(view, float("nan")))
            shapes[kind, name] = shape
            where = tuple(slice(o, o + s) for o, s in zip(offsets, block.shape, strict=True))
            known = target[where]
            assert known.isnan().all() or torch.equal(known, block), f"copies of {name} differ"
            target[where] = block
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return {key: tensor.reshape(shapes[key]) for key, tensor in whole.items()}


def _require_close(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        moved = found[key].double()
        torch.testing.assert_close(moved, tensor.double(), rtol=2e-5, atol=1e-7, msg=str(key))


@pytest.mark.parametrize("name", sorted(_RUN))
def test_every_layout_is_the_plain_implementation(name, pool):
    world, flags = _FLAGS[name]
    found = pool.run(steps, world, flags=flags, variant="released", bf16=False, count=4)
    _require_close(assembled(found), plain("released", False, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_EIGHT))
def test_layouts_of_eight_ranks(name, pool):
    world, flags = _EIGHT[name]
    found = pool.run(steps, world, flags=flags, variant="released", bf16=False, count=4)
    _require_close(assembled(found), plain("released", False, 4))


@pytest.mark.parametrize(
    ("name", "variant", "bf16"),
    [
        ("TP2xETP2", "released", True),
        ("PP2", "paper-port", False),
        ("TP2", "grouped-head-norm", False),
        ("TP2", "grouped-projection-norm", False),
    ],
    ids=["masters of bf16", "tied and swiglu", "grouped heads", "grouped, norm of all heads"],
)
def test_other_models(name, variant, bf16, pool):
    world, flags = _FLAGS[name]
    found = pool.run(steps, world, flags=flags, variant=variant, bf16=bf16, count=3)
    _require_close(assembled(found), plain(variant, bf16, 3))


def test_the_comparison_covers_what_it_should():
    """Both kinds of state, clipping, the floor of the scale, rows and experts without gradient."""
    table = plain("released", False, 1)
    kinds = {kind for kind, _ in table}
    assert kinds == {"weight", "variance", "variance_row", "variance_column"}
    assert ("variance_row", "layers.1.moe.experts.gate") in table
    assert ("variance", "layers.1.moe.experts.up") in table
    gradient = logical_gradient("output.weight", (VOCAB, 32), 3)
    matrix = PlainMatrix(torch.zeros(VOCAB, 32), MIN_DIM)
    matrix.step(gradient * 1e-3, 0, RATE)
    moved = matrix.weight.square().mean().sqrt()
    assert moved == pytest.approx(RATE * 1e-3, rel=0.2)
    unclipped = PlainMatrix(torch.ones(VOCAB, 32), 1000)
    unclipped.step(logical_gradient("output.weight", (VOCAB, 32), 0), 0, RATE)
    unclipped.step(gradient, 1, RATE)
    change = (unclipped.weight - 1).square().mean().sqrt()
    assert change < 2 * RATE, "later gradients are larger, so that updates are clipped"


def _alone(weights: list[Tensor], min_dim: int) -> Adafactor:
    """Our optimizer for whole tensors, without any groups."""
    shards = {}
    for weight in weights:
        shape = tuple(weight.shape)
        piece = Piece(
            name="w",
            logical_shape=shape,
            view_shape=shape,
            offsets=(0,) * len(shape),
            sizes=shape,
            select=lambda t: t,
        )
        shards[weight] = ParamShard(
            param=weight, local_name="w", pieces=(piece,), writer=True, expert=False
        )
    settings = OptimizerConfig(optimizer="adafactor", lr=0.01, adafactor_min_dim=min_dim)
    groups: Any = SimpleNamespace(tp=None, expt_tp=None)
    return Adafactor([{"params": weights}], shards, settings, groups)


def test_the_scale_of_a_large_matrix_is_exact():
    """The first update is RMS(W) in every element: here it takes W to zero, to its last bits."""
    weight = torch.full((2048, 2048), 0.3)
    weight.grad = torch.ones_like(weight)
    optimizer = _alone([weight], 4096)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert weight.abs().max().item() < 1e-6


def test_where_settings_coincide_it_is_torchs():
    """Torch factors every matrix and takes the rate min(lr, 1/sqrt(t)), here always lr."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 24), (24, 130), (33,)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = _alone(ours, min_dim=1)
    reference = torch.optim.Adafactor(
        theirs, lr=0.01, beta2_decay=-0.8, eps=(1e-30, 1e-3), d=1.0, weight_decay=0.0
    )
    for number in range(20):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(a.shape, generator=generator) * 1.3**number
            a.grad = b.grad.clone()
        mine.step()
        reference.step()
    for a, b, shape in zip(ours, theirs, shapes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=str(shape))


def test_matrices_below_the_limit_keep_all_their_moments():
    small, large = (torch.nn.Parameter(torch.ones(shape)) for shape in ((127, 300), (128, 300)))
    optimizer = _alone([small, large], min_dim=OptimizerConfig().adafactor_min_dim)
    elements = [sum(v.numel() for v in optimizer.state[w].values()) for w in (small, large)]
    assert elements == [127 * 300, 128 + 300]


def test_logical_dimensions_are_found_in_views():
    assert split_dims((6, 5), (2, 3, 5)) == ((0, 1), (2,))
    assert split_dims((24, 32), (1, 24, 32)) == ((0, 1), (2,))
    assert split_dims((4, 32, 40), (4, 32, 2, 20)) == ((0,), (1,), (2, 3))
    assert split_dims((7,), (7,)) == ((0,),)


_PATHS = [("1", "TP2xETP2"), ("TP2xETP2", "EP2"), ("EP2xETP2", "1"), ("PP2", "TP2")]


@pytest.mark.parametrize(("saved", "loaded"), _PATHS)
def test_state_saved_by_one_layout_loads_in_another(saved, loaded, pool, tmp_path):
    bf16 = saved == "TP2xETP2"
    world, flags = _FLAGS[saved]
    there = pool.run(save_after_two, world, flags=flags, bf16=bf16, directory=tmp_path)
    world, flags = _FLAGS[loaded]
    here = pool.run(load_and_step, world, flags=flags, bf16=bf16, directory=tmp_path)
    before, now = (assembled([result[0] for result in results]) for results in (there, here))
    assert before.keys() == now.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, now[key]), key
    after = [assembled([result[1] for result in results]) for results in (there, here)]
    for key, tensor in after[0].items():
        torch.testing.assert_close(after[1][key], tensor, rtol=1e-5, atol=1e-7, msg=str(key))
        assert not torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--use-distributed-optimizer", "--use-distributed-optimizer"),
        ("--weight-decay 0.1", "--weight-decay"),
        ("--adafactor-decay-rate 0", "--adafactor-decay-rate"),
        ("--adafactor-clip-threshold nan", "--adafactor-clip-threshold"),
        ("--adafactor-min-dim 0", "--adafactor-min-dim"),
    ],
)
def test_invalid_values_are_rejected_by_flag(line, flag):
    with pytest.raises(UsageError) as error:
        _planned(f"--train-iters 3 --optimizer adafactor {line}")
    assert error.value.what == flag


def _planned(line: str) -> OptimizerConfig:
    config = parse_args(line.split()).config
    validate(config)
    resolve_plan(config, 8)
    return config.optimizer


@pytest.mark.parametrize(
    ("line", "decay", "clip"),
    [
        ("", 0.01, 1.0),
        ("--optimizer sgd", 0.01, 1.0),
        ("--optimizer adafactor", 0.0, 0.0),
        ("--optimizer adafactor --clip-grad 0.5", 0.0, 0.5),
        ("--weight-decay 0 --clip-grad 0", 0.0, 0.0),
    ],
)
def test_defaults_follow_the_optimizer(line, decay, clip):
    settings = _planned(f"--train-iters 3 {line}")
    assert (settings.used_weight_decay, settings.used_clip_grad) == (decay, clip)
