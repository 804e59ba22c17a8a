"""Parameters while `--overlap-param-gather` has them in flight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel


@contextlib.contextmanager
def gathered_parameters(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, every rank holds all of its current parameters, ready to be read.

    With `--overlap-param-gather` an update leaves each rank with its own shard, and the rest
    arrives during the next forward pass, module by module. Evaluation must not rely on that.
    """
    hooked = [chunk for chunk in wrapped if chunk.use_forward_hook]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
