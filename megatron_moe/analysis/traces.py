"""Routing traces of a checkpoint: every choice of every token of a sample, as Parquet.

The format is that of pretraining's `--routing-trace-dir` (`moe/trace.py`, docs/routing_trace.md),
with a file for each batch. A file that is there already is kept, so that an interrupted command
continues.

Shapes: B rows, S tokens of a row, T = B S tokens row by row, L MoE layers, N = L T, K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_moe import __version__
from megatron_moe.analysis.model import MoEModel, MoERunner
from megatron_moe.analysis.observation import LayerRouting, Observation
from megatron_moe.analysis.sample import Sample
from megatron_moe.errors import UsageError
from megatron_moe.moe.trace import Trace, TraceAbout, file_name, read_about, write_trace


def write_traces(
    folder: Path,
    model: MoEModel,
    runner: MoERunner,
    sample: Sample,
    dtype: torch.dtype,
    advance: Callable[[int], object],
) -> None:
    """Write the traces of a checkpoint.

    Args:
        folder: of this checkpoint alone.
        model: the checkpoint.
        runner: the same, loaded.
        sample: the tokens.
        dtype: of the computation.
        advance: called with the number of batches done.

    Raises:
        UsageError: pyarrow is not installed, or the folder has traces of something else.
    """
    about = about_of(model, sample, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    present = check_folder(folder, model, about)
    first_row = 0
    for batch in sample.batches():
        path = folder / file_name(model.step or 0, batch.number, sample.num_batches)
        if path.name not in present:
            write_trace(path, _trace(runner.run(batch), model, sample, first_row), about)
        first_row += len(batch.tokens_BS)
        advance(1)


def about_of(model: MoEModel, sample: Sample, dtype: torch.dtype) -> TraceAbout:
    """The metadata of a checkpoint's traces; other weights have other metadata."""
    how = f"{str(dtype).removeprefix('torch.')}, {model.identity[:16]}"
    return TraceAbout(
        experts=model.sizes.num_experts,
        topk=model.sizes.topk,
        layers=model.sizes.moe_layers,
        data=sample.fingerprint,
        producer=f"megatron_moe {__version__} analyze_moe, {model.label}, {how}",
        files=sample.num_batches,
    )


def check_folder(folder: Path, model: MoEModel, about: TraceAbout) -> set[str]:
    """Names of the files that are there; all must be parts of the same trace.

    Raises:
        UsageError: a file is of another model or other data.
    """
    found = sorted(folder.glob(f"step-{model.step or 0:08d}-part-*.parquet"))
    for path in found:
        theirs = read_about(path)
        if theirs != about:
            fix = "remove them, or give another directory"
            expected = f"empty, or with traces of {model.label} and this --data alone"
            raise UsageError("--routing-trace-dir", f"{path}: {theirs.producer}", expected, fix)
    return {path.name for path in found}


def _trace(seen: Observation, model: MoEModel, sample: Sample, first_row: int) -> Trace:
    layers = [_layer(layer, seen, model, sample, first_row) for layer in seen.layers]
    return Trace.concatenate(layers)


def _layer(
    layer: LayerRouting, seen: Observation, model: MoEModel, sample: Sample, first_row: int
) -> Trace:
    batch = seen.batch
    rows, length = batch.tokens_BS.shape
    full = np.full(batch.size, 1, np.int64)
    documents_BS = batch.documents_BS - batch.documents_BS[:, :1]
    return Trace(
        layer=full * layer.layer,
        step=full * (model.step or 0),
        sample=np.repeat(np.arange(first_row, first_row + rows), length),
        position=np.tile(np.arange(length), rows),
        document=documents_BS.ravel(),
        token_id=batch.tokens_BS.ravel(),
        experts=layer.ids_TK.cpu().numpy(),
        probabilities=layer.probs_TK.float().cpu().numpy(),
        kept=layer.kept_TK.cpu().numpy(),
        domain=np.full(batch.size, sample.names[batch.domain], dtype=object),
    )
