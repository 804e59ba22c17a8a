"""Numbers that look random and are a function of integers, the same on every device.

`torch.Generator` draws other numbers on a GPU than on a CPU, and has a state that a checkpoint
would have to hold. These have neither: drop policies order choices by them.

The mixer is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): a counter times the golden ratio, through the finalizer of its `nextSeed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 1 << 64
GAMMA = 0x9E3779B97F4A7C15
"""The odd integer next to 2^64 over the golden ratio."""
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def mix(*key: int) -> int:
    """A number below 2^64 for a sequence of integers, each of them at least 0."""
    state = 0
    for part in key:
        state = _finalized((state ^ part) + GAMMA)
    return state


def uniform_bits(count: int, key: int, device: torch.device) -> Tensor:
    """``count`` int64 numbers below 2^32: the upper halves of a stream of SplitMix64.

    Args:
        count: of numbers.
        key: from `mix`, the seed of the stream.
        device: of the result.
    """
    return bits_at(torch.arange(1, count + 1, device=device), key)


def bits_at(place: Tensor, key: int) -> Tensor:
    """The numbers of a stream at places from 1 on, in the shape of ``place``, int64."""
    # int64 wraps around as unsigned integers do; only shifts to the right differ, see `_shifted`.
    z = place * _signed(GAMMA) + _signed(key)
    for shift, factor in _ROUNDS:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 32)


def _finalized(z: int) -> int:
    z %= WIDTH
    for shift, factor in _ROUNDS:
        z = ((z ^ (z >> shift)) * factor) % WIDTH
    return z ^ (z >> 31)


def _shifted(z: Tensor, shift: int) -> Tensor:
    """``z`` >> ``shift`` without copies of the sign."""
    return (z >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return value - WIDTH if value >= WIDTH // 2 else value
