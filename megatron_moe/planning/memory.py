"""Memory of one rank by category, and the part of it that does not depend on a batch.

Parameters, gradients and optimizer state follow from the sizes and the layout alone: integers, no
torch. What a step adds to them is in `activation_memory.py` and `step_memory.py`.

Letters: b bytes of a parameter (2 in bf16, 4 in fp32), P parameters of the rank, D ranks that share
the state of an optimizer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config import RunConfig
from megatron_moe.model.counting import parameters_per_rank, stages_of, stages_of_layers
from megatron_moe.model.logical import LogicalParameter, logical_parameters
from megatron_moe.parallel.layout import Layout

BUFFER_ALIGNMENT = 128
"""Elements to which Megatron-Core pads the buffers of the distributed optimizer, besides the number
of ranks (`core/distributed/param_and_grad_buffer.py`)."""


@dataclass(frozen=True, kw_only=True)
class MemoryByCategory:
    """Bytes of one rank at one moment, by what they hold."""

    parameters: int = 0
    """Weights in their training type."""
    gradients: int = 0
    """The fp32 gradient buffers of Megatron-Core's data-parallel wrapper."""
    optimizer: int = 0
    """Moments, and fp32 master weights under bf16."""
    activations: int = 0
    """Saved for the backward pass, inputs and outputs of stages, and temporaries."""
    dispatch_buffers: int = 0
    """Rows [.., H] of experts before and after the exchanges, forward and backward."""
    logits: int = 0
    """fp32 logits of a micro-batch, and fp32 copies of their matrix and its gradient."""
    communication_buffers: int = 0
    """What collectives gather into and that outlives them."""

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: MemoryByCategory) -> MemoryByCategory:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MemoryByCategory(**dict(zip(CATEGORIES, map(sum, pairs), strict=True)))

    def to_dict(self) -> dict[str, int]:
        """The categories and their total, for JSON."""
        return {**dataclasses.asdict(self), "total": self.total}


CATEGORIES = tuple(field.name for field in dataclasses.fields(MemoryByCategory))
"""Names of the categories, in order."""


def parameter_bytes(config: RunConfig) -> int:
    """Bytes b of one parameter, and of one activation."""
    return 2 if config.train.bf16 else 4


def state_memory(
    config: RunConfig, layout: Layout, vocab_size: int
) -> tuple[MemoryByCategory, ...]:
    """Parameters, gradients and optimizer state of a rank of every pipeline stage.

    Parameters take b P and gradients 4 P bytes. Adam keeps two fp32 moments (8 P), SGD with
    momentum one, and under bf16 there are fp32 master weights (4 P); Adafactor keeps a number for
    each row and column of a factored matrix. The distributed optimizer divides this state over the
    data-parallel ranks, that of experts over their own, fewer, replicas.

    Args:
        config: the run.
        layout: its layout.
        vocab_size: V, padded.

    Returns:
        One entry a stage; its other categories are 0.
    """
    counts = parameters_per_rank(
        config.model,
        config.moe,
        vocab_size,
        tp=layout.tp,
        pp=layout.pp,
        chunk_layers=layout.chunk_layers,
        ep=layout.ep,
        etp=layout.etp,
    )
    width, found = parameter_bytes(config), []
    for stage, count in enumerate(counts):
        parts = [(count.dense, layout.dp), (count.expert, layout.edp)]
        if config.parallel.use_distributed_optimizer:
            parts = [(_padded(held, ranks), ranks) for held, ranks in parts]
            shards = sum(held // ranks for held, ranks in parts)
        else:
            shards = count.total
        held = sum(part for part, _ in parts)
        found.append(
            MemoryByCategory(
                parameters=width * held,
                gradients=4 * held,
                optimizer=_optimizer_bytes(config, layout, vocab_size, stage, shards),
            )
        )
    return tuple(found)


def _padded(numel: int, ranks: int) -> int:
    """Elements of a buffer that the distributed optimizer divides evenly."""
    unit = math.lcm(ranks, BUFFER_ALIGNMENT)
    return -(-numel // unit) * unit


def _optimizer_bytes(
    config: RunConfig, layout: Layout, vocab_size: int, stage: int, shards: int
) -> int:
    settings, masters = config.optimizer, 4 * shards if config.train.bf16 else 0
    if settings.optimizer == "adam":
        return masters + 8 * shards
    if settings.optimizer == "sgd":
        return masters + (4 * shards if settings.sgd_momentum else 0)
    return masters + 4 * sum(_adafactor_elements(config, layout, vocab_size, stage))


def _adafactor_elements(
    config: RunConfig, layout: Layout, vocab_size: int, stage: int
) -> Iterator[int]:
    """Numbers that Adafactor keeps of each tensor of a stage (`training/optim/factoring.py`)."""
    model = config.model
    of_layers = stages_of_layers(layout.chunk_layers, layout.pp)
    for name, parameter in logical_parameters(model, config.moe, vocab_size).items():
        untied = model.untie_embeddings_and_output_weights
        if stage not in stages_of(name, of_layers, layout.pp, untied):
            continue
        copies, matrix = 1, parameter.shape
        if parameter.kind == "expert":
            copies, matrix = parameter.shape[0] // layout.ep, parameter.shape[1:]
        local = _local_matrix(name, parameter, matrix, layout)
        factored = len(matrix) == 2 and min(matrix) >= config.optimizer.adafactor_min_dim
        yield copies * (sum(local) if factored else math.prod(local))


def _local_matrix(
    name: str, parameter: LogicalParameter, matrix: tuple[int, ...], layout: Layout
) -> tuple[int, ...]:
    """The part of a matrix or vector on one rank: tensor parallelism divides one dimension."""
    if len(matrix) == 1:
        return (matrix[0] // layout.tp if parameter.split else matrix[0],)
    rows, columns = matrix
    if parameter.kind == "router":
        return rows, columns
    if parameter.kind == "expert":
        if name.endswith(".down"):
            return rows // layout.etp, columns
        return rows, columns // layout.etp
    if name.endswith((".down.weight", ".attention.output.weight")):
        return rows, columns // layout.tp
    return rows // layout.tp, columns
