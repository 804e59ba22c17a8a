"""The counter of live tensors, on a few whose sizes are known."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from megatron_moe.planning.live_memory import LiveMemory, memory_of


def test_a_storage_counts_once_until_its_last_view_is_gone() -> None:
    live = LiveMemory()
    with live:
        made = torch.ones(1000)
        part = made.view(10, 100)[2:]
        assert live.now.total == 4000
        del made
        assert live.now.total == 4000
        del part
    assert live.now.total == 0
    assert live.peak.total == 4000


def test_what_the_backward_pass_needs_is_counted_and_then_freed() -> None:
    """Exp saves its result; the gradient of x exists when the saved one is gone."""
    live = LiveMemory(lambda tensor: "logits" if tensor.dim() == 1 else "activations", detail=True)
    x = torch.ones(1000, requires_grad=True)
    with live:
        live.mark([x], "parameters")
        loss = x.exp().sum()
        assert live.now.activations == 4
        assert (live.now.parameters, live.now.logits) == (4000, 4000)
        loss.backward()
        assert live.now.logits == 4000
        assert x.grad is not None
        live.mark([x.grad], "gradients")
    assert (live.now.gradients, live.now.logits) == (4000, 0)
    # The gradient of the sum is expanded, one number; that of exp meets exp's result.
    assert live.peak.logits == 8000
    assert live.peak_tensors["logits", "[1000] float32", 4000] == 2


def test_a_new_search_forgets_an_earlier_peak() -> None:
    live = LiveMemory()
    with live:
        torch.ones(1000)
        live.reset_peak()
        kept = torch.ones(10)
    assert live.peak.total == memory_of([kept, kept[:5]]) == 40


def test_fake_tensors_have_sizes() -> None:
    live = LiveMemory()
    with FakeTensorMode(), live:
        made = torch.empty(1 << 40)
        assert live.now.total == made.numel() * 4 == 1 << 42
