"""All random state of a rank as named tensors, for checkpoints."""

from __future__ import annotations

import torch

from megatron_moe.errors import UsageError

_TRACKED = "tracker."


def rng_states() -> dict[str, torch.Tensor]:
    """The state of every generator that training draws from.

    Returns:
        Name -> uint8 [bytes] on the CPU: `cpu`; `cuda` if there is a GPU; and `tracker.NAME` for
        each named stream of Megatron-Core's tracker (dropout inside tensor- and expert-parallel
        regions).
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[_TRACKED + name] = state.clone()
    return states


def set_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_states` returned.

    Raises:
        UsageError: the states are of another kind of device or another set of streams.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    expected = rng_states().keys()
    if states.keys() != expected:
        raise UsageError("names of random states", sorted(states), f"{sorted(expected)}")
    torch.set_rng_state(states["cpu"].clone())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone())
    tracked = {
        name.removeprefix(_TRACKED): state.clone()
        for name, state in states.items()
        if name.startswith(_TRACKED)
    }
    get_cuda_rng_tracker().set_states(tracked)
