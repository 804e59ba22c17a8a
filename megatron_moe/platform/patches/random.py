"""One random generator: what the engine takes for the GPU's generator is the CPU's.

The engine's tracker swaps the generator's state for that of a named stream of numbers and back;
that works the same on the CPU generator, so dropout differs between tensor-parallel ranks, agrees
between data-parallel ones, and is repeated by recomputation, as on a GPU.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from megatron_moe.platform.patches.base import AttributePatch, Patch

_TRACKER = "megatron.core.tensor_parallel.random"


class RandomState(AttributePatch):
    """`torch.cuda` random state and the engine's own accessors of it."""

    name = "random-state"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.tensor_parallel.random as tracker

        return [
            (torch.cuda, "get_rng_state", lambda *args, **kwargs: _get_state()),
            (torch.cuda, "set_rng_state", lambda state, *args, **kwargs: _set_state(state)),
            (torch.cuda, "manual_seed", lambda seed: _seed(seed)),
            (torch.cuda, "manual_seed_all", lambda seed: _seed(seed)),
            (tracker, "_get_cuda_rng_state", _get_state),
            (tracker, "_set_cuda_rng_state", _set_state),
        ]


class RandomStateWarning(Patch):
    """The tracker warns when the CPU generator moved while the GPU's was in use: always, here."""

    name = "random-state-warning"

    def apply(self) -> None:
        logging.getLogger(_TRACKER).addFilter(_is_not_about_one_generator)

    def undo(self) -> None:
        logging.getLogger(_TRACKER).removeFilter(_is_not_about_one_generator)


def _is_not_about_one_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # Not torch.manual_seed: that one seeds the GPUs too, which is this very function.
    torch.default_generator.manual_seed(int(seed))
