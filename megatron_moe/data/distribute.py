"""The same micro-batches on every tensor-parallel rank: one rank reads, one broadcast a step.

B sequences of a micro-batch, S tokens of a sequence, M micro-batches of a step, P planes of a
micro-batch: tokens, labels, loss mask, and what else batches hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_moe.data.batch import Batch


def fetch_step(
    iterator: Iterator[Batch] | None,
    num_microbatches: int,
    tp_group: dist.ProcessGroup | None,
    batch_shape: tuple[int, int],
    device: torch.device,
    extra: Sequence[str] = (),
) -> list[Batch]:
    """All micro-batches of one step, on ``device``.

    Args:
        iterator: where rank 0 of the group reads; `None` on the others.
        num_microbatches: M.
        tp_group: the tensor-parallel group, or `None` for no group.
        batch_shape: (B, S).
        device: where the model is.
        extra: what batches hold besides; see `batch.extra_planes`.

    Raises:
        RuntimeError: the data ends before the step is full, or a batch has another shape.
    """
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    reads = tp_group is None or dist.get_rank(tp_group) == 0
    if reads:
        packed = _read(iterator, num_microbatches, batch_shape, extra)
        if device.type != "cpu":
            packed = packed.pin_memory().to(device, non_blocking=True)
    else:
        shape = (num_microbatches, 3 + len(extra), *batch_shape)
        packed = torch.empty(shape, dtype=torch.int32, device=device)
    if size > 1:
        dist.broadcast(packed, group_src=0, group=tp_group)
    return [_unpack(packed_PBS, extra) for packed_PBS in packed]


def _read(
    iterator: Iterator[Batch] | None,
    num_microbatches: int,
    batch_shape: tuple[int, int],
    extra: Sequence[str],
) -> torch.Tensor:
    """[M, P, B, S] int32: tokens, labels, the bits of the loss mask, and what else there is."""
    if iterator is None:
        raise ValueError("rank 0 of the tensor-parallel group needs an iterator")
    packed = torch.empty((num_microbatches, 3 + len(extra), *batch_shape), dtype=torch.int32)
    for index in range(num_microbatches):
        batch = next(iterator, None)
        if batch is None:
            raise RuntimeError(
                f"data ended at micro-batch {index} of {num_microbatches} of a step: "
                "all samples of --train-iters or --train-samples are used"
            )
        if tuple(batch.tokens_BS.shape) != tuple(batch_shape):
            raise RuntimeError(
                f"micro-batch of shape {tuple(batch.tokens_BS.shape)}, expected {batch_shape}"
            )
        packed[index, 0] = batch.tokens_BS
        packed[index, 1] = batch.labels_BS
        packed[index, 2] = batch.loss_mask_BS.view(torch.int32)
        for plane, name in enumerate(extra, 3):
            packed[index, plane] = getattr(batch, f"{name}_BS")
    return packed


def _unpack(packed_PBS: torch.Tensor, extra: Sequence[str]) -> Batch:
    tokens_BS, labels_BS, mask_BS, *planes = packed_PBS
    return Batch(
        tokens_BS=tokens_BS.long(),
        labels_BS=labels_BS.long(),
        loss_mask_BS=mask_BS.view(torch.float32),
        **{f"{name}_BS": plane.long() for name, plane in zip(extra, planes, strict=True)},
    )
