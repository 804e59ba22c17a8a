"""Upcycling: a mixture of experts from a dense checkpoint (Komatsuzaki et al., arXiv 2212.05055).

Every expert is initialised with the dense layer's feed-forward weights. Two modes keep the output
of the new model at that of the dense one:

- `shared`: the shared expert is the dense layer, and the output matrices (`down`) of the routed
  experts are zero, so they contribute nothing until trained. Exact to the last bit, for any router.
- `copy`: no shared expert; output matrices are the dense ones times E / k. A router with small
  weights gives each choice about 1 / E and nothing is renormalised, so k choices sum to
  k * (1 / E) * (E / k) = 1 dense layer. Exact in the limit of small router weights, if nothing
  drops.

Identical experts get the same gradient up to the router's weights, so something has to break the
symmetry. `noise` adds normal noise to each weight of each expert, relative to the standard
deviation of the tensor; `fresh` redraws a share of each expert's hidden units (Nakamura et al.,
arXiv 2502.19261).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.config import MoEConfig, moe_layer_pattern
from megatron_moe.convert.model import LazyTensor, LogicalModel, check_tensors, of_tensor
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
    """Settings of an upcycled model.

    Args:
        mode: `shared` or `copy`, see the module.
        num_experts: E.
        topk: k.
        layer_freq: `--moe-layer-freq`: which layers become MoE layers.
        noise: standard deviation of the noise, relative to that of the tensor.
        fresh: share of each expert's hidden units that are redrawn, 0 to 1.
        seed: seed of the router, the noise and the choice of units.
    """

    mode: Mode
    num_experts: int
    topk: int
    layer_freq: str
    noise: float = 0.0
    fresh: float = 0.0
    seed: int = 1234

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: one is out of range.
        """
        if self.mode not in MODES:
            raise UsageError("--upcycle", self.mode, f"one of {', '.join(MODES)}")
        if not 0 <= self.noise < float("inf"):
            raise UsageError("--upcycle-noise", self.noise, "a finite number >= 0")
        if not 0 <= self.fresh <= 1:
            raise UsageError("--upcycle-fresh", self.fresh, "from 0 to 1")


def upcycle(dense: LogicalModel, how: Upcycling) -> LogicalModel:
    """The mixture of experts; its tensors are computed when they are read.

    Raises:
        UsageError: the source already has MoE layers, or a value is out of range.
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
            tensors[name] = _derived(dense, how, name, parameter)
    upcycled = replace(dense, config=config, tensors=tensors, step=0)
    check_tensors(upcycled)
    return upcycled


def _require_dense(dense: LogicalModel) -> None:
    if layers := list(dense.config.moe_layers):
        raise UsageError(f"MoE layers of {dense.source}", layers, "none for --upcycle")


def _settings(dense: LogicalModel, how: Upcycling) -> MoEConfig:
    width = dense.config.model.ffn_hidden_size
    pattern = moe_layer_pattern(how.layer_freq, dense.config.model.num_layers)
    if not any(pattern):
        raise UsageError("--moe-layer-freq", how.layer_freq, "a pattern with an MoE layer")
    return replace(
        dense.config.moe,
        num_experts=how.num_experts,
        moe_router_topk=how.topk,
        moe_layer_freq=how.layer_freq,
        moe_ffn_hidden_size=None,
        moe_shared_expert_intermediate_size=width if how.mode == "shared" else None,
        moe_shared_expert_placement="sequential",
    )


def _derived(
    dense: LogicalModel, how: Upcycling, name: str, parameter: LogicalParameter
) -> LazyTensor:
    """A tensor of the MoE model that the dense model does not have."""
    _, layer, rest = name.split(".", 2)
    prefix = f"layers.{layer}"
    like = dense.tensors[f"{prefix}.ffn.down.weight"].dtype
    if rest == "shared_norm.weight":
        return dense.tensors[f"{prefix}.ffn_norm.weight"]
    if rest.startswith("shared."):
        return dense.tensors[f"{prefix}.ffn.{rest.removeprefix('shared.')}"]
    if rest.startswith("moe.router."):
        return of_tensor(initial_tensor(name, parameter, how.seed).to(like))
    part = rest.removeprefix("moe.experts.")
    source = dense.tensors[f"{prefix}.ffn.{part}.weight"]

    def rows(start: int, stop: int) -> Tensor:
        if part == "down" and how.mode == "shared":
            return torch.zeros(stop - start, *parameter.shape[1:], dtype=like)
        # Noise and scaling in at least fp32; in bf16 small noise would round to nothing.
        matrix = source.whole().t().to(torch.promote_types(like, torch.float32))  # [in, out]
        if part == "down":
            matrix = matrix * (how.num_experts / how.topk)
        experts = range(start, stop)
        each = (_varied(matrix, dense, how, (prefix, part, expert)) for expert in experts)
        return torch.stack([expert.to(like) for expert in each])

    return LazyTensor(parameter.shape, like, rows)


def _varied(
    matrix: Tensor, dense: LogicalModel, how: Upcycling, which: tuple[str, str, int]
) -> Tensor:
    """One expert's matrix [in, out] with noise and redrawn hidden units of its own."""
    prefix, part, expert = which
    spread = matrix.std()
    if how.fresh:
        matrix = matrix.clone()
        units = _units(dense, how, prefix, expert)
        draws = torch.randn(matrix.shape, generator=_generator(how, prefix, part, expert))
        draws = draws.to(matrix.dtype) * spread
        # Hidden units are rows of `down` and columns of `up`; of a two-block gate [a | b], unit u
        # is column u of each block.
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


def _units(dense: LogicalModel, how: Upcycling, prefix: str, expert: int) -> Tensor:
    """Hidden units to redraw: the same in all matrices of an expert."""
    width = dense.config.model.ffn_hidden_size
    order = torch.randperm(width, generator=_generator(how, prefix, expert, "units"))
    return order[: round(how.fresh * width)]


def _generator(how: Upcycling, *key: object) -> torch.Generator:
    """A generator per tensor and expert, so values do not depend on the order of reading."""
    digest = hashlib.sha256(repr((how.seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
