"""NaN and infinity never enter a checkpoint: every element is checked before a save begins.

A step whose gradient is not finite changes nothing, so weights that are not finite come from
elsewhere: an update that overflows, a faulty device or memory. Saved, they would become the newest
checkpoint, and `--keep-last` would delete the last good one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_moe.errors import NonFinite
from megatron_moe.model.sharding.blocks import Part

MOST_NAMED = 8
"""Tensors that each rank names."""


def check_finite(parts: Sequence[Part], step: int, rank: int) -> None:
    """Check what this rank is about to save; every element is checked on exactly one rank.

    One pass over the tensors on their device, at the speed of its memory, and one host
    synchronization. No communication: to be called in `RankGroup.run_on_all`, which gives all ranks
    the error of any, in the messages that it exchanges anyway.

    Args:
        parts: blocks that this rank writes.
        step: that is saved.
        rank: this rank.

    Raises:
        NonFinite: its details name each tensor with its kind, this rank, and what was found.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for part in parts:
        by_dtype[part.values.dtype].append(part.values)
    norms = [torch.stack(torch._foreach_norm(values)).float() for values in by_dtype.values()]
    if not norms or bool(torch.cat(norms).isfinite().all()):
        return
    # Squares of numbers beyond 1e19 overflow as well, so only a count decides.
    counts = [(part, int((~part.values.isfinite()).sum())) for part in parts]
    bad = [(part, count) for part, count in counts if count]
    if not bad:
        return
    details = [
        f"rank {rank}: {part.kind} of {part.name}: {count} of {part.values.numel()} elements are"
        " NaN or infinite"
        for part, count in bad[:MOST_NAMED]
    ]
    if len(bad) > MOST_NAMED:
        details.append(f"rank {rank}: and {len(bad) - MOST_NAMED} more tensors")
    raise NonFinite(
        f"weights and optimizer state of iteration {step}",
        "NaN or infinity",
        "finite to be saved",
        "nothing was saved: resume from the newest checkpoint",
        details,
    )
