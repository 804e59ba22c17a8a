"""Traces of chosen training steps: `--routing-trace-dir` writes them, `--routing-replay-dir` forces
their choices.

Each data-parallel rank of each pipeline stage writes one file for its rows and layers; its
tensor-parallel ranks send their shards of the sequence to the first of them. Read together and
sorted, the files of a step are the same in every layout. The format is in `moe/trace.py`.

Shapes: M micro-batches of B rows, S positions, s of them on this tensor-parallel rank, K choices,
N rows of a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe import __version__
from megatron_moe.config import RunConfig
from megatron_moe.config.steps import StepSet
from megatron_moe.data.batch import Batch
from megatron_moe.data.pipeline import Data
from megatron_moe.moe.exchange import all_gather
from megatron_moe.moe.layer import RoutingDecision
from megatron_moe.moe.observing import moe_layers, observed
from megatron_moe.moe.replay import Forced, replayed
from megatron_moe.moe.trace import (
    Trace,
    TraceAbout,
    file_name,
    read_step,
    trace_files,
    traced_steps,
    write_trace,
)
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.step import own_rows

Found = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]
"""By layer and micro-batch: experts, probabilities and kept choices, [T, K] each."""


class TraceError(RuntimeError):
    """A trace is not of the samples or of the model of the step that is to replay it."""


class RoutingTraces:
    """Records and replays the routing of steps.

    Args:
        config: of the run.
        failed: called with the flag and the error if a trace cannot be written; nothing is traced
            from then on.
    """

    def __init__(self, config: RunConfig, failed: Callable[[str, OSError], None]) -> None:
        logging = config.logging
        self._directory = logging.routing_trace_dir
        self._steps = StepSet.of("--routing-trace-steps", logging.routing_trace_steps)
        self._replays = logging.routing_replay_dir
        self._replayed = set(traced_steps(self._replays) if self._replays else ())
        self._failed = failed

    @contextmanager
    def around(
        self,
        run: TrainingRun,
        data: Data,
        batches: Sequence[Batch | None],
        step: int,
        samples: tuple[int, int],
    ) -> Iterator[None]:
        """Force and record the routing of the step within, as far as its number asks for it.

        Args:
            run: the model.
            data: of this rank.
            batches: this rank's micro-batches.
            step: number of the step, from 1.
            samples: number of its first sequence in the run, and in its data.

        Raises:
            TraceError: the trace to replay is of other samples or another model.
        """
        records = self._directory is not None and step in self._steps
        found: Found = {}
        with ExitStack() as stack:
            if step in self._replayed:
                choices = self._read(run, batches, step, samples[0])
                stack.enter_context(
                    replayed(run.chunks, lambda layer, number: Forced(choices[layer, number]))
                )
            if records:
                stack.enter_context(observed(run.chunks, _recorder(found)))
            yield
        if records:
            with run.timers.paused():
                self._write(run, data, batches, step, samples, found)

    def _read(
        self, run: TrainingRun, batches: Sequence[Batch | None], step: int, first: int
    ) -> dict[tuple[int, int], Tensor]:
        """This rank's choices [T, K] of each layer and micro-batch."""
        assert self._replays is not None
        layers = sorted(moe_layers(run.chunks))
        if not layers:
            return {}
        trace, about = read_step(self._replays, step, layers)
        moe, length = run.config.moe, run.config.data.seq_length
        made = (moe.num_experts, moe.moe_router_topk, run.config.moe_layers)
        if (about.experts, about.topk, about.layers) != made:
            raise TraceError(
                f"trace of step {step}: experts, choices and layers must be {made}"
                f" (got {(about.experts, about.topk, about.layers)})"
            )
        rows = len(trace) // (len(layers) * length)
        places = [trace.sample - first, trace.position]
        table = np.zeros((len(layers), rows, length, about.topk), dtype=np.int64)
        tokens = np.full((len(layers), rows, length), -1, dtype=np.int64)
        index = np.searchsorted(layers, trace.layer)
        try:
            table[index, places[0], places[1]] = trace.experts
            tokens[index, places[0], places[1]] = trace.token_id
        except IndexError:
            tokens[:] = -1
        choices = {}
        for number, batch in enumerate(batches):
            assert batch is not None, "every stage reads the tokens of a replay"
            own = own_rows(run, number)
            if own[-1] >= rows or (tokens[:, own] != batch.tokens_BS.cpu().numpy()).any():
                numbers = f"{first + own[0]} to {first + own[-1]}"
                raise TraceError(f"trace of step {step}: no or other tokens of samples {numbers}")
            for place, layer in enumerate(layers):
                whole_SBK = torch.from_numpy(table[place, own]).transpose(0, 1)
                mine_sBK = whole_SBK.chunk(run.ctx.layout.tp)[run.ctx.tp_rank]
                choices[layer, number] = mine_sBK.flatten(0, 1).to(run.ctx.platform.device)
        return choices

    def _write(
        self,
        run: TrainingRun,
        data: Data,
        batches: Sequence[Batch | None],
        step: int,
        samples: tuple[int, int],
        found: Found,
    ) -> None:
        """Gather over tensor-parallel ranks, and write the file on the first of them."""
        tp = run.ctx.pgs.tp
        whole = {
            key: tuple(all_gather(value.contiguous(), tp) for value in values)
            for key, values in sorted(found.items())
        }
        if run.ctx.tp_rank != 0 or self._directory is None:
            return
        layout, directory = run.ctx.layout, Path(self._directory)
        files = layout.dp * layout.pp
        about = trace_about(run.config, data.fingerprint, files)
        parts = []
        for (layer, number), (experts, probabilities, kept) in whole.items():
            batch = batches[number]
            assert batch is not None, "every stage reads the tokens of a trace"
            rows = own_rows(run, number)
            domains = data.train_domains([samples[1] + row for row in rows])
            places = [samples[0] + row for row in rows]
            choices = experts, probabilities, kept != 0
            parts.append(_rows(layer, step, places, batch, domains, choices))
        name = file_name(step, run.ctx.pp_rank * layout.dp + run.ctx.dp_rank, files)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if run.ctx.rank == 0:
                for other in trace_files(directory, step):
                    if not other.name.endswith(f"-of-{files:05d}.parquet"):
                        other.unlink(missing_ok=True)  # of an earlier start in another layout
            trace = Trace.concatenate(parts) if parts else _no_rows(about.topk)
            write_trace(directory / name, trace, about)
        except OSError as error:
            self._failed(f"--routing-trace-dir {self._directory}", error)
            self._directory = None


def _recorder(found: Found) -> Callable[[int, int, RoutingDecision], None]:
    def note(layer: int, number: int, decision: RoutingDecision) -> None:
        scores = decision.scores
        chosen_TK = scores.raw_TE.detach().gather(1, scores.choices_TK)
        # Small types that every backend gathers.
        found[layer, number] = scores.choices_TK.int(), chosen_TK.float(), decision.kept_TK.byte()

    return note


def trace_about(config: RunConfig, data: str, files: int) -> TraceAbout:
    """The metadata of a trace of training."""
    return TraceAbout(
        experts=config.moe.num_experts,
        topk=config.moe.moe_router_topk,
        layers=config.moe_layers,
        data=data,
        producer=f"megatron_moe {__version__}, training",
        files=files,
    )


def _rows(
    layer: int,
    step: int,
    samples: Sequence[int],
    batch: Batch,
    domains: Sequence[str],
    choices: tuple[Tensor, Tensor, Tensor],
) -> Trace:
    """The rows of one layer and micro-batch, sequence by sequence."""
    rows, length = batch.tokens_BS.shape
    experts, probabilities, kept = (
        value.view(length, rows, -1).transpose(0, 1).flatten(0, 1).cpu().numpy()
        for value in choices
    )
    documents = batch.documents_BS
    if documents is None:
        documents = torch.zeros_like(batch.tokens_BS)
    count = rows * length
    return Trace(
        layer=np.full(count, layer, np.int16),
        step=np.full(count, step, np.int64),
        sample=np.repeat(np.array(samples, np.int64), length),
        position=np.tile(np.arange(length, dtype=np.int32), rows),
        document=documents.cpu().numpy().reshape(-1).astype(np.int32),
        token_id=batch.tokens_BS.cpu().numpy().reshape(-1).astype(np.int32),
        experts=experts.astype(np.int16),
        probabilities=probabilities,
        kept=kept,
        domain=np.repeat(np.array(domains, dtype=object), length),
    )


def _no_rows(topk: int) -> Trace:
    """Of a pipeline stage without MoE layers."""
    none, lists = np.zeros(0, np.int64), np.zeros((0, topk), np.int64)
    return Trace(
        layer=none.astype(np.int16),
        step=none,
        sample=none,
        position=none.astype(np.int32),
        document=none.astype(np.int32),
        token_id=none.astype(np.int32),
        experts=lists.astype(np.int16),
        probabilities=lists.astype(np.float32),
        kept=lists.astype(bool),
        domain=none.astype(object),
    )
