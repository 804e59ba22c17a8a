"""Memory of one rank by category, and the part of it that does not depend on a batch.

Parameters, gradients and optimizer state follow from the sizes and the layout alone: integers, no
torch. What a step adds to them is in `activation_memory.py` and `step_memory.py`.

Letters: b bytes of a parameter (2 in bf16, 4 in fp32), P parameters of the rank, D ranks that share
the state of an optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from megatron_moe.config import ModelConfig, MoEConfig, RunConfig
from megatron_moe.model.counting import (
    RankParameters,
    parameters_per_rank,
    stages_of,
    stages_of_layers,
)
from megatron_moe.model.logical import LogicalParameter, ParameterKind, logical_parameters
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.muon import muon_shares

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
    """fp32 logits of a chunk of tokens, copies of their operands, and their gradients."""
    communication_buffers: int = 0
    """What collectives gather into and that outlives them."""

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.values)

    @property
    def values(self) -> tuple[int, ...]:
        """The bytes in the order of `CATEGORIES`."""
        return (
            self.parameters,
            self.gradients,
            self.optimizer,
            self.activations,
            self.dispatch_buffers,
            self.logits,
            self.communication_buffers,
        )

    @classmethod
    def of(cls, values: Iterable[int]) -> MemoryByCategory:
        """From the bytes in the order of `CATEGORIES`."""
        parameters, gradients, optimizer, activations, dispatch, logits, communication = values
        return cls(
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            dispatch_buffers=dispatch,
            logits=logits,
            communication_buffers=communication,
        )

    def __add__(self, other: MemoryByCategory) -> MemoryByCategory:
        return MemoryByCategory.of(a + b for a, b in zip(self.values, other.values, strict=True))

    def times(self, count: int) -> MemoryByCategory:
        """So many times as much of everything."""
        return MemoryByCategory.of(count * held for held in self.values)

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
    each row and column of a factored matrix, Muon one moment of matrices and two of
    all else. The distributed optimizer divides this state over the
    data-parallel ranks, that of experts over their own, fewer, replicas.

    Args:
        config: the run.
        layout: its layout.
        vocab_size: V, padded.

    Returns:
        One entry a stage; its other categories are 0.
    """
    counts = stage_parameters(config, layout, vocab_size)
    width, found = parameter_bytes(config), []
    for stage, count in enumerate(counts):
        parts = [(count.dense, layout.dp), (count.expert, layout.edp)]
        if config.parallel.use_distributed_optimizer:
            parts = [(padded_buffer(held, ranks), ranks) for held, ranks in parts]
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


def stage_parameters(
    config: RunConfig, layout: Layout, vocab_size: int
) -> tuple[RankParameters, ...]:
    """`parameters_per_rank` of a layout."""
    degrees = (layout.tp, layout.pp, layout.ep, layout.etp)
    return _parameters(config.model, config.moe, vocab_size, degrees, layout.chunk_layers)


# A search asks for the same degrees with every micro-batch size and recomputation.
@functools.lru_cache(maxsize=4096)
def _parameters(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    degrees: tuple[int, ...],
    chunk_layers: tuple[int, ...],
) -> tuple[RankParameters, ...]:
    tp, pp, ep, etp = degrees
    return parameters_per_rank(
        model, moe, vocab_size, tp=tp, pp=pp, chunk_layers=chunk_layers, ep=ep, etp=etp
    )


def padded_buffer(numel: int, ranks: int) -> int:
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
    if settings.optimizer == "muon":
        share = muon_shares(config, layout, vocab_size)[stage]
        return masters + 4 * share.matrices + 8 * share.others
    degrees = (layout.tp, layout.pp, layout.ep, layout.etp)
    kept = _adafactor_elements(
        config.model,
        config.moe,
        vocab_size,
        degrees,
        layout.chunk_layers,
        settings.adafactor_min_dim,
    )
    return masters + 4 * kept[stage]


@functools.lru_cache(maxsize=4096)
def _adafactor_elements(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    degrees: tuple[int, ...],
    chunk_layers: tuple[int, ...],
    least: int,
) -> tuple[int, ...]:
    """Numbers that Adafactor keeps on each stage (`training/optim/factoring.py`)."""
    found = [0] * degrees[1]
    for tensor in local_tensors(model, moe, vocab_size, degrees, chunk_layers):
        factored = len(tensor.whole) == 2 and min(tensor.whole) >= least
        kept = sum(tensor.local) if factored else math.prod(tensor.local)
        for stage in tensor.stages:
            found[stage] += tensor.copies * kept
    return tuple(found)


@dataclass(frozen=True)
class LocalTensor:
    """A logical tensor as the ranks of some pipeline stages hold it.

    Args:
        name: of the logical tensor.
        kind: of it.
        copies: matrices or vectors of it on a rank; several of experts.
        whole: shape of one of them, over all tensor-parallel ranks.
        local: of a rank's part of one.
        stages: that hold it.
    """

    name: str
    kind: ParameterKind
    copies: int
    whole: tuple[int, ...]
    local: tuple[int, ...]
    stages: Set[int]


def local_tensors(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    degrees: tuple[int, ...],
    chunk_layers: tuple[int, ...],
) -> Iterator[LocalTensor]:
    """Every logical tensor, by what a rank holds of it.

    Args:
        model: its sizes.
        moe: of its experts.
        vocab_size: V, padded.
        degrees: sizes of TP, PP, EP and ETP.
        chunk_layers: layers of every model chunk, in the order of the model.
    """
    tp, pp, ep, etp = degrees
    of_layers = stages_of_layers(chunk_layers, pp)
    for name, parameter in logical_parameters(model, moe, vocab_size).items():
        copies, whole = 1, parameter.shape
        if parameter.kind == "expert":
            copies, whole = parameter.shape[0] // ep, parameter.shape[1:]
        yield LocalTensor(
            name,
            parameter.kind,
            copies,
            whole,
            _local_matrix(name, parameter, whole, tp, etp),
            stages_of(name, of_layers, pp, model.untie_embeddings_and_output_weights),
        )


def _local_matrix(
    name: str, parameter: LogicalParameter, matrix: tuple[int, ...], tp: int, etp: int
) -> tuple[int, ...]:
    """The part of a matrix or vector on one rank: tensor parallelism divides one dimension."""
    if len(matrix) == 1:
        return (matrix[0] // tp if parameter.split else matrix[0],)
    rows, columns = matrix
    if parameter.kind == "router":
        return rows, columns
    if parameter.kind == "expert":
        if name.endswith(".down"):
            return rows // etp, columns
        return rows, columns // etp
    if name.endswith((".down.weight", ".attention.output.weight")):
        return rows, columns // tp
    return rows // tp, columns
