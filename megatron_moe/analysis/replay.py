"""Forward passes of a checkpoint with the choices of a trace: losses beside those of its own.

What differs between two computations of a model, e.g. in fp32 and bf16, is partly that a few
tokens choose other experts; with the choices of a trace, all tokens go to the same ones. The trace
is one that `traces.py` wrote of the same sample: of the same checkpoint computed otherwise, or of
another one with as many experts, whose choices these experts then serve.

Choices, which of them are kept, and probabilities are those of the trace; the rule of the model
makes combine weights of the probabilities.

Shapes: T tokens, K choices, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe.analysis.ablation import ALL, change_of, evaluate
from megatron_moe.analysis.model import MoEModel, MoERunner
from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.analysis.result import Table
from megatron_moe.analysis.sample import Sample
from megatron_moe.errors import UsageError
from megatron_moe.moe.trace import Trace, file_name, read_about, read_trace, trace_files
from megatron_moe.moe.trace import traced_steps as steps_in

FLAG = "--routing-replay-dir"


class Replay:
    """The trace of a sample, batch by batch.

    Args:
        folder: of one checkpoint, as `write_traces` fills it.
        model: the checkpoint that is to make these choices.
        sample: the tokens.

    Raises:
        UsageError: the folder has no whole trace of this sample, or of other sizes than the model.
    """

    def __init__(self, folder: Path, model: MoEModel, sample: Sample) -> None:
        self._folder, self._sample = folder, sample
        steps = steps_in(folder)
        if len(steps) != 1:
            found = f"{folder}: traces of {len(steps)} steps"
            expected = "a folder with the trace of one checkpoint"
            fix = "write it with --routing-trace-dir DIR, and give DIR/<checkpoint>"
            raise UsageError(FLAG, found, expected, fix)
        self._step = steps[0]
        files = trace_files(folder, self._step)
        about = read_about(files[0])
        self.producer = about.producer
        sizes = model.sizes
        own = (sizes.num_experts, sizes.topk, sizes.moe_layers)
        if (about.experts, about.topk, about.layers) != own:
            expected = f"a trace of {own[0]} experts, {own[1]} choices and MoE layers " + ", ".join(
                map(str, sizes.moe_layers)
            )
            found = f"{about.experts}, {about.topk} and {', '.join(map(str, about.layers))}"
            raise UsageError(f"{FLAG} {folder}", found, f"{expected}, as {model.label}")
        if about.data != sample.fingerprint:
            expected = "a trace that tools/analyze_moe.py wrote of these tokens"
            fix = "give the --data, --tokens, --seq-length and --batch-size of that command"
            raise UsageError(f"{FLAG} {folder}", f"a trace by {about.producer}", expected, fix)
        if len(files) != sample.num_batches:
            expected = f"{sample.num_batches}, one for each batch"
            fix = "repeat the command that was to write them"
            raise UsageError(f"files of {FLAG} {folder}", len(files), expected, fix)

    def of(self, batch: TokenBatch) -> Trace:
        """The choices of a batch in all layers.

        Raises:
            UsageError: the file is damaged, or of other tokens.
        """
        name = file_name(self._step, batch.number, self._sample.num_batches)
        trace, _ = read_trace(self._folder / name)
        return trace

    @contextmanager
    def forced(self, runner: MoERunner, batch: TokenBatch) -> Iterator[None]:
        """Within this context the model makes these choices for the tokens of the batch."""
        trace = self.of(batch)
        with ExitStack() as contexts:
            for layer in runner.sizes.moe_layers:
                rows = trace.select(trace.layer == layer)
                ids_TK = torch.from_numpy(rows.experts.astype(np.int64))
                weights_TK = runner.combine_weights(torch.from_numpy(rows.probabilities.copy()))
                kept_TK = torch.from_numpy(rows.kept.copy())
                contexts.enter_context(runner.forced(layer, ids_TK, weights_TK, kept_TK))
            yield


def replay_table(
    runner: MoERunner,
    sample: Sample,
    replay: Replay,
    draws: int,
    seed: int,
    advance: Callable[[int], object],
) -> Table:
    """Losses and perplexities by domain with the model's own choices and with those of the trace.

    Args:
        runner: the loaded model.
        sample: the tokens.
        replay: the trace.
        draws: of the bootstrap over rows.
        seed: of the draws.
        advance: called with the number of batches done; each is run twice.
    """
    counts = {name: [0, 0] for name in (*sample.names, ALL)}

    def own(seen: Observation) -> None:
        trace = replay.of(seen.batch)
        for layer in seen.layers:
            rows = trace.select(trace.layer == layer.layer)
            if not np.array_equal(rows.token_id, seen.batch.tokens_BS.reshape(-1)):
                raise UsageError(FLAG, f"batch {seen.batch.number}", "a trace of these tokens")
            same, every = _shared(torch.from_numpy(rows.experts), layer.ids_TK.cpu())
            for name in (sample.names[seen.batch.domain], ALL):
                counts[name][0] += same
                counts[name][1] += every
        advance(1)

    whole = evaluate(runner, sample, seen_by=own)
    forced = evaluate(
        runner,
        sample,
        within=lambda batch: replay.forced(runner, batch),
        seen_by=lambda _: advance(1),
    )
    changes = [change_of(whole[n].rows_R, forced[n].rows_R, draws, seed) for n in whole]
    return Table(
        name="replay",
        about="loss in nats per token and perplexity, exp(loss), with the model's own choices and "
        "with those of the trace; same_choices: share of a token's experts that both have; the "
        "interval of the change of the loss is a bootstrap over rows",
        columns={
            "domain": list(whole),
            "tokens": [loss.tokens for loss in whole.values()],
            "same_choices": [counts[name][0] / counts[name][1] for name in whole],
            "loss": [loss.loss for loss in whole.values()],
            "loss_replayed": [forced[name].loss for name in whole],
            "change": [change for change, _, _ in changes],
            "low": [low for _, low, _ in changes],
            "high": [high for _, _, high in changes],
            "perplexity": [loss.perplexity for loss in whole.values()],
            "perplexity_replayed": [forced[name].perplexity for name in whole],
        },
    )


def _shared(one_TK: Tensor, other_TK: Tensor) -> tuple[int, int]:
    """Choices of the one that the other has too, and all."""
    same = (one_TK[:, :, None] == other_TK[:, None, :]).any(2)
    return int(same.sum()), same.numel()
