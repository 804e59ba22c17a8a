"""The emulated device has the values of the CPU and the errors of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.emulated_gpu import GPU, HostRead, HostReads, OnGpu, emulated_gpu


def test_values_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 4), torch.randn(4, 2)
    with emulated_gpu():
        product = left.to("cuda") @ right.to(GPU)
        product[1] += torch.arange(2, device=GPU)
        product[:, 0].mul_(2.0)
        picked = product[torch.tensor([2, 0])]
        assert product.device == picked.device == GPU
        assert product.is_cuda
        found, chosen = product.cpu(), picked.to("cpu", torch.float64)
    expected = left @ right
    expected[1] += torch.arange(2)
    expected[:, 0] *= 2.0
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(chosen, expected[[2, 0]].double())


def test_a_module_moves_and_copies_cross() -> None:
    with emulated_gpu():
        layer = nn.Linear(3, 2, bias=False, device="meta").to_empty(device="cuda")
        weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        layer.weight.copy_(weight)
        assert isinstance(layer.weight, nn.Parameter)
        assert isinstance(layer.weight, OnGpu)
        out = layer(torch.ones(1, 3, device="cuda"))
        back = torch.zeros(1, 2)
        back.copy_(out)
        assert out.tolist() == back.tolist() == [[6.0, 15.0]]
        assert out.sum().item() == 21.0


@pytest.mark.parametrize(
    "mixed",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: cpu @ gpu,
        lambda gpu, cpu: torch.cat([gpu, cpu]),
        lambda gpu, cpu: gpu.mul_(cpu),
        lambda gpu, cpu: torch.where(cpu > 0, gpu, 0.0),
        lambda gpu, cpu: gpu.gather(0, cpu.long()),
        lambda gpu, cpu: nn.functional.embedding(cpu.long(), gpu),
        lambda gpu, cpu: cpu[gpu.long()] + gpu,
    ],
)
def test_operands_on_two_devices_are_rejected(mixed: Callable[[Tensor, Tensor], Tensor]) -> None:
    with emulated_gpu(), pytest.raises(RuntimeError, match="same device"):
        mixed(torch.ones(2, 2, device="cuda"), torch.ones(2, 2))


def test_its_memory_is_no_array() -> None:
    with emulated_gpu(), pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()


def test_a_gemm_may_have_an_output_dtype_as_on_a_gpu() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 4, 5).bfloat16()
    total = torch.ones(2, 3, 5)
    exact = 1 + left.double() @ right.double()
    with emulated_gpu():
        there, a, b = total.to("cuda"), left.to("cuda"), right.to("cuda")
        torch.baddbmm(there, a, b, out_dtype=torch.float32, out=there)
        torch.testing.assert_close(there.cpu().double(), exact, rtol=1e-6, atol=1e-6)
        with pytest.raises(RuntimeError, match="out_dtype must be"):
            torch.baddbmm(there, a.float(), b.float(), out_dtype=torch.float32)


def test_gradients_stay_there() -> None:
    weight, x = torch.randn(3, 4), torch.randn(2, 3)
    with emulated_gpu(gradients=True):
        there = weight.to("cuda").requires_grad_()
        (x.to("cuda") @ there).sum().backward()
        assert isinstance(there.grad, OnGpu)
        torch.testing.assert_close(there.grad.cpu(), x.sum(0).unsqueeze(1).expand(3, 4))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0, 0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.sum()),
        lambda x: torch.repeat_interleave(x, x[0].long().abs(), dim=1),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: torch.zeros(2, 2).copy_(x),
        lambda x: x.numpy(force=True),
    ],
)
def test_what_reads_values_is_noticed(read: Callable[[Tensor], object]) -> None:
    with emulated_gpu():
        x = torch.ones(2, 2, device="cuda")
        read(x)
        with HostReads(), pytest.raises(HostRead):
            read(x)
        with HostReads(("<lambda>",)) as reads:
            read(x)
        assert reads.found


def test_fixed_shapes_read_nothing() -> None:
    with emulated_gpu(), HostReads() as reads:
        x = torch.ones(2, 2, device="cuda")
        x.where(x > 0, 0.0).index_select(0, x[0].long()).masked_fill_(x > 0, 1.0)
        x[x[0].long()] += x.argsort(1).cumsum(0)
        assert reads.found == []
