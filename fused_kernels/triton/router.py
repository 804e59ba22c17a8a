"""Softmax, the k best experts and the sums of the router's losses, a pass over the table each.

As `fused_kernels.reference.router`. The router's GEMM is torch's.

Shapes: E experts, T tokens, K choices, Q consecutive tokens with loads of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import router as reference
from fused_kernels.triton.launch import cdiv, checked, computed, launch, warps_of

ELEMENTS = 4096
"""Of the table that a program holds: all experts of some tokens."""


@triton.jit
def router_kernel(
    logits: tl.tensor,
    log_probs: tl.tensor,
    probs: tl.tensor,
    log_z: tl.tensor,
    choices: tl.tensor,
    weights: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program for `TOKENS` tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    at = expert[:, None].to(tl.int64) * tokens + token[None, :]
    real = token < tokens
    inside = (expert[:, None] < num_experts) & real[None, :]
    logit = tl.load(logits + at, mask=inside, other=float("-inf"))
    # Tokens past the end: any finite value, so that nothing is infinity less infinity.
    logit = tl.where(real[None, :], logit, 0.0)
    largest = tl.max(logit, axis=0)
    shifted = logit - largest[None, :]
    log_sum = tl.log(tl.sum(tl.exp(shifted), axis=0))
    log_prob = shifted - log_sum[None, :]
    prob = tl.exp(log_prob)
    tl.store(log_probs + at, log_prob, mask=inside)
    tl.store(probs + at, prob, mask=inside)
    tl.store(log_z + token, largest + log_sum, mask=real)
    left = tl.where(expert[:, None] < num_experts, prob, -1.0)
    for k in tl.static_range(CHOICES):
        best = tl.max(left, axis=0)
        # The first of the largest. What is no number equals nothing: its id must still be one.
        first = tl.where(left == best[None, :], expert[:, None], num_experts - 1)
        chosen = tl.min(first, axis=0)
        tl.store(choices + k * tokens + token, chosen.to(tl.int64), mask=real)
        tl.store(weights + k * tokens + token, best, mask=real)
        left = tl.where(expert[:, None] == chosen[None, :], -1.0, left)


@triton.jit
def router_backward_kernel(
    grad_log_z: tl.tensor,
    grad_probs: tl.tensor,
    grad_weights: tl.tensor,
    probs: tl.tensor,
    choices: tl.tensor,
    grad_logits: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    stride_e: tl.tensor,
    stride_t: tl.tensor,
    CHOICES: tl.constexpr,
    HAS_LOG_Z: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program for `TOKENS` tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    at = expert[:, None].to(tl.int64) * tokens + token[None, :]
    real = token < tokens
    inside = (expert[:, None] < num_experts) & real[None, :]
    prob = tl.load(probs + at, mask=inside, other=0.0)
    slope = tl.zeros((EXPERTS, TOKENS), WIDE)
    if HAS_PROBS:
        there = expert[:, None].to(tl.int64) * stride_e + token[None, :] * stride_t
        slope = tl.load(grad_probs + there, mask=inside, other=0.0)
    if HAS_WEIGHTS:
        for k in tl.static_range(CHOICES):
            chosen = tl.load(choices + k * tokens + token, mask=real, other=0)
            more = tl.load(grad_weights + k * tokens + token, mask=real, other=0.0)
            slope += tl.where(expert[:, None] == chosen[None, :], more[None, :], 0.0)
    shift = tl.sum(slope * prob, axis=0)
    if HAS_LOG_Z:
        shift -= tl.load(grad_log_z + token, mask=real, other=0.0)
    tl.store(grad_logits + at, (slope - shift[None, :]) * prob, mask=inside)


@triton.jit
def loss_sums_kernel(
    probs: tl.tensor,
    log_z: tl.tensor,
    loads: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    slopes: tl.tensor,
    stride_e: tl.tensor,
    stride_t: tl.tensor,
    programs: tl.tensor,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program for `TOKENS` tokens: its part of both sums."""
    program = tl.program_id(0)
    token = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    real = token < tokens
    inside = (expert[:, None] < num_experts) & real[None, :]
    there = expert[:, None].to(tl.int64) * stride_e + token[None, :] * stride_t
    prob = tl.load(probs + there, mask=inside, other=0.0)
    at = (token % slopes)[None, :] * num_experts + expert[:, None]
    load = tl.load(loads + at, mask=inside, other=0).to(prob.dtype)
    tl.store(parts + program, tl.sum(tl.sum(prob * load, axis=0), axis=0))
    log = tl.load(log_z + token, mask=real, other=0.0)
    tl.store(parts + programs + program, tl.sum(log * log, axis=0))


def forward(logits_ET: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, probabilities, logarithms of normalizers, choices and their weights."""
    if not runs_on(logits_ET):
        return reference.forward(logits_ET, topk)
    experts, tokens = logits_ET.shape
    logits_ET = checked("router", logits_ET, logits_ET.shape)
    log_probs_ET, probs_ET = torch.empty_like(logits_ET), torch.empty_like(logits_ET)
    log_z_T, weights_KT = logits_ET.new_empty(tokens), logits_ET.new_empty(topk, tokens)
    choices_KT = logits_ET.new_empty(topk, tokens, dtype=torch.int64)
    arguments: dict[str, Tensor | int] = {
        "logits": logits_ET,
        "log_probs": log_probs_ET,
        "probs": probs_ET,
        "log_z": log_z_T,
        "choices": choices_KT,
        "weights": weights_KT,
        "tokens": tokens,
        "num_experts": experts,
    }
    tile = _tile(experts)
    programs = cdiv(tokens, tile["TOKENS"])
    launch(router_kernel, programs, arguments, {"CHOICES": topk, **tile}, _warps(tile))
    return log_probs_ET, probs_ET, log_z_T, choices_KT, weights_KT


def backward(
    grad_log_z_T: Tensor | None,
    grad_probs_ET: Tensor | None,
    grad_weights_KT: Tensor | None,
    probs_ET: Tensor,
    choices_KT: Tensor,
) -> Tensor:
    """Gradient of the logits, [E, T]."""
    given = [x for x in (grad_log_z_T, grad_probs_ET, grad_weights_KT) if x is not None]
    if not runs_on(probs_ET, choices_KT, *given):
        return reference.backward(
            grad_log_z_T, grad_probs_ET, grad_weights_KT, probs_ET, choices_KT
        )
    (experts, tokens), dtype, topk = probs_ET.shape, probs_ET.dtype, choices_KT.shape[0]
    grad_ET = torch.empty_like(probs_ET, memory_format=torch.contiguous_format)

    def operand(x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What is not given is not read."""
        return grad_ET if x is None else checked("router", x, shape, dtype)

    # In any layout: what the balance loss makes has the experts of a token side by side.
    by_expert = grad_ET if grad_probs_ET is None else grad_probs_ET
    if by_expert.shape != probs_ET.shape or by_expert.dtype != dtype:
        operand(by_expert, (experts, tokens))
    arguments: dict[str, Tensor | int] = {
        "grad_log_z": operand(grad_log_z_T, (tokens,)),
        "grad_probs": by_expert,
        "grad_weights": operand(grad_weights_KT, (topk, tokens)),
        "probs": checked("router", probs_ET, (experts, tokens)),
        "choices": checked("router", choices_KT, (topk, tokens), torch.int64),
        "grad_logits": grad_ET,
        "tokens": tokens,
        "num_experts": experts,
        "stride_e": by_expert.stride(0),
        "stride_t": by_expert.stride(1),
    }
    tile = _tile(experts)
    constants: dict[str, Any] = {
        "CHOICES": topk,
        "HAS_LOG_Z": grad_log_z_T is not None,
        "HAS_PROBS": grad_probs_ET is not None,
        "HAS_WEIGHTS": grad_weights_KT is not None,
        "WIDE": computed(dtype),
        **tile,
    }
    programs = cdiv(tokens, tile["TOKENS"])
    launch(router_backward_kernel, programs, arguments, constants, _warps(tile))
    return grad_ET


def loss_sums(probs_TE: Tensor, log_z_T: Tensor, load_QE: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of probability times load, and that of squared logarithms."""
    if not runs_on(probs_TE, log_z_T, load_QE):
        return reference.loss_sums(probs_TE, log_z_T, load_QE)
    tokens, experts = probs_TE.shape
    tile = _tile(experts)
    programs = cdiv(tokens, tile["TOKENS"])
    parts_2P = probs_TE.new_zeros(2, programs)
    arguments: dict[str, Tensor | int] = {
        "probs": probs_TE,
        "log_z": checked("router", log_z_T, (tokens,), probs_TE.dtype),
        "loads": checked("router", load_QE, (load_QE.shape[0], experts), torch.int64),
        "parts": parts_2P,
        "tokens": tokens,
        "num_experts": experts,
        "slopes": load_QE.shape[0],
        "stride_e": probs_TE.stride(1),
        "stride_t": probs_TE.stride(0),
        "programs": programs,
    }
    launch(loss_sums_kernel, programs, arguments, tile, _warps(tile))
    balance, z = parts_2P.sum(1).unbind()
    return balance, z


def _tile(experts: int) -> dict[str, int]:
    """Experts, all of them, and tokens that a program holds."""
    padded = triton.next_power_of_2(experts)
    return {"EXPERTS": padded, "TOKENS": max(8, min(128, ELEMENTS // padded))}


def _warps(tile: dict[str, int]) -> int:
    return warps_of(tile["EXPERTS"] * tile["TOKENS"])
