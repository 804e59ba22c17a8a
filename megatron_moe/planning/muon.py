"""What Muon keeps and computes on a rank: moments, and the products that orthogonalize."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_moe.config import RunConfig
from megatron_moe.model.counting import stages_of, stages_of_layers
from megatron_moe.model.logical import OF_GEMMS, LogicalParameter, logical_parameters
from megatron_moe.parallel.layout import Layout

MATRIX_BYTES = 50
"""Moved for each element of a matrix besides its products: gradient 4, momentum 8, its norm 4, to
bf16 and back 12, master 8, parameter 2, and decay and scale 12."""


@dataclass(frozen=True)
class MuonShare:
    """Of a rank of one pipeline stage."""

    matrices: int
    """Elements of its parts of matrices, with one moment each."""
    others: int
    """Elements of all else, with Adam's two moments each."""
    products: tuple[tuple[int, int, int, int], ...]
    """m, n, k and the number of products [m, k] [k, n] of a step."""


@functools.lru_cache(maxsize=4096)
def muon_shares(config: RunConfig, layout: Layout, vocab_size: int) -> tuple[MuonShare, ...]:
    """What Muon keeps and computes on a rank of every pipeline stage.

    Args:
        config: the run.
        layout: its layout.
        vocab_size: V, padded.
    """
    untied = config.model.untie_embeddings_and_output_weights
    of_layers = stages_of_layers(layout.chunk_layers, layout.pp)
    kept = [[0, 0] for _ in range(layout.pp)]
    products: list[dict[tuple[int, int, int], int]] = [{} for _ in range(layout.pp)]
    for name, parameter in logical_parameters(config.model, config.moe, vocab_size).items():
        rows, columns, split, count = _matrices(name, parameter, config, layout)
        for stage in stages_of(name, of_layers, layout.pp, untied):
            kept[stage][split is None] += _local(parameter, layout, split)
            if split is not None:
                for shape in _products(rows, columns, split, config, layout, parameter):
                    products[stage][shape] = products[stage].get(shape, 0) + count
    steps = config.optimizer.muon_num_ns_steps
    return tuple(
        MuonShare(matrices, others, tuple((*shape, steps * n) for shape, n in of_stage.items()))
        for (matrices, others), of_stage in zip(kept, products, strict=True)
    )


def _matrices(
    name: str, parameter: LogicalParameter, config: RunConfig, layout: Layout
) -> tuple[int, int, int | None, int]:
    """Rows, columns and split dimension of the matrices of a tensor, and how many a rank has.

    No split dimension: not a matrix of Muon's. 2: no rank has less than the whole of one.
    """
    if parameter.kind not in OF_GEMMS:
        return 0, 0, None, 0
    expert = parameter.kind == "expert"
    rows, columns = parameter.shape[-2:]
    count, ranks = (parameter.shape[0] // layout.ep, layout.etp) if expert else (1, layout.tp)
    blocks = config.model.gate_blocks if "gate" in name.split(".") else 1
    into_columns = expert != name.removesuffix(".weight").endswith((".down", ".output"))
    rows, columns = (rows, columns // blocks) if expert else (rows // blocks, columns)
    return rows, columns, 2 if ranks == 1 else int(into_columns), count * blocks


def _local(parameter: LogicalParameter, layout: Layout, split: int | None) -> int:
    """Elements on a rank."""
    if parameter.kind == "expert":
        return parameter.numel // (layout.ep * layout.etp)
    whole = parameter.kind in ("norm", "router") and not parameter.split
    return parameter.numel if whole else parameter.numel // layout.tp


def _products(
    rows: int,
    columns: int,
    split: int,
    config: RunConfig,
    layout: Layout,
    parameter: LogicalParameter,
) -> tuple[tuple[int, int, int], ...]:
    """Products m x n x k of one step for one matrix: X X^T, its square, and that times X."""
    short, long = min(rows, columns), max(rows, columns)
    ranks = layout.etp if parameter.kind == "expert" else layout.tp
    mode = config.optimizer.muon_tp_mode
    if split < 2 and mode != "duplicated":
        cut = (rows, columns)[split] // ranks
        kept = (columns, rows)[split]
        short, long = (kept, cut) if mode == "distributed" else sorted((kept, cut))
    return (short, short, long), (short, short, short), (short, long, short)
