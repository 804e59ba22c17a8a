"""Native kernels check their arguments; their results do not depend on threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_kernels import select
from fused_kernels.autograd import gated_silu
from fused_kernels.native.call import operation

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as before, in the end."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    """To the last bit, of tensors large enough for several."""
    torch.manual_seed(0)
    gate, combine = (select(n, "native").module for n in ("gated_silu", "combine_tokens"))
    z, grad, out = torch.randn(999, 602), torch.randn(999, 301), torch.randn(1200, 301)
    rows, kept = torch.randperm(1200)[:999].view(999, 1), torch.rand(999, 1) < 0.8
    choices = torch.rand(999, 1), rows, kept

    def results(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        found = [*gate.backward(grad, z, 2), combine.forward(out, *choices)]
        return [*found, *combine.backward(grad, out, *choices, rows)]

    alone = results(1)
    for count in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, results(count), strict=True))


def test_fake_tensors_get_the_shapes_of_the_results() -> None:
    names = ("combine_tokens", "dispatch_tokens", "gated_silu", "rank_in_expert")
    kernels = {name: select(name, "native").module for name in names}
    with FakeTensorMode():
        z, x, rows = torch.empty(6, 8), torch.empty(5, 4), torch.zeros(5, 2, dtype=torch.long)
        weights, source = torch.empty(5, 2), torch.zeros(6, dtype=torch.long)
        out, kept = torch.empty(6, 4), torch.zeros(5, 2, dtype=torch.bool)
        gate, combine = kernels["gated_silu"], kernels["combine_tokens"]
        assert gate.forward(z, 2).shape == (6, 4)
        assert [t.shape for t in gate.backward(out, z, 2)] == [(6, 8), (6, 4)]
        assert kernels["dispatch_tokens"].forward(x, source).shape == (6, 4)
        assert kernels["dispatch_tokens"].backward(out, rows, kept).shape == (5, 4)
        assert combine.forward(out, weights, rows, kept).shape == (5, 4)
        grads = combine.backward(x, out, weights, rows, kept, source)
        assert [t.shape for t in grads] == [(6, 4), (5, 2)]
        ranked = kernels["rank_in_expert"].forward(rows.t(), 3)
        assert [t.shape for t in ranked] == [(2, 5), (2, 3)]


def test_dtypes_and_layouts_without_compiled_code_are_rejected() -> None:
    z = torch.zeros(4, 6)
    with pytest.raises(TypeError, match=r"of torch\.float16, expected float32, float64, bfloat16"):
        operation("gated_silu_forward", torch.float16, [(z.half(), (4, 6), torch.float16)])
    for wrong in (z.t(), z.double(), z.int(), z.to("meta"), z[:3], z.flatten()):
        with pytest.raises(ValueError, match="gated_silu_forward_f32: expected contiguous"):
            operation("gated_silu_forward", torch.float32, [(wrong, (4, 6), torch.float32)])


class _Kind(Tensor):
    """A tensor of a class of its own."""


def test_tensors_of_other_classes_are_rejected() -> None:
    gate = select("gated_silu", "native").module
    with pytest.raises(TypeError, match="compiled kernels take plain tensors, found _Kind"):
        gate.forward(torch.zeros(4, 6).as_subclass(_Kind), 2)
    assert gate.forward(torch.nn.Parameter(torch.zeros(4, 6)), 2).shape == (4, 3)


GATE = {
    "blocks": {"blocks": 4, "z": torch.zeros(5, 16)},
    "a width that does not divide": {"z": torch.zeros(5, 7)},
    "wider gradients": {"grad": torch.zeros(5, 64)},
    "fewer rows": {"grad": torch.zeros(4, 4)},
    "another dtype": {"grad": torch.zeros(5, 4).bfloat16()},
}


@pytest.mark.parametrize("changes", GATE.values(), ids=GATE.keys())
def test_gates_that_do_not_fit_are_rejected(changes: dict[str, Any]) -> None:
    """Memory of others is neither read nor written."""
    gate = select("gated_silu", "native").module
    given = {"grad": torch.zeros(5, 4), "z": torch.zeros(5, 8), "blocks": 2}
    gate.backward(**_named(given))
    with pytest.raises(ValueError, match="expected"):
        gate.backward(**_named({**given, **changes}))


def _named(given: dict[str, Any]) -> dict[str, Any]:
    return {"grad_RF": given["grad"], "z_RM": given["z"], "blocks": given["blocks"]}


COMBINATION = {
    "a narrow gradient": {"grad_TH": torch.zeros(5, 3)},
    "a gradient of another dtype": {"grad_TH": torch.zeros(5, 4).double()},
    "few weights": {"weights_TK": torch.zeros(5, 1)},
    "few of kept": {"kept_TK": torch.ones(4, 2).bool()},
    "kept as numbers": {"kept_TK": torch.ones(5, 2).long()},
    "rows as short numbers": {"rows_TK": torch.zeros(5, 2).int()},
}


@pytest.mark.parametrize("changes", COMBINATION.values(), ids=COMBINATION.keys())
def test_combinations_that_do_not_fit_are_rejected(changes: dict[str, Tensor]) -> None:
    combine, dispatch = (select(n, "native").module for n in ("combine_tokens", "dispatch_tokens"))
    given = {
        "grad_TH": torch.zeros(5, 4),
        "out_RH": torch.zeros(6, 4),
        "weights_TK": torch.zeros(5, 2),
        "rows_TK": torch.zeros(5, 2).long(),
        "kept_TK": torch.ones(5, 2).bool(),
        "source_R": torch.zeros(6).long(),
    }
    combine.backward(**given)
    wrong = {**given, **changes}
    with pytest.raises(ValueError, match="expected contiguous"):
        combine.backward(**wrong)
    del wrong["grad_TH"], wrong["source_R"]
    if "grad_TH" not in changes:
        with pytest.raises(ValueError, match="expected contiguous"):
            combine.forward(**wrong)
    if changes.keys() & {"rows_TK", "kept_TK"}:
        with pytest.raises(ValueError, match="expected contiguous"):
            dispatch.backward(given["out_RH"], wrong["rows_TK"], wrong["kept_TK"])


def test_halves_are_rounded_to_even() -> None:
    combine = select("combine_tokens", "native").module
    weights = 1 + torch.arange(1, 33).unsqueeze(1) / 512  # Every fourth is half way.
    rows, kept = torch.zeros(32, 1).long(), torch.ones(32, 1).bool()
    found = combine.forward(torch.ones(1, 40).bfloat16(), weights, rows, kept)
    assert torch.equal(found, weights.bfloat16().expand(-1, 40))


def test_a_second_derivative_is_rejected() -> None:
    """It would silently be zero: the compiled code leaves no graph."""
    z = torch.randn(4, 6, requires_grad=True)
    h = gated_silu(z, 2, select("gated_silu", "native").module)
    (grad,) = torch.autograd.grad(h.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
