"""Names of compiled modules that Transformer Engine imports, and that nothing here calls."""

from __future__ import annotations

import sys
from enum import IntEnum
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TENSORS = ("INPUT", "WEIGHT", "OUTPUT")
_INDEXED = {
    # Quantizers lie in lists at these indices.
    "FP8FwdTensors": [f"GEMM{gemm}_{tensor}" for gemm in (1, 2, 3) for tensor in _TENSORS],
    "FP8BwdTensors": [f"GRAD_{name}{gemm}" for gemm in (1, 2, 3) for name in ("OUTPUT", "INPUT")],
}
_IMPORTED_BY_STAR = (
    "layernorm_fwd",
    "layernorm_bwd",
    "rmsnorm_fwd",
    "rmsnorm_bwd",
    "rmsnorm_bwd_add",
)
"""What Transformer Engine takes from its module of all exports."""


class _Members(type):
    """A class whose every attribute is a name: the members of an enum, to compare and to hash."""

    def __getattr__(cls, member: str) -> str:
        if member.startswith("__"):
            raise AttributeError(member)
        return f"{cls.__name__}.{member}"


class _Compiled(ModuleType):
    """Has the functions of a Python module; of every other name a placeholder."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name in _INDEXED:
            value = IntEnum(name, {member: i for i, member in enumerate(_INDEXED[name])})
        elif name[0].isupper():
            value = _Members(name, (), {})
        else:
            value = _refusal(name)
        setattr(self, name, value)
        return value


def _refusal(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} is compiled code")

    return refuse


def module_of(functions: ModuleType) -> ModuleType:
    """The stand-in for `transformer_engine_torch` with these functions."""
    module = _Compiled("transformer_engine_torch")
    public = {name: value for name, value in vars(functions).items() if not name.startswith("_")}
    vars(module).update(public)
    for name in _IMPORTED_BY_STAR:
        getattr(module, name)
    return module


class _Anything(ModuleType):
    """A module of which anything can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _refusal(name)


class _Finder(MetaPathFinder, Loader):
    """Finds a placeholder for the modules in `_KERNELS`."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _KERNELS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def replace_kernel_modules() -> None:
    """Import a placeholder in the place of modules whose own imports are larger than the rest."""
    sys.meta_path.insert(0, _Finder())


_KERNELS = (
    # Written in Triton, a package of 700 MB.
    "transformer_engine.pytorch.triton.cross_entropy",
    "transformer_engine.pytorch.triton.pad",
    "transformer_engine.pytorch.triton.permutation",
    # Export to ONNX.
    "transformer_engine.pytorch.onnx_extensions",
)
