"""One micro-batch, and how all tensor-parallel ranks get the same ones.

Tensor-parallel rank 0 reads the micro-batches of a step, packs them into one int32 tensor and
broadcasts it: one collective per step, and only one rank of a group needs the data files.

B sequences of a micro-batch, S tokens of a sequence, M micro-batches of a step, P planes of a
micro-batch: tokens, labels, loss mask, then the extra planes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config import ObjectiveConfig, RunConfig

PLANES = ("tokens", "labels", "loss_mask", "positions", "documents", "padding")
"""What samples and batches contain, in the order in which it is packed; the last three are
extra."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens_BS: Tensor
    """Input ids, int64."""
    labels_BS: Tensor
    """Id to predict at each position, int64; 0 where there is none and the mask is 0."""
    loss_mask_BS: Tensor
    """1.0 where the prediction counts, 0.0 elsewhere, float32."""
    positions_BS: Tensor | None = None
    """Position of each token for its rotary embedding, int64; `None` counts from the start of the
    row."""
    documents_BS: Tensor | None = None
    """Number of each token's document within its row, int64, non-decreasing; attention stays within
    a document. `None`: each row is one document."""
    padding_BS: Tensor | None = None
    """1 where the token is padding after the text of its row, else 0, int64. An id 0 alone does not
    say that: it may be the start of the row. `None`: no token is, or it does not matter."""


def reset_planes(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Return the planes of rows whose documents are separate."""
    wanted = {
        "positions": objective.reset_position_ids,
        "documents": objective.reset_attention_mask,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def extra_planes(config: RunConfig) -> tuple[str, ...]:
    """Return what samples contain besides tokens, labels and loss mask; the same on all ranks.

    Every pipeline stage needs them, since every stage has attention and norms, and counts padding
    apart from real tokens in its statistics of routing.
    """
    objective = config.objective
    return (*reset_planes(objective), *(("padding",) if objective.has_padding else ()))


def every_stage_reads(config: RunConfig) -> bool:
    """Return whether middle pipeline stages need batches: for their extra planes, for routers that
    need the tokens, or to write or replay traces, which contain them.
    """
    if config.moe.moe_router_type == "token_hash":
        return True
    logging = config.logging
    traces = (logging.routing_trace_dir, logging.routing_replay_dir)
    return bool(extra_planes(config)) or any(name is not None for name in traces)


def document_planes(
    begins: npt.NDArray[np.bool_], names: tuple[str, ...]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return positions and document numbers, [S] each, as far as they are wanted.

    Example: documents begin at tokens 0 and 3 of 5, so begins is 1 0 0 1 0; positions are
    0 1 2 0 1, documents 0 0 0 1 1.

    Args:
        begins: [S], whether a document begins at this token.
        names: from `extra_planes`; others than these two are ignored.
    """
    if not {"positions", "documents"} & set(names):
        return {}
    places = np.arange(len(begins))
    starts = np.maximum.accumulate(np.where(begins, places, 0))
    planes = {"positions": places - starts, "documents": np.cumsum(begins) - int(begins[0])}
    return {name: planes[name] for name in names if name in planes}


def inputs_of(
    targets: npt.NDArray[np.integer], start: int, begins: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return targets [S] shifted by one, with ``start`` where a row or one of its parts begins.

    seqio's `autoregressive_inputs`. Example with start 0: targets a b 1 c 1 d of three documents,
    which begin at a, c and d, have the inputs 0 a b 0 c 0; if only the row begins, 0 a b 1 c 1. An
    end before another document is no input of it.

    Args:
        targets: ids that the row predicts.
        start: id of the start.
        begins: [S], where a part begins; the row begins at its first target in any case.
    """
    shifted = np.concatenate(([start], targets[:-1])).astype(np.int64)
    return np.where(begins, start, shifted)


def fetch_step(
    iterator: Iterator[Batch] | None,
    num_microbatches: int,
    tp_group: dist.ProcessGroup | None,
    batch_shape: tuple[int, int],
    device: torch.device,
    extra: Sequence[str] = (),
) -> list[Batch]:
    """Return all micro-batches of one step, on ``device``.

    Args:
        iterator: the micro-batches on rank 0 of the group; `None` on the others.
        num_microbatches: M.
        tp_group: the tensor-parallel group, or `None` for a single rank.
        batch_shape: (B, S).
        device: of the model.
        extra: extra planes of the batches; see `extra_planes`.

    Raises:
        RuntimeError: the data ends before the step is complete, or a batch has another shape.
    """
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    reads = tp_group is None or dist.get_rank(tp_group) == 0
    if reads:
        packed = _pack(iterator, num_microbatches, batch_shape, extra)
        if device.type != "cpu":
            packed = packed.pin_memory().to(device, non_blocking=True)
    else:
        shape = (num_microbatches, 3 + len(extra), *batch_shape)
        packed = torch.empty(shape, dtype=torch.int32, device=device)
    if size > 1:
        dist.broadcast(packed, group_src=0, group=tp_group)
    return [_unpack(packed_PBS, extra) for packed_PBS in packed]


def _pack(
    iterator: Iterator[Batch] | None,
    num_microbatches: int,
    batch_shape: tuple[int, int],
    extra: Sequence[str],
) -> torch.Tensor:
    """Read M micro-batches into [M, P, B, S] int32."""
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
                f"the shape of a micro-batch must be {batch_shape} "
                f"(got {tuple(batch.tokens_BS.shape)})"
            )
        packed[index, 0] = batch.tokens_BS
        packed[index, 1] = batch.labels_BS
        # The bits of the float32 mask, so that one int32 broadcast carries everything exactly.
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
