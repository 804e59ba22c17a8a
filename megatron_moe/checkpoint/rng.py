"""Random states of a rank: saved as JSON, restored on the same layout, derived on another.

The rule for another layout (any of world size, TP, PP, EP, expert TP differ): the saved states
belong to ranks that no longer exist, so none is used. Every generator is seeded as at the start of
a run, with the first 31 bits of SHA-256("SEED:ITERATION") in place of the seed. The result is the
same whenever the same checkpoint is loaded on the same layout, and differs from every stream drawn
before the save.
"""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch

from megatron_moe.errors import Corrupt
from megatron_moe.parallel.context import STAGE_SEED, ParallelContext
from megatron_moe.parallel.layout import Layout
from megatron_moe.platform import rng_states, set_rng_states


def layout_of(layout: Layout) -> dict[str, int]:
    """Sizes that must be equal for random states to be restored rank by rank."""
    names = ("world_size", "tp", "pp", "ep", "etp")
    return {name: getattr(layout, name) for name in names}


def capture() -> dict[str, Any]:
    """States of Python's, NumPy's, torch's and Megatron-Core's generators, as JSON values."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": legacy["state"]["key"].tolist(),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": {name: _encode(state) for name, state in rng_states().items()},
    }


def restore(states: dict[str, Any], source: str) -> None:
    """Restore the result of `capture`.

    Raises:
        Corrupt: the states are malformed; ``source`` is the file they are from.
        UsageError: they are of another type of device.
    """
    try:
        version, words, gauss = states["python"]
        python = (version, tuple(words), gauss)
        legacy = states["numpy"]
        key = np.array(legacy["key"], dtype=np.uint32)
        numpy = ("MT19937", key, legacy["pos"], legacy["has_gauss"], legacy["gauss"])
        tensors = {name: _decode(text) for name, text in states["torch"].items()}
        random.setstate(python)
        np.random.set_state(numpy)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"random states in {source}", repr(error), "those of a save") from None
    set_rng_states(tensors)


def reseed(seed: int, iteration: int, ctx: ParallelContext) -> None:
    """Seed every generator after a load into another layout; the module states the rule."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    digest = hashlib.sha256(f"{seed}:{iteration}".encode()).digest()
    derived = (int.from_bytes(digest[:4], "big") >> 1) + STAGE_SEED * ctx.pp_rank
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)
    model_parallel_cuda_manual_seed(
        derived, tp_rank=ctx.tp_rank, ep_rank=ctx.ep_rank, etp_rank=ctx.etp_rank
    )


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
