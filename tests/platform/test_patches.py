"""For every patch: what fails without it, so that a patch that is no longer needed is noticed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from megatron_moe.platform import activate
from megatron_moe.platform.patches import PatchMismatchError, patches_of
from megatron_moe.platform.patches.base import AttributePatch, ConstantPatch
from megatron_moe.platform.patches.megatron_core import loaded_megatron_modules
from megatron_moe.platform.release import NEW, OLD, installed_release
from tests.support.patches import without
from tests.support.pool import Pool

PATCHES = patches_of(installed_release())


def allocate() -> bool:
    from megatron.core.utils import GlobalMemoryBuffer

    return GlobalMemoryBuffer().get_tensor((2,), torch.float32, "probe").device.type == "cpu"


def time_something() -> bool:
    from megatron.core.timers import Timer

    timer = Timer("probe")
    timer.start()
    timer.stop()
    return True


def use_stream() -> bool:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        return torch.cuda.current_stream() is stream


def choose_stream() -> bool:
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    chosen = torch.cuda.current_stream() is stream
    torch.cuda.set_stream(before)
    return chosen


def measure() -> bool:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    start.synchronize()
    return end.query() and start.elapsed_time(end) >= 0.0


def record_stream() -> bool:
    torch.zeros(1).record_stream(torch.cuda.current_stream())
    return True


def restore_state() -> bool:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    return torch.equal(first, torch.rand(3))


def same_seed(seed: Callable[[int], None]) -> bool:
    seed(7)
    first = torch.rand(3)
    seed(7)
    return torch.equal(first, torch.rand(3))


def restore_tracked_state() -> bool:
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    return torch.equal(first, torch.rand(3))


def route() -> bool:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    x, w = torch.randn(3, 4), torch.randn(2, 4)
    return torch.allclose(router_gating_linear(x, w, None, torch.float32), x @ w.T)


def split_sizes() -> bool:
    from megatron.core.transformer.moe import token_dispatcher

    moved = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
    return not torch.is_tensor(moved)


def refill() -> bool:
    """Without compiling, which takes a minute and ninja."""
    import megatron.core.tensor_parallel.random as random

    def compile_nothing(**options: Any) -> None:
        raise RuntimeError("it compiles")

    target, source = torch.zeros(4), torch.arange(4.0)
    view, version = target[1:], target._version
    target.untyped_storage().resize_(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "load_inline", compile_nothing)
        random._get_share_storage()(target, source)
    return torch.equal(view, source[1:]) and target._version == version


PROBES: dict[tuple[str, str], Callable[[], bool]] = {
    ("current-device", "current_device"): allocate,
    ("current-device", "synchronize"): time_something,
    ("move-to-device", "Tensor.cuda"): lambda: nn.Linear(1, 1).cuda().weight.is_cpu,
    ("streams", "Stream"): use_stream,
    ("streams", "Event"): measure,
    ("streams", "current_stream"): use_stream,
    ("streams", "default_stream"): lambda: torch.cuda.default_stream() is not None,
    ("streams", "stream"): use_stream,
    ("streams", "set_stream"): choose_stream,
    ("streams", "Tensor.record_stream"): record_stream,
    ("random-state", "get_rng_state"): restore_state,
    ("random-state", "set_rng_state"): restore_state,
    ("random-state", "manual_seed"): lambda: same_seed(torch.cuda.manual_seed),
    ("random-state", "manual_seed_all"): lambda: same_seed(torch.cuda.manual_seed_all),
    ("random-state", "_get_cuda_rng_state"): restore_tracked_state,
    ("random-state", "_set_cuda_rng_state"): restore_tracked_state,
    ("router-gemm", "te_general_gemm"): route,
    ("host-splits", "maybe_move_tensor_to_cpu"): split_sizes,
    ("share-storage", "_get_share_storage"): refill,
}
"""(patch, attribute) -> a use of the attribute, and whether its result is right."""


def label(owner: Any, attribute: str) -> str:
    return f"{owner.__name__}.{attribute}" if isinstance(owner, type) else attribute


def _needed() -> list[tuple[str, str]]:
    """Keys of `PROBES` that are replaced in the installed release."""
    names = {kind.name for kind in PATCHES}
    return sorted(key for key in PROBES if key[0] in names)


def works(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except (
        AssertionError,
        AttributeError,
        NameError,
        NotImplementedError,
        RuntimeError,
        TypeError,
    ):
        return False


def test_there_is_a_probe_for_every_attribute_that_is_replaced() -> None:
    activate()
    replaced = {
        (kind.name, label(owner, attribute))
        for kind in PATCHES
        if issubclass(kind, AttributePatch)
        for owner, attribute, _ in kind().replacements()
    }
    assert replaced == set(_needed())


@pytest.mark.parametrize(("patch", "attribute"), _needed())
def test_each_replaced_attribute_is_needed(
    patch: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all patches the probe works; with this one attribute as it was, it does not."""
    activate()
    assert works(PROBES[patch, attribute])
    with without(patch):
        (kind,) = [kind for kind in PATCHES if kind.name == patch]
        assert issubclass(kind, AttributePatch)
        for owner, name, value in kind().replacements():
            if label(owner, name) != attribute:
                monkeypatch.setattr(owner, name, value, raising=False)
        assert not works(PROBES[patch, attribute])
        monkeypatch.undo()
    assert works(PROBES[patch, attribute])


def test_streams_are_equal_only_to_themselves() -> None:
    activate()
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    assert one == one and one != other
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != one
    with torch.cuda.stream(one):
        with torch.cuda.stream(None):
            assert torch.cuda.current_stream() == one
        assert torch.cuda.default_stream() != torch.cuda.current_stream()


class NoSuchFunction(ConstantPatch):
    name = "planted"
    constants: ClassVar = {"cuda": "cpu"}
    functions = ("megatron.core.optimizer.clip_grads:gone",)


class NoSuchConstant(ConstantPatch):
    name = "planted"
    constants: ClassVar = {"never": "cpu"}
    functions = ("megatron.core.optimizer.clip_grads:get_grad_norm_fp32",)


@pytest.mark.parametrize("kind", [NoSuchFunction, NoSuchConstant])
def test_a_literal_that_is_no_longer_there_is_an_error(kind: type[ConstantPatch]) -> None:
    """So each function listed in the patches is known to have its literal, by `activate` alone."""
    with pytest.raises(PatchMismatchError, match=r"gone|none of"):
        kind().apply()


ELSEWHERE = {
    "distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__": "buffers for NCCL",
    "distributed.torch_fully_sharded_data_parallel:TorchFullyShardedDataParallel.__init__": "FSDP",
    "optimizer.grad_scaler:DynamicGradScaler.__init__": "fp16",
    "optimizer.grad_scaler:MegatronGradScaler.__init__": "fp16",
    "pipeline_parallel.combined_1f1b:combined_forward_backward_step": "overlap of two passes",
    "pipeline_parallel.hybrid_cp_schedule:hybrid_context_parallel_forward_backward": "context",
    "pipeline_parallel.utils:set_streams": "overlap of two passes",
    "tensor_parallel.data:_build_key_size_numel_dictionaries": "its broadcast; ours is used",
    "transformer.fsdp_dtensor_checkpoint:validate_loaded_state_dict": "FSDP",
    "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.__init__": "permute fusion",
    "transformer.utils:get_sliding_window_causal_mask": "sliding window",
}
"""Functions with such literals, and the feature of Megatron-Core, unused here, that they serve."""
ELSEWHERE_OF = {
    OLD: {
        "utils:GlobalSymmetricMemoryBuffer.__init__": "inference",
        "utils:get_batch_on_this_hybrid_cp_rank": "context parallelism",
    },
    NEW: {
        "optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.has_grad_norm_group": "Muon",
        "pipeline_parallel.fine_grained_activation_offload:"
        "ChunkOffloadHandler._can_manage_tensor_for_offload": "offload of activations",
        "transformer.cuda_graphs:VisionTECudaGraphHelper._get_sample_arguments": "its CUDA graphs",
        "transformer.cuda_graphs:_set_skip_fp8_weight_update_tensor": "its CUDA graphs",
        "transformer.moe.moe_layer:MoELayer.setup_delayed_wgrad_for_dispatch_backward_overlap": (
            "its MoE layer on streams"
        ),
        "transformer.moe.paged_stash:check_paged_stash_host_spill": "its paged activations",
        "transformer.moe.paged_stash:check_paged_stash_overflow": "its paged activations",
        "transformer.moe.token_dispatcher:_HybridEPManager.__init__": "its HybridEP",
    },
}
"""The same of one release."""

ROOTS = ("distributed", "optimizer", "pipeline_parallel", "tensor_parallel", "transformer")
FILES = ("parallel_state", "process_groups_config", "timers", "utils")
SKIPPED = ("distributed.fsdp", "optimizer.cpu_offloading", "transformer.custom_layers")


def strings(code: CodeType) -> set[str]:
    """All string constants of a function, those of inner functions included."""
    found: set[str] = set()
    for value in code.co_consts:
        if isinstance(value, CodeType):
            found |= strings(value)
        found |= {v for v in (value if isinstance(value, tuple) else (value,)) if type(v) is str}
    return found


def functions_of(module: Any) -> Iterator[tuple[str, FunctionType]]:
    """Functions and methods defined in a module."""
    owners = [
        v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__
    ]
    for owner in [module, *owners]:
        prefix = "" if owner is module else f"{owner.__name__}."
        for name, value in vars(owner).items():
            value = getattr(value, "__func__", value)
            function = inspect.unwrap(value) if callable(value) else value
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                yield prefix + name, function


def literal_functions() -> set[str]:
    """Functions that training may run through whose code has "cuda" or a CUDA tensor type."""
    literals = {"cuda", "cuda:0"} | {f"torch.cuda.{t}Tensor" for t in ("Float", "Half", "BFloat16")}
    found = set()
    for module in loaded_megatron_modules():
        short = module.__name__.removeprefix("megatron.core.")
        if short.startswith(SKIPPED) or (short.split(".")[0] not in ROOTS and short not in FILES):
            continue
        for name, function in functions_of(module):
            if strings(function.__code__) & literals:
                found.add(f"{short}:{name}")
    return found


def test_no_literal_that_training_runs_through_is_overlooked() -> None:
    activate()
    import megatron.core.models.gpt
    import megatron.core.transformer.moe.moe_layer  # noqa: F401

    assert literal_functions() == {*ELSEWHERE, *ELSEWHERE_OF[installed_release()]}


def reduce_scatter_warnings(rank: int, world_size: int) -> tuple[int, int]:
    """Warnings of one collective under its older name, with and without the patch."""

    def seen() -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for kind in PATCHES:
                if kind.name in quiet:
                    kind().apply()
            torch.distributed.reduce_scatter_tensor(torch.zeros(1), torch.zeros(1))
        return len(caught)

    quiet: tuple[str, ...] = ("known-warnings",)
    with_patch = seen()
    quiet = ()
    return with_patch, seen()


def test_known_warnings_are_silent(pool: Pool) -> None:
    assert pool.run(reduce_scatter_warnings, 1) == [(0, 1)]


def test_the_tracker_does_not_warn_of_one_generator(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def messages() -> int:
        caplog.clear()
        tracker = CudaRNGStatesTracker()
        tracker.add("probe", 3)
        with tracker.fork("probe"):
            torch.rand(1)
        return len(caplog.records)

    activate()
    assert messages() == 0
    with without("random-state-warning"):
        assert messages() == 1
