"""One training step: fetch, forward and backward, check the gradient, clip, update.

`Trainer.train_step` calls `fetch_batches` and `train_step`; everything that happens between the
data loader and the updated parameters is in this file and in `parallel/schedule.py`, which runs the
micro-batches through the pipeline.

Loss normalization. A step's cross entropy is sum(mask * ce) / N, where N counts the real targets of
the whole *global* batch. The pipeline schedule divides the loss of each micro-batch by their number
M, and the gradient reduction averages over the data-parallel size D, so each micro-batch's loss is
its plain sum times M * D / N. Example: D = 2 ranks with M = 2 micro-batches each, and 1, 3, 0 and 4
real targets: N = 8, every sum is multiplied by 2 * 2 / 8, divided by M = 2 and by D = 2, and so
counts 1/8 per target. Averaging the four means instead would give a target of the first
micro-batch four times the weight of one in the last, and divide by zero in the third. The auxiliary
losses of MoE layers are means over micro-batches and data-parallel ranks by definition and need no
such factor.

Shapes: B sequences of a micro-batch, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_moe.config import OptimizerConfig
from megatron_moe.data.batch import Batch, every_stage_reads, extra_planes, fetch_step
from megatron_moe.model.fp8 import update_scales
from megatron_moe.moe.expert_bias import update_expert_biases
from megatron_moe.moe.observing import begin_step
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.training.optim.build import chained_optimizers
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.whole_model import grad_norm, params_square, zeros_in_grad

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
TakesUpdate = Callable[[int, Tensor, float], bool]
"""Of the step's number, this rank's `total_sums` and the gradient norm; may communicate."""
ForwardStep = Callable[[Iterator[Batch | None], nn.Module], tuple[Tensor, LossFunction]]


class NonFiniteError(RuntimeError):
    """The gradient of a step is infinite or not a number; parameters were not changed."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of one step on this rank."""

    sums: Tensor
    """This rank's part of the loss sums, fp64 [3] on the device; see `total_sums`."""
    grad_norm: float
    """Norm of the gradient of the whole model, before clipping."""
    zeros: Tensor | None = None
    """Zeros in that gradient, an fp64 scalar on the device, with `--log-num-zeros-in-grad`."""
    params_square: Tensor | None = None
    """Sum of the squares of all parameters after the update, with `--log-params-norm`."""


def own_rows(run: TrainingRun, number: int) -> list[int]:
    """Rows of the global batch in one of this rank's micro-batches."""
    layout = run.ctx.layout
    first = (number * layout.dp + run.ctx.dp_rank) * layout.micro_batch_size
    return list(range(first, first + layout.micro_batch_size))


def fetch_batches(
    run: TrainingRun, batches: Iterator[Batch] | None, batch_size: int
) -> Sequence[Batch | None]:
    """This rank's micro-batches of the next global batch; a collective over tensor-parallel ranks.

    Args:
        run: the model; its layout decides how many micro-batches a rank has.
        batches: micro-batches of this rank; ``None`` on ranks that do not read.
        batch_size: sequences of the global batch.

    Returns:
        ``None`` for each micro-batch if this rank's pipeline stage needs no data.
    """
    layout = run.ctx.layout
    num_microbatches = batch_size // (layout.micro_batch_size * layout.dp)
    extra = extra_planes(run.config)
    if not run.ctx.needs_data and not every_stage_reads(run.config):
        return [None] * num_microbatches
    return fetch_step(
        batches,
        num_microbatches,
        run.ctx.pgs.tp,
        (layout.micro_batch_size, run.config.data.seq_length),
        run.ctx.platform.device,
        extra,
    )


def train_step(
    run: TrainingRun,
    batches: Sequence[Batch | None],
    learning_rate: float,
    iteration: int,
    takes_update: TakesUpdate | None = None,
) -> StepResult:
    """Forward, backward and update of one global batch.

    Args:
        run: model and optimizer; both are updated.
        batches: from `fetch_batches`.
        learning_rate: of this update.
        iteration: number of this step, from 1.
        takes_update: decides, on every rank alike, whether the update is applied; by default it is.

    Raises:
        NonFiniteError: on every rank, with parameters and optimizer state unchanged, if any
            gradient on any rank is infinite or not a number.
    """
    for chunk in run.wrapped:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    begin_step(run.chunks, run.config.train.seed, iteration)
    targets = count_targets(batches, run) if run.has_loss else None
    if run.captured is None:
        sums, local = _run_passes(run, batches, targets)
    else:
        sums, local = run.captured.run(batches, targets, partial(_run_passes, run))
        # The meter keeps sums until it logs, and the next step overwrites these.
        sums = sums.clone()
    with run.timers.measure("optimizer"):
        norm, zeros = _prepare_update(run, local, iteration)
        taken = takes_update is None or takes_update(iteration, sums, norm)
        if taken:
            _update(run, learning_rate, norm, iteration)
        fixed = run.freezing.at(iteration).fixed
        update_expert_biases(run.chunks, run.ctx.pgs, apply=taken, fixed=fixed)
    update_scales(run.chunks, run.ctx.pgs)
    square = None
    if run.config.logging.log_params_norm:
        square = params_square(run.optimizer, run.ctx.platform.device)
    return StepResult(sums=sums, grad_norm=norm, zeros=zeros, params_square=square)


def _run_passes(
    run: TrainingRun, batches: Sequence[Batch | None], targets: Tensor | None
) -> tuple[Tensor, LocalGradients]:
    """All micro-batches forward and backward, and the reduction of their gradients.

    Returns:
        This rank's `total_sums`, and its gradients before they were reduced.
    """
    local = LocalGradients(run)
    forward = forward_function(run, targets, len(batches))
    reported = forward_backward(
        run.ctx, forward, batches, run.wrapped, before_reduction=local.record
    )
    return total_sums(reported, run), local


def count_targets(batches: Sequence[Batch | None], run: TrainingRun) -> Tensor:
    """Real targets N of the global batch: fp64 scalar on the device, at least 1.

    Called by the ranks that compute the loss; an all-reduce over the data-parallel group, without
    a host synchronization.
    """
    masks = [batch.loss_mask_BS for batch in batches if batch is not None]
    count = torch.stack([mask_BS.sum(dtype=torch.float64) for mask_BS in masks]).sum()
    torch.distributed.all_reduce(count, group=run.ctx.pgs.dp)
    # A batch without targets has loss 0 rather than 0 / 0.
    return count.clamp_(min=1.0)


def forward_function(
    run: TrainingRun, targets: Tensor | None, num_microbatches: int
) -> ForwardStep:
    """The function that the pipeline schedule calls for each chunk and micro-batch.

    Args:
        run: model and configuration.
        targets: N of `count_targets`; ``None`` in an evaluation, whose sums are not normalized.
        num_microbatches: M of this step.
    """
    scale = None
    if targets is not None:
        scale = (num_microbatches * run.ctx.layout.dp / targets).float()

    def forward(batches: Iterator[Batch | None], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        if batch is None:
            return chunk(None), _no_loss
        output = chunk(
            batch.tokens_BS,
            batch.labels_BS,
            batch.positions_BS,
            batch.documents_BS,
            batch.padding_BS,
        )
        return output, micro_batch_loss(batch, scale, run.config.model.logit_z_loss_coeff)

    return forward


def micro_batch_loss(batch: Batch, scale: Tensor | None, z_coeff: float) -> LossFunction:
    """From per-token losses [2, B, S] (cross entropy, squared log Z) to the micro-batch's loss.

    The second result holds fp32 sums over real targets, for reporting: `sums` = (cross entropy,
    squared log Z, number of targets).
    """

    def loss(losses_2BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Chosen, not multiplied: zero times a loss that is infinite would be NaN.
        counted_2BS = losses_2BS.float().where(batch.loss_mask_BS > 0, 0.0)
        sums = counted_2BS.sum(dim=(1, 2))
        total = sums[0] + z_coeff * sums[1]
        if scale is not None:
            total = total * scale
        reported = torch.cat((sums.detach(), batch.loss_mask_BS.sum().view(1)))
        return total, {"sums": reported}

    return loss


def _no_loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    raise AssertionError("the loss was requested from a pipeline stage without data")


def total_sums(reported: Sequence[dict[str, Any]], run: TrainingRun) -> Tensor:
    """This rank's part of a step's sums: fp64 [3], zeros where the loss is not counted."""
    if reported and run.reports_loss:
        return torch.stack([entry["sums"] for entry in reported]).double().sum(dim=0)
    return torch.zeros(3, dtype=torch.float64, device=run.ctx.platform.device)


def _prepare_update(
    run: TrainingRun, local: LocalGradients, iteration: int
) -> tuple[float, Tensor | None]:
    """Check the reduced gradients; returns their norm before clipping, and how many are zero if
    that is logged.

    The order matters: frozen weights leave the gradient before its norm is taken, and the norm is
    checked before anything is written, so that a failed step leaves a model that can be saved.
    """
    frozen = run.freezing.at(iteration)
    frozen.drop_gradients()
    run.optimizer.prepare_grads()
    frozen.hide()
    device, zeros = run.ctx.platform.device, None
    with run.timers.measure("optimizer-clip-main-grad"):
        norm = grad_norm(run.optimizer, device)
        if not math.isfinite(norm):
            _raise_non_finite(run, local, iteration, norm)
        if run.config.logging.log_num_zeros_in_grad:
            zeros = zeros_in_grad(run.optimizer, device)
    return norm, zeros


def _update(run: TrainingRun, learning_rate: float, norm: float, iteration: int) -> None:
    """Clip the gradients, whose norm is known, and apply them."""
    with run.timers.measure("optimizer-clip-main-grad"):
        clip_gradients(run.optimizer, norm, run.config.optimizer.used_clip_grad)
    set_rates(run.optimizer, run.config.optimizer, learning_rate)
    with run.freezing.at(iteration).undisturbed():
        run.optimizer.step_with_ready_grads()


def clip_gradients(optimizer: MegatronOptimizer, norm: float, limit: float) -> None:
    """Scale all gradients so that their norm is at most ``limit``; 0 disables clipping."""
    if limit <= 0 or norm <= limit:
        return
    for part in chained_optimizers(optimizer):
        grads = [p.grad for p in part.get_parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, limit / norm)


def set_rates(optimizer: MegatronOptimizer, settings: OptimizerConfig, lr: float) -> None:
    """Set the learning rate of the next update, and the weight decay of groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = settings.used_weight_decay * group.get("wd_mult", 1.0)


class LocalGradients:
    """Whether this rank's own gradients are finite, to name the ranks at which a NaN appeared.

    The decision to stop is made on the norm of the *reduced* gradient, which is the same number on
    every rank, so all ranks stop at the same step. By then a NaN has spread to all replicas.
    Therefore every rank sums its gradients just before they are reduced: one pass over them, and
    the sum is read by the host only if the norm turns out bad. With `--overlap-grad-reduce` part of
    the gradients is already reduced by then, and more ranks may be named than produced one.

    Args:
        run: the model whose gradient buffers are checked.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._sum: Tensor | None = None

    def record(self) -> None:
        """Sum the gradient buffers; called just before they are reduced."""
        if self._run.ctx.world_size > 1:
            self._sum = self._total()

    def finite(self) -> bool:
        """Whether the recorded gradients are finite; a host synchronization."""
        # A single rank reduces nothing, so its gradients are still its own after the step.
        total = self._total() if self._sum is None else self._sum
        return total is None or bool(torch.isfinite(total))

    def _total(self) -> Tensor | None:
        """A number that is finite if all gradients are."""
        # A sum over finite fp32 gradients overflows only if they are useless as well.
        parts = [
            buffer.grad_data.sum()
            for chunk in self._run.wrapped
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        ]
        return torch.stack(parts).sum() if parts else None


def _raise_non_finite(
    run: TrainingRun, local: LocalGradients, iteration: int, norm: float
) -> NoReturn:
    """Gather which ranks had non-finite gradients and raise the same error on every rank."""
    mine = torch.tensor([not local.finite()], dtype=torch.int32, device=run.ctx.platform.device)
    flags = [torch.empty_like(mine) for _ in range(run.ctx.world_size)]
    torch.distributed.all_gather(flags, mine)
    ranks = [str(rank) for rank, flag in enumerate(flags) if flag.item()]
    where = ", ".join(ranks) or "none (the sum over ranks overflowed)"
    raise NonFiniteError(
        f"gradient norm must be finite (got {norm} at iteration {iteration}); ranks with non-finite"
        f" local gradients: {where}; parameters are those of iteration {iteration - 1}"
    )
