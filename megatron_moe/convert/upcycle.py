"""A mixture of experts from a dense checkpoint (Komatsuzaki et al., arXiv 2212.05055).

Every expert starts as the dense layer's feed-forward. Two ways to let the new model begin where the
dense one is:

- `shared`: the shared expert is the dense layer, and the output matrices of the routed experts are
  zero: they add nothing until they have learned something. Exact, bit by bit, with any router.
- `copy`: the output matrices are the dense one's times E / k. A router that is undecided gives each
  choice a weight of 1 / E (there is no renormalisation), so that k choices together are the dense
  layer. Exact in the limit of small router weights, if nothing drops.

Experts that are all alike get the same gradient, up to the router's weights. `noise` adds to each
weight of each expert its own normal draw, relative to the tensor's standard deviation; `fresh`
draws that share of an expert's hidden units anew, as Nakamura et al. (arXiv 2502.19261) do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.config import MoEConfig, moe_layer_pattern
from megatron_moe.convert.lazy import LazyTensor, of_tensor
from megatron_moe.convert.model import Model, check_tensors
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import (
    LogicalParameter,
    initial_tensor,
    logical_parameters,
)

Mode = Literal["shared", "copy"]
MODES: tuple[Mode, ...] = ("shared", "copy")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What to make of a dense model.

    Args:
        mode: see above.
        num_experts: E.
        topk: k.
        layer_freq: `--moe-layer-freq`: which layers get experts.
        noise: standard deviation of the noise, relative to that of the tensor it is added to.
        fresh: share of hidden units of each expert drawn anew, 0 to 1.
        seed: of router, noise and choice of units.
    """

    mode: Mode
    num_experts: int
    topk: int
    layer_freq: str
    noise: float = 0.0
    fresh: float = 0.0
    seed: int = 1234

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            UsageError: one of them.
        """
        if self.mode not in MODES:
            raise UsageError("--upcycle", self.mode, f"one of {', '.join(MODES)}")
        if not 0 <= self.noise < float("inf"):
            raise UsageError("--upcycle-noise", self.noise, "a number of at least 0")
        if not 0 <= self.fresh <= 1:
            raise UsageError("--upcycle-fresh", self.fresh, "a share from 0 to 1")


def upcycle(dense: Model, how: Upcycling) -> Model:
    """The mixture of experts; its tensors are made when they are read.

    Raises:
        UsageError: the source has experts already, or a value is impossible.
    """
    how.check()
    _require_dense(dense)
    moe = _settings(dense, how)
    config = replace(dense.config, moe=moe)
    tensors = {}
    for name, parameter in logical_parameters(config.model, moe, dense.vocab_size).items():
        if name in dense.tensors:
            tensors[name] = dense.tensors[name]
        else:
            tensors[name] = _made(dense, how, name, parameter)
    made = replace(dense, config=config, tensors=tensors, step=0)
    check_tensors(made)
    return made


def _require_dense(dense: Model) -> None:
    pattern = moe_layer_pattern(dense.config.moe.moe_layer_freq, dense.config.model.num_layers)
    if any(pattern):
        layers = [i for i, is_moe in enumerate(pattern) if is_moe]
        raise UsageError(f"MoE layers of {dense.source}", layers, "none: a dense checkpoint")


def _settings(dense: Model, how: Upcycling) -> MoEConfig:
    width = dense.config.model.ffn_hidden_size
    pattern = moe_layer_pattern(how.layer_freq, dense.config.model.num_layers)
    if not any(pattern):
        raise UsageError("--moe-layer-freq", how.layer_freq, "a layer with experts")
    return replace(
        dense.config.moe,
        num_experts=how.num_experts,
        moe_router_topk=how.topk,
        moe_layer_freq=how.layer_freq,
        moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=width if how.mode == "shared" else None,
        moe_shared_expert_placement="sequential",
    )


def _made(dense: Model, how: Upcycling, name: str, parameter: LogicalParameter) -> LazyTensor:
    """A tensor that the dense model does not have."""
    _, layer, rest = name.split(".", 2)
    prefix = f"layers.{layer}"
    like = dense.tensors[f"{prefix}.ffn.down.weight"].dtype
    if rest == "shared_norm.weight":
        return dense.tensors[f"{prefix}.ffn_norm.weight"]
    if rest.startswith("shared."):
        return dense.tensors[f"{prefix}.ffn.{rest.removeprefix('shared.')}"]
    if rest == "moe.router.weight":
        return of_tensor(initial_tensor(name, parameter, how.seed).to(like))
    part = rest.removeprefix("moe.experts.")
    source = dense.tensors[f"{prefix}.ffn.{part}.weight"]

    def rows(start: int, stop: int) -> Tensor:
        if part == "down" and how.mode == "shared":
            return torch.zeros(stop - start, *parameter.shape[1:], dtype=like)
        matrix = source.whole().t().to(torch.promote_types(like, torch.float32))  # [in, out]
        if part == "down":
            matrix = matrix * (how.num_experts / how.topk)
        experts = range(start, stop)
        each = (_varied(matrix, dense, how, (prefix, part, expert)) for expert in experts)
        return torch.stack([expert.to(like) for expert in each])

    return LazyTensor(parameter.shape, like, rows)


def _varied(matrix: Tensor, dense: Model, how: Upcycling, which: tuple[str, str, int]) -> Tensor:
    """One expert's matrix [in, out] with its own noise and its own fresh units."""
    prefix, part, expert = which
    spread = matrix.std()
    if how.fresh:
        matrix = matrix.clone()
        units = _units(dense, how, prefix, expert)
        draws = torch.randn(matrix.shape, generator=_generator(how, prefix, part, expert))
        draws = draws.to(matrix.dtype) * spread
        if part == "down":
            matrix[units] = draws[units]
        else:
            blocks = dense.config.model.gate_blocks if part == "gate" else 1
            width = matrix.shape[1] // blocks
            columns = torch.cat([units + block * width for block in range(blocks)])
            matrix[:, columns] = draws[:, columns]
    if how.noise:
        draws = torch.randn(matrix.shape, generator=_generator(how, prefix, part, expert, "noise"))
        matrix = matrix + draws.to(matrix.dtype) * (spread * how.noise)
    return matrix


def _units(dense: Model, how: Upcycling, prefix: str, expert: int) -> Tensor:
    """Hidden units drawn anew: the same in all matrices of an expert."""
    width = dense.config.model.ffn_hidden_size
    order = torch.randperm(width, generator=_generator(how, prefix, expert, "units"))
    return order[: round(how.fresh * width)]


def _generator(how: Upcycling, *key: object) -> torch.Generator:
    """A stream of its own for every tensor of every expert, whatever order they are read in."""
    digest = hashlib.sha256(repr((how.seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
