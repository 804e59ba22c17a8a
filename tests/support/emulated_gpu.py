"""A second device for machines without one: tensors whose device is `cuda:0`, with its rules.

A tensor on it wraps one in ordinary memory, where every operation really runs, so that values can
be compared. What is an error on a CUDA device is one here: operands on two devices, except scalars,
indices and copies, and a NumPy view of its memory. GEMMs with an output dtype, which CPUs lack, are
computed in that dtype. What is not emulated: streams, speed, sums in another order. It shows that
code leaves nothing behind on the host, not that it runs on a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
}


class OnGpu(Tensor):
    """A tensor of the emulated device."""

    inner: Tensor
    # Results keep the type that an operation gave them.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
            dispatch_device=True,
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """`cuda:0`; in an operation the CPU, where the operation creates tensors (see `_Own`)."""
        return torch.device("cpu") if _Own.running else GPU

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.inner!r})"

    def numpy(self, *, force: bool = False) -> Any:
        """As a CUDA tensor answers."""
        if force:
            HostReads.noticed("numpy")
            return self.inner.clone().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        """Its values, on the host."""
        HostReads.noticed("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _reject_two_devices(func, args, kwargs)
        if _reads_values(func, args):
            HostReads.noticed(func._schema.name)
        inner_args, inner_kwargs = pytree.tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
        run = _gemm_with_dtype(func) or func
        out = run(*inner_args, **inner_kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        known = {id(t.inner): t for t in pytree.tree_leaves((args, kwargs)) if type(t) is OnGpu}
        return pytree.tree_map_only(
            Tensor, lambda t: known[id(t)] if id(t) in known else OnGpu(t), out
        )


class HostRead(RuntimeError):
    """A value of the device was read by the host, which a captured graph cannot do."""


class HostReads:
    """Notices when the host reads a value of the device, which waits for it.

    That is: a value itself, a copy to the host, or a result whose shape depends on values. Inside,
    a read is an error unless the call stack has a function of a given name.

    Args:
        allowed: names of these functions.

    Attributes:
        found: the reads that were allowed: operation, and function.
    """

    _active: HostReads | None = None

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        self.allowed, self.found = allowed, list[tuple[str, str]]()

    def __enter__(self) -> HostReads:
        HostReads._active = self
        return self

    def __exit__(self, *error: object) -> None:
        HostReads._active = None

    @staticmethod
    def noticed(operation: str) -> None:
        """A read happens now."""
        reads = HostReads._active
        if reads is None:
            return
        names = {frame.name for frame in traceback.extract_stack()}
        known = [name for name in reads.allowed if name in names]
        if not known:
            raise HostRead(f"{operation} reads a value of the device")
        reads.found.append((operation, known[0]))


_READS = {
    *("_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal", "is_nonzero"),
    *("unique_dim", "_unique", "_unique2", "unique_consecutive", "unique_dim_consecutive"),
    *("bincount", "histc", "_assert_async", "item"),
}
"""Operations whose result, or its shape, is read from the values."""


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    name = func._schema.name.partition("::")[2]
    if func is torch.ops.aten.copy_.default:
        return isinstance(args[1], OnGpu) and not isinstance(args[0], OnGpu)
    if name in ("index", "index_put", "index_put_"):
        indices = [index for index in args[1] if index is not None]
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    if name == "repeat_interleave":
        return func._overloadname.endswith("Tensor")
    return name in _READS


_GEMMS = ("mm", "bmm", "addmm", "baddbmm")


def _gemm_with_dtype(func: Any) -> Callable[..., Tensor] | None:
    """What an overload of a GEMM with an output dtype computes; `None` for another operation."""
    if func._overloadname not in ("dtype", "dtype_out"):
        return None
    name = func._schema.name.partition("::")[2]
    if name not in _GEMMS:
        return None

    def run(*args: Any, out: Tensor | None = None, **scales: Any) -> Tensor:
        *operands, dtype = args
        factors = operands[-2:]
        if dtype != torch.float32 or any(t.dtype not in _HALVES for t in factors):
            raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16")
        result: Tensor = getattr(torch, name)(*(t.to(dtype) for t in operands), **scales)
        return result if out is None else out.copy_(result)

    return run


_HALVES = (torch.float16, torch.bfloat16)


def _reject_two_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As CUDA does: with a tensor of the device, one of the CPU is a scalar, an index or copied."""
    if func is torch.ops.aten.copy_.default:
        return
    checked = (args[0], args[2:], kwargs) if func in _INDEXED else (args, kwargs)
    for tensor in pytree.tree_leaves(checked):
        if isinstance(tensor, Tensor) and not isinstance(tensor, OnGpu) and tensor.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device, found cuda:0 and "
                f"{tensor.device} of shape {tuple(tensor.shape)} in {func}"
            )


class _Own(TorchDispatchMode):
    """While an operation runs: what it makes for itself lies where its operands lie."""

    running = 0

    def __enter__(self) -> _Own:
        _Own.running += 1
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _Own.running -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = not any(isinstance(each, Tensor) for each in pytree.tree_leaves((args, kwargs)))
        return pytree.tree_map_only(Tensor, OnGpu, out) if made else out


def _on_gpu(values: Any) -> bool:
    return any(isinstance(value, OnGpu) for value in pytree.tree_leaves(values))


class _Factories(TorchFunctionMode):
    """Lets what is asked to be made on, or moved to, `cuda` be made there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cpu:
            return _moved(args[0], "cpu")
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if not _is_gpu(kwargs.get("device")):
            with _Own() if _on_gpu((args, kwargs)) else nullcontext():
                return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        args, kwargs = pytree.tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
        return OnGpu(func(*args, **kwargs))


def _is_gpu(place: Any) -> bool:
    return isinstance(place, (str, torch.device)) and str(place).startswith("cuda")


def _to(tensor: Tensor, *args: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
    """`Tensor.to`; a place, if it is no keyword, is the first argument, or that of a tensor."""
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    elif args and isinstance(args[0], (str, torch.device)):
        device = args[0]
    dtype = next((each for each in args if isinstance(each, torch.dtype)), dtype)
    there = tensor if device is None else _moved(tensor, str(device))
    return there if dtype is None else there.to(dtype)


def _moved(tensor: Tensor, place: str) -> Tensor:
    here = isinstance(tensor, OnGpu)
    if here == _is_gpu(place):
        return tensor
    if here:
        HostReads.noticed("copy to the host")
    return tensor.inner.clone() if here else OnGpu(tensor.clone())


@contextmanager
def emulated_gpu(gradients: bool = False) -> Iterator[None]:
    """Inside, `cuda` is such a device.

    Tensors get there by `to`, not by `cuda()`: in a process without a GPU the platform module, once
    active, lets them stay where they are.

    Args:
        gradients: whether operations are recorded for a backward pass.
    """
    # A module's parameters are replaced when it moves: they change their type.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with torch.set_grad_enabled(gradients), _Factories():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
