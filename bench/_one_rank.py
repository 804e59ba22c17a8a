"""The parallel context that benchmarks of a single process run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_moe.config import RunConfig


@contextmanager
def one_rank(config: RunConfig, vocab_size: int | None = None) -> Iterator[Any]:
    """The `ParallelContext` of a single rank; afterwards the process can take another layout.

    Args:
        config: of the run.
        vocab_size: V after padding; ``None`` if the benchmark has no whole model.
    """
    from torch.distributed import HashStore

    from megatron_moe.parallel.context import destroy_parallel, initialize_parallel
    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.platform import activate

    platform = activate()
    layout = resolve_layout(config, 1, vocab_size)
    try:
        yield initialize_parallel(layout, config.parallel, platform, 1, store=HashStore())
    finally:
        destroy_parallel(default_group=True)
