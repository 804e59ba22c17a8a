"""Patches of Megatron-Core: its warnings, compiled functions, literals and undefined names."""

from __future__ import annotations

import sys
import warnings
from typing import Any, ClassVar

import torch

from megatron_moe.platform.patches.base import AttributePatch, ConstantPatch, Patch
from megatron_moe.platform.release import NEW, OLD

_FILTERS: tuple[tuple[str, type[Warning]], ...] = (
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed", UserWarning),
    ("full scope is deprecated", UserWarning),
    (r"\w+ is experimental and still under active development", UserWarning),
    ("`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", Warning),
)


class KnownWarnings(Patch):
    """Warnings, on every rank, that GPU libraries are missing, and of uses of deprecated functions.

    On a GPU they are relevant, and are shown.
    """

    name = "known-warnings"

    def __init__(self) -> None:
        self._entries: list[tuple[object, ...]] = []

    def apply(self) -> None:
        for message, category in _FILTERS:
            warnings.filterwarnings("ignore", message=message, category=category)
            self._entries.append(warnings.filters[0])

    def undo(self) -> None:
        while self._entries:
            entry = self._entries.pop()
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]


class NoTransformerEngine(Patch):
    """Megatron-Core without Transformer Engine, which is of no use on a CPU.

    Where it is installed, Megatron-Core imports it, which fails without the CUDA driver; where that
    succeeds, its optimizers take Transformer Engine's, which fail on parameters on a CPU. Does
    nothing in a process that has imported it already.
    """

    name = "no-transformer-engine"

    def __init__(self) -> None:
        self._hidden = False

    def apply(self) -> None:
        self._hidden = _TE not in sys.modules
        if self._hidden:
            sys.modules[_TE] = None  # type: ignore[assignment]  # importing it is an ImportError

    def undo(self) -> None:
        if self._hidden:
            del sys.modules[_TE]


_TE = "transformer_engine"


class NoFusion(Patch):
    """Megatron-Core's small functions as they are written, not compiled.

    It decorates them with `torch.compile`. On a CPU that needs a C++ compiler at run time, takes
    seconds in the first step and, before anything runs, more than doubles the time to import
    Megatron-Core (`docs/cpu_engine.md`). Imports it without compiling; if it is imported already,
    puts the undecorated functions in place of the compiled ones.
    """

    name = "no-fusion"

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def apply(self) -> None:
        # Decorators run at import, so `torch.compile` does nothing for as long as that takes.
        original = torch.compile
        torch.compile = _plain  # type: ignore[assignment]
        try:
            import megatron.core.jit as jit
        finally:
            torch.compile = original  # type: ignore[assignment]
        self._replace(jit, "jit_fuser", jit.noop_decorator)
        for module in loaded_megatron_modules():
            for owner in (module, *_classes_of(module)):
                self._undecorate(owner)

    def undo(self) -> None:
        while self._saved:
            owner, attribute, original = self._saved.pop()
            setattr(owner, attribute, original)

    def _undecorate(self, owner: Any) -> None:
        for attribute, value in list(vars(owner).items()):
            static = isinstance(value, staticmethod)
            compiled = value.__func__ if static else value
            if attribute != "jit_fuser" and getattr(compiled, "_is_torch_compile", False) is True:
                plain = compiled._torchdynamo_orig_callable
                self._replace(owner, attribute, staticmethod(plain) if static else plain)

    def _replace(self, owner: Any, attribute: str, value: Any) -> None:
        self._saved.append((owner, attribute, vars(owner)[attribute]))
        setattr(owner, attribute, value)


def loaded_megatron_modules() -> list[Any]:
    """The modules of Megatron-Core that are imported so far."""
    names = [name for name in sys.modules if name.startswith("megatron.core.")]
    return [sys.modules[name] for name in sorted(names)]


def _classes_of(module: Any) -> list[type]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


def _plain(function: Any = None, **options: Any) -> Any:
    return _plain if function is None else function


class DeviceLiterals(ConstantPatch):
    """The literal `device="cuda"` in the functions that our training runs through."""

    name = "device-literals"
    constants: ClassVar = {"cuda": "cpu"}
    functions = (
        "megatron.core.pipeline_parallel.schedules:forward_step",
        "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining",
        "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
        "megatron.core.pipeline_parallel.schedules:"
        "forward_backward_pipelining_without_interleaving",
        "megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.__init__",
        "megatron.core.optimizer.optimizer:FP32Optimizer.__init__",
        "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        "megatron.core.optimizer.clip_grads:count_zeros_fp32",
        "megatron.core.transformer.utils:get_default_causal_mask",
        "megatron.core.utils:local_multi_tensor_l2_norm",
    )
    functions_of: ClassVar = {
        OLD: ("megatron.core.transformer.moe.moe_utils:track_moe_metrics",),
        NEW: ("megatron.core.optimizer.optimizer:MegatronOptimizer.has_grad_norm_group",),
    }


class TensorTypeNames(ConstantPatch):
    """The optimizers group parameters by the name of their tensor type, e.g. a CUDA FloatTensor."""

    name = "tensor-type-names"
    constants: ClassVar = {
        "torch.cuda.FloatTensor": "torch.FloatTensor",
        "torch.cuda.HalfTensor": "torch.HalfTensor",
        "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
    }
    functions = (
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer._build_model_and_main_param_groups",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
    )


class RouterGemm(AttributePatch):
    """`moe_utils.te_general_gemm` is compared with None, but undefined without Transformer Engine.

    Our MoE layer does not use this nor the next patch; comparisons with the stock layer do.
    """

    name = "router-gemm"
    releases = (OLD,)

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.transformer.moe.moe_utils as moe_utils

        return [(moe_utils, "te_general_gemm", None)]


class HostSplits(AttributePatch):
    """The sizes of the stock dropless dispatcher's all-to-all, as host values.

    It converts them when it copies them from the GPU. Sizes that are on the CPU already would stay
    tensors, which the collective does not accept.
    """

    name = "host-splits"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

        return [(token_dispatcher, "maybe_move_tensor_to_cpu", _to_host)]


class ShareStorage(AttributePatch):
    """Recomputation of norms: a freed tensor gets the memory of its second computation.

    By a C++ function that is compiled in the first backward pass, which takes a compiler and ninja;
    after an attempt that failed, all later ones wait for its lock forever. Here bytes are copied.
    """

    name = "share-storage"
    releases = (NEW,)

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.tensor_parallel.random as random

        return [(random, "_get_share_storage", lambda: _copy_storage)]


def _copy_storage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Refill memory that was freed, beneath autograd, which counts no change of the tensor."""
    memory, bytes_of = target.untyped_storage(), source.untyped_storage()
    memory.resize_(bytes_of.nbytes())
    memory.copy_(bytes_of)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
