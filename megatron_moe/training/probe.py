"""The routing probe: fixed rows through the model every `--routing-log-interval` steps.

The rows pass through the model in evaluation mode, without gradients, with evaluation capacity.
Random states, modes and statistics are restored, so that a run with probes takes bit for bit the
same steps as one without. Choices do not depend on the layout, as far as capacity groups do not:
groups of whole micro-batches do (`--moe-capacity-rule port` and `megatron`), as in an evaluation.

The choices of the first and the last probe are part of a checkpoint, whatever layout resumes it.

Shapes: M micro-batches, B rows of one, R rows of the probe, S positions, L MoE layers, K choices,
E experts, N tokens that are not padding.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import PLANES, extra_planes
from megatron_moe.data.loader import Packed, to_batch
from megatron_moe.data.pipeline import Data
from megatron_moe.errors import UsageError
from megatron_moe.moe.exchange import size_of
from megatron_moe.moe.layer import RoutingDecision
from megatron_moe.moe.observing import observed
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.training.consumed import PROBE
from megatron_moe.training.evaluation import undisturbed
from megatron_moe.training.probe_statistics import (
    Ints,
    LayerProbe,
    ProbeResult,
    agreement,
    domain_shares,
    spread_over,
    token_share,
)
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.step import fetch_batches, forward_function, own_rows

REMEMBERED = 1 << 18
"""Choices of a probe that are compared with later ones, and saved, at most; of evenly spread
tokens. A checkpoint grows by up to 0.7 MB with up to 256 experts."""


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What later probes are compared with.

    Args:
        iteration: completed steps at the probe.
        choices_LNK: choices of the remembered tokens.
        logit_rms_L: of each MoE layer.
    """

    iteration: int
    choices_LNK: Ints
    logit_rms_L: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        data = base64.b64encode(self.choices_LNK.tobytes()).decode()
        kind, shape = self.choices_LNK.dtype.str, list(self.choices_LNK.shape)
        return {
            "iteration": self.iteration,
            "choices": data,
            "dtype": kind,
            "shape": shape,
            "logit_rms": list(self.logit_rms_L),
        }

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Remembered:
        """The inverse of `to_json`; a `KeyError`, `TypeError` or `ValueError` if it is damaged."""
        if value["dtype"] not in ("|u1", "<u2"):
            raise ValueError("dtype")
        flat = np.frombuffer(base64.b64decode(value["choices"], validate=True), value["dtype"])
        return cls(
            iteration=int(value["iteration"]),
            choices_LNK=flat.reshape([int(n) for n in value["shape"]]),
            logit_rms_L=tuple(float(number) for number in value["logit_rms"]),
        )


class RoutingProbe:
    """Takes probes, and remembers the first and the last one.

    Args:
        config: of the run.
        saved: of a checkpoint, from `to_json`; `None` at the start of a run.

    Raises:
        UsageError: the saved state is damaged.
    """

    def __init__(self, config: RunConfig, saved: Any = None) -> None:
        self._interval = config.logging.routing_log_interval
        self._tokens = ""
        self._first: Remembered | None = None
        self._previous: Remembered | None = None
        if saved is not None:
            try:
                self._tokens = str(saved["tokens"])
                self._first = Remembered.of_json(saved["first"])
                self._previous = Remembered.of_json(saved["previous"])
            except (KeyError, TypeError, ValueError) as error:
                found = f"{type(error).__name__} {error}"
                fix = "--routing-log-interval 0 resumes without it"
                raise UsageError(f"'{PROBE}' of the checkpoint", found, "a probe", fix) from None

    def due(self, iteration: int) -> bool:
        """Whether a probe follows this step."""
        return iteration % self._interval == 0

    def to_json(self) -> dict[str, Any] | None:
        """For a checkpoint; `None` before the first probe."""
        if self._first is None or self._previous is None:
            return None
        saved = {"first": self._first.to_json(), "previous": self._previous.to_json()}
        return {"tokens": self._tokens, **saved}

    def take(self, run: TrainingRun, data: Data, iteration: int) -> ProbeResult | None:
        """Probe the model; a collective call.

        Where the rows are others than those of the probes before, in a new phase or after a resume
        with other data, this probe is the first one again.

        Args:
            run: the model.
            data: of this rank.
            iteration: completed steps.

        Returns:
            On rank 0 the result, else `None`.
        """
        count = max(run.config.logging.routing_probe_rows, len(data.probe_domains))
        domains, rows = ([], None) if data.probe is None else data.probe.rows(count)
        choices, squares = probe_choices(run, rows, count)
        if run.ctx.rank != 0:
            return None
        assert rows is not None, "rank 0 reads data"
        tokens = hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()
        if tokens != self._tokens:
            self._tokens, self._first, self._previous = tokens, None, None
        numbers = [data.probe_domains.index(name) for name in domains]
        return self._judge(run.config, data, rows, np.array(numbers), choices, squares, iteration)

    def _judge(
        self,
        config: RunConfig,
        data: Data,
        rows_PRS: Packed,
        domains_R: Ints,
        choices_LRSK: Ints,
        squares_LRS: Any,
        iteration: int,
    ) -> ProbeResult:
        names = (*PLANES[:3], *data.extra)
        real_RS = np.ones(rows_PRS.shape[1:], dtype=bool)
        if "padding" in names:
            real_RS = rows_PRS[names.index("padding")] == 0
        ids_N = rows_PRS[0][real_RS]
        domains_N = np.broadcast_to(domains_R[:, None], real_RS.shape)[real_RS]
        layers, experts = len(choices_LRSK), config.moe.num_experts
        of_layers = [
            config.moe.of_layer(n, config.model.num_layers).num_experts for n in config.moe_layers
        ]
        choices_LNK = choices_LRSK[:, real_RS]
        kept = spread_over(len(ids_N), REMEMBERED // (layers * choices_LNK.shape[2]))
        kind = np.dtype("u1" if experts <= 256 else "<u2")
        now = Remembered(
            iteration=iteration,
            choices_LNK=choices_LNK[:, kept].astype(kind),
            logit_rms_L=tuple(float(s[real_RS].mean()) ** 0.5 for s in squares_LRS),
        )
        found = {}
        for index, number in enumerate(config.moe_layers):
            share, chance = token_share(ids_N, choices_LNK[index], of_layers[index])
            first = self._first or now
            found[number] = LayerProbe(
                previous=_compared(now, self._previous, index),
                first=_compared(now, self._first, index),
                token_share=share,
                token_share_chance=chance,
                logit_rms=now.logit_rms_L[index],
                logit_drift=now.logit_rms_L[index] / max(first.logit_rms_L[index], 1e-30),
                domain_shares=domain_shares(
                    domains_N, choices_LNK[index], len(data.probe_domains), of_layers[index]
                ),
            )
        self._first, self._previous = self._first or now, now
        return ProbeResult(
            iteration=iteration,
            tokens=len(ids_N),
            chance=sum(config.moe.moe_router_topk / n for n in of_layers) / len(of_layers),
            domains=data.probe_domains,
            layers=found,
        )


def _compared(now: Remembered, before: Remembered | None, index: int) -> Any:
    if before is None:
        return None
    return agreement(now.choices_LNK[index], before.choices_LNK[index])


def probe_choices(run: TrainingRun, rows_PRS: Packed | None, count: int) -> tuple[Ints, Any]:
    """The choices of all MoE layers for the rows, the same on every rank; a collective call.

    Rows are dealt out as those of a global batch. Where it needs more rows than there are, they
    repeat, and only the first copy counts.

    Args:
        run: the model.
        rows_PRS: the rows, on ranks that read.
        count: R.

    Returns:
        [L, R, S, K] experts, and [L, R, S] the mean squared logit of each token, on the host.
    """
    layout, device = run.ctx.layout, run.ctx.platform.device
    per_pass = layout.micro_batch_size * layout.dp
    passes = -(-count // per_pass)
    if layout.vp is not None:
        passes = -(-passes // layout.pp) * layout.pp
    numbers = run.config.moe_layers
    length, topk = run.config.data.seq_length, run.config.moe.moe_router_topk
    shape = (len(numbers), count, length)
    choices = torch.zeros(*shape, topk, dtype=torch.int32, device=device)
    squares = torch.zeros(shape, device=device)

    def note(layer: int, number: int, decision: RoutingDecision) -> None:
        rows = [row for row in own_rows(run, number) if row < count]
        scores, batch = decision.scores, layout.micro_batch_size
        first = run.ctx.tp_rank * (len(scores.choices_TK) // batch)
        places = slice(first, first + len(scores.choices_TK) // batch)
        index = numbers.index(layer)
        for target, values in (
            (choices, scores.choices_TK.int()),
            (squares, scores.logits_TE.float().square().mean(1)),
        ):
            by_row = values.view(-1, batch, *values.shape[1:]).transpose(0, 1)
            target[index, rows, places] = by_row[: len(rows)]

    batches = None
    if rows_PRS is not None:
        chosen = [[row % count for row in own_rows(run, number)] for number in range(passes)]
        extra = extra_planes(run.config)
        batches = (to_batch(rows_PRS[:, rows], extra) for rows in chosen)
    with undisturbed(run), torch.no_grad(), observed(run.chunks, note):
        fetched = fetch_batches(run, batches, passes * per_pass)
        forward = forward_function(run, None, len(fetched))
        forward_backward(run.ctx, forward, fetched, run.wrapped, forward_only=True)
    for group in (run.ctx.pgs.tp, run.ctx.pgs.dp, run.ctx.pgs.pp):
        if size_of(group) > 1:
            for table in (choices, squares):
                dist.all_reduce(table, group=group)
    return choices.cpu().numpy(), squares.cpu().numpy()
