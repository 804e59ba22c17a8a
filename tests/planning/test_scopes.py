"""Categories of new tensors by where they are created."""

from __future__ import annotations

import torch

from megatron_moe.model import loss
from megatron_moe.moe import dispatcher, exchange
from megatron_moe.planning.scopes import BACKWARD


def test_functions_with_a_category_exist():
    """They are known by their names alone: another name would make their tensors activations."""
    found = {**vars(loss), **vars(dispatcher), **vars(exchange)}
    assert all(issubclass(found[name], torch.autograd.Function) for name in BACKWARD)
