"""Frozen weights: not updated, bit for bit, and selected by logical name.

What is frozen is a function of flags and step only, so a run that resumes freezes the same. Frozen
weights do not count in the gradient norm; their optimizer state is kept unchanged, in checkpoints
too. A local parameter is often several logical tensors: query, key and value are one. If all of
them are frozen, the optimizer does not see the parameter. If some are, it must see it, so those
are zeroed in the gradient and restored, with their state, after the update: a zero gradient alone
would still let momentum and weight decay move them.
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

ROUTERS = "layers.*.moe.router.*"
"""Logical names of routers' weights and biases."""


def frozen_patterns(settings: OptimizerConfig, iteration: int) -> tuple[str, ...]:
    """Patterns of the names that are frozen in step ``iteration``, from 1."""
    after = settings.freeze_router_after
    routers = () if after is None or iteration <= after else (ROUTERS,)
    return (*settings.freeze_params, *routers)


def check_freezing(config: RunConfig) -> None:
    """Reject patterns that match nothing, or everything.

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
            expected = f"a pattern that matches parameter names, such as {names[1]}"
            raise UsageError("--freeze-params", pattern, expected)
    if after is not None:
        if after < 0:
            raise UsageError("--freeze-router-after", after, ">= 0")
        if not any(fnmatchcase(name, ROUTERS) for name in names):
            raise UsageError("--freeze-router-after", after, "unset for a model without MoE layers")
    if all(_matches(name, settings.freeze_params) for name in names):
        found = " ".join(settings.freeze_params)
        raise UsageError("--freeze-params", found, "patterns that leave a weight to train")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Frozen:
    """What is frozen in one step, on this rank."""

    unseen: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    """For fully frozen parameters, the tensor that the optimizer updates, and its state."""
    pieces: list[tuple[Tensor, Piece]] = field(default_factory=list)
    """Frozen pieces of other parameters."""
    parts: list[Part] = field(default_factory=list)
    """Their weights, masters and moments."""
    fixed: list[Tensor] = field(default_factory=list)
    """Frozen weights that the optimizer does not update in any case: biases of experts."""

    def drop_gradients(self) -> None:
        """Zero the gradients of pieces, before the optimizer copies gradients."""
        for param, piece in self.pieces:
            piece.select(param.main_grad).zero_()  # type: ignore[attr-defined]

    def hide(self) -> None:
        """Remove the copied gradients of whole parameters, before the norm is taken."""
        for main, _ in self.unseen:
            main.grad = None

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Context manager for the update: restores partly frozen parameters and their state."""
        with torch.no_grad():
            before = [part.values.clone() for part in self.parts]
            yield
            for part, values in zip(self.parts, before, strict=True):
                part.values.copy_(values)
            for _, state in self.unseen:
                if "step" in state:  # Adam counts steps per parameter, and all counts must agree
                    state["step"] += 1


class Freezing:
    """Finds what is frozen in a step.

    Args:
        settings: patterns, and the step after which routers freeze.
        shards: the table of this rank's parameters.
        optimizer: Megatron-Core's. When something is frozen its state is created at once: a
            parameter that is never updated would otherwise never get any, and checkpoints hold
            the state of all parameters.
    """

    def __init__(
        self, settings: OptimizerConfig, shards: Sequence[ParamShard], optimizer: Any
    ) -> None:
        self._settings, self._shards, self._optimizer = settings, shards, optimizer
        self._found: dict[tuple[str, ...], Frozen] = {(): Frozen()}

    def at(self, iteration: int) -> Frozen:
        """What is frozen in step ``iteration``, from 1."""
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
            if not shard.param.requires_grad:
                frozen.fixed.extend([shard.param] if pieces else [])
            elif len(pieces) == len(shard.pieces):
                # With the distributed optimizer a rank may hold no part of it.
                frozen.unseen.extend([updated[shard.param]] if shard.param in updated else [])
            elif pieces:
                frozen.pieces.extend((shard.param, piece) for piece in pieces)
                parts = load_plan([shard], states)
                frozen.parts.extend(part for part in parts if _matches(part.name, patterns))
        return frozen
