"""The same micro-batches on every tensor-parallel rank: one rank reads, one broadcast a step.

B sequences of a micro-batch, S tokens of a sequence, M micro-batches of a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_moe.data.batch import Batch


def fetch_step(
    iterator: Iterator[Batch] | None,
    num_microbatches: int,
    tp_group: dist.ProcessGroup | None,
    batch_shape: tuple[int, int],
    device: torch.device,
) -> list[Batch]:
    """All micro-batches of one step, on ``device``.

    Args:
        iterator: where rank 0 of the group reads; `None` on the others.
        num_microbatches: M.
        tp_group: the tensor-parallel group, or `None` for no group.
        batch_shape: (B, S).
        device: where the model is.

    Raises:
        RuntimeError: the data ends before the step is full, or a batch has another shape.
    """
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    reads = tp_group is None or dist.get_rank(tp_group) == 0
    if reads:
        packed = _read(iterator, num_microbatches, batch_shape)
        if device.type != "cpu":
            packed = packed.pin_memory().to(device, non_blocking=True)
    else:
        packed = torch.empty((num_microbatches, 3, *batch_shape), dtype=torch.int32, device=device)
    if size > 1:
        dist.broadcast(packed, group_src=0, group=tp_group)
    return [_unpack(packed_3BS) for packed_3BS in packed]


def _read(
    iterator: Iterator[Batch] | None, num_microbatches: int, batch_shape: tuple[int, int]
) -> torch.Tensor:
    """[M, 3, B, S] int32: tokens, labels, and the bits of the loss mask."""
    if iterator is None:
        raise ValueError("rank 0 of the tensor-parallel group needs an iterator")
    packed = torch.empty((num_microbatches, 3, *batch_shape), dtype=torch.int32)
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
    return packed


def _unpack(packed_3BS: torch.Tensor) -> Batch:
    tokens_BS, labels_BS, mask_BS = packed_3BS
    return Batch(
        tokens_BS=tokens_BS.long(),
        labels_BS=labels_BS.long(),
        loss_mask_BS=mask_BS.view(torch.float32),
    )
