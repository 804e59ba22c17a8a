"""Megatron-Core's protocol for gradients that a backward pass adds to its buffer."""

from __future__ import annotations

import torch

from megatron_moe.moe.main_grad import added_to_main_grad, main_grad_of


def weight_of(**marks: object) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    for name, value in marks.items():
        setattr(weight, name, value)
    return weight


def test_only_a_wrapped_weight_has_a_buffer() -> None:
    buffer = torch.zeros(2, 3)
    assert main_grad_of(weight_of()) is None
    assert main_grad_of(weight_of(main_grad=buffer)) is None, "no one would clear it"
    assert main_grad_of(weight_of(main_grad=buffer, grad_added_to_main_grad=False)) is buffer


def test_what_is_returned_is_read_of_a_tied_weight_alone() -> None:
    for tied in (False, True):
        weight = weight_of(grad_added_to_main_grad=False, zero_out_wgrad=tied)
        returned = added_to_main_grad(weight)
        assert weight.grad_added_to_main_grad is True
        assert returned.shape == weight.shape
        if tied:
            assert returned.eq(0).all()
