"""Weights that stay as they are, bit for bit, chosen by logical name.

What is frozen is a function of flags and step alone, so that a run that goes on freezes the same.
Frozen weights have no part in the gradient norm; their optimizer state is kept and not changed, in
checkpoints too. A local parameter is often several logical tensors (query, key and value are one).
If all of it is frozen, the optimizer does not see it; if some of it is, that part and its state are
put back after the update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import OptimizerConfig, RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import logical_parameters
from megatron_moe.model.sharding.blocks import Part
from megatron_moe.model.sharding.optimizer_state import leaves, optimizer_shards, parameters
from megatron_moe.model.sharding.parts import load_plan
from megatron_moe.model.sharding.shards import ParamShard, Piece

ROUTERS = "layers.*.moe.router.weight"
"""Logical names of router weights."""


def frozen_patterns(settings: OptimizerConfig, iteration: int) -> tuple[str, ...]:
    """Patterns of the names that step ``iteration`` (from 1) leaves as they are."""
    after = settings.freeze_router_after
    routers = () if after is None or iteration <= after else (ROUTERS,)
    return (*settings.freeze_params, *routers)


def check_freezing(config: RunConfig) -> None:
    """Refuse patterns that match nothing, or everything.

    Raises:
        UsageError: names the pattern.
    """
    settings = config.optimizer
    after = settings.freeze_router_after
    if not settings.freeze_params and after is None:
        return
    names = list(logical_parameters(config.model, config.moe, 1))  # names do not depend on V
    for pattern in settings.freeze_params:
        if not any(fnmatchcase(name, pattern) for name in names):
            expected = f"a pattern of parameter names such as {names[1]}"
            raise UsageError("--freeze-params", pattern, expected, "it matches none of them")
    if after is not None:
        if after < 0:
            raise UsageError("--freeze-router-after", after, "at least 0")
        if not any(fnmatchcase(name, ROUTERS) for name in names):
            raise UsageError("--freeze-router-after", after, "a model with MoE layers")
    if all(_matches(name, settings.freeze_params) for name in names):
        found = " ".join(settings.freeze_params)
        raise UsageError("--freeze-params", found, "patterns that leave something to train")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Frozen:
    """What one step leaves as it is, on this rank."""

    unseen: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    """What the optimizer updates, and its state, for parameters that are frozen altogether."""
    pieces: list[tuple[Tensor, Piece]] = field(default_factory=list)
    """Frozen pieces of other parameters."""
    parts: list[Part] = field(default_factory=list)
    """Their weights, masters and moments."""

    def drop_gradients(self) -> None:
        """Before gradients go to the optimizer: without those of pieces."""
        for param, piece in self.pieces:
            piece.select(param.main_grad).zero_()  # type: ignore[attr-defined]

    def hide(self) -> None:
        """Once they are there: without those of whole parameters, before the norm."""
        for main, _ in self.unseen:
            main.grad = None

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around the update."""
        with torch.no_grad():
            before = [part.values.clone() for part in self.parts]
            yield
            for part, values in zip(self.parts, before, strict=True):
                part.values.copy_(values)
            for _, state in self.unseen:
                if "step" in state:  # Adam counts for each parameter; all counts must agree
                    state["step"] += 1


class Freezing:
    """Finds what a step must leave as it is.

    Args:
        settings: patterns, and when routers freeze.
        shards: the table of this rank's parameters.
        optimizer: the engine's; if anything is to be frozen its state is created now, since a
            parameter that is never updated would never get any.
    """

    def __init__(
        self, settings: OptimizerConfig, shards: Sequence[ParamShard], optimizer: Any
    ) -> None:
        self._settings, self._shards, self._optimizer = settings, shards, optimizer
        self._found: dict[tuple[str, ...], Frozen] = {(): Frozen()}

    def at(self, iteration: int) -> Frozen:
        """What step ``iteration``, from 1, must leave as it is."""
        patterns = frozen_patterns(self._settings, iteration)
        if patterns not in self._found:
            self._found[patterns] = self._find(patterns)
        return self._found[patterns]

    def _find(self, patterns: tuple[str, ...]) -> Frozen:
        states = optimizer_shards(self._optimizer)
        updated = {
            param: (main, leaf.optimizer.state[main])
            for leaf in leaves(self._optimizer)
            for param, main, _, _ in parameters(leaf)
        }
        frozen = Frozen()
        for shard in self._shards:
            pieces = [piece for piece in shard.pieces if _matches(piece.name, patterns)]
            if len(pieces) == len(shard.pieces):
                # With the distributed optimizer a rank may have no share of it.
                frozen.unseen.extend([updated[shard.param]] if shard.param in updated else [])
            elif pieces:
                frozen.pieces.extend((shard.param, piece) for piece in pieces)
                parts = load_plan([shard], states)
                frozen.parts.extend(part for part in parts if _matches(part.name, patterns))
        return frozen
