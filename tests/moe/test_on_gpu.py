"""The expert layer on a device that is not the host's: the same tokens dropped, the same output.

On an emulated device the forward pass alone, as it has no gradients; on a GPU both passes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.moe import MoELayer
from tests.moe.cases import layer_of, moe_config, tokens, watched
from tests.moe.test_layer import SETTINGS
from tests.support.emulated_gpu import emulated_gpu


def _passed(layer: MoELayer, x_SBH: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and which choices were kept."""
    seen = watched(layer)
    y = layer(x_SBH)
    return y, seen[0].kept_TK


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_forward_on_an_emulated_device(settings: dict[str, Any]) -> None:
    layer, x = layer_of(moe_config(**settings)), tokens(seed=1)
    with torch.no_grad():
        expected = layer(x)
    with emulated_gpu():
        found = layer.to("cuda")(x.to("cuda"))
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_both_passes_on_a_gpu(settings: dict[str, Any]) -> None:
    layer, x = layer_of(moe_config(**settings)), tokens(seed=1)
    there = layer_of(moe_config(**settings)).to("cuda")
    x_there = x.to("cuda").requires_grad_()
    x.requires_grad_()
    (y, kept), (y_there, kept_there) = _passed(layer, x), _passed(there, x_there)
    assert torch.equal(kept_there.cpu(), kept)
    torch.testing.assert_close(y_there.cpu(), y)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_there.backward(grad.to("cuda"))
    pairs = [(x_there, x), *zip(there.parameters(), layer.parameters(), strict=True)]
    for found, expected in pairs:
        torch.testing.assert_close(found.grad.cpu(), expected.grad)
