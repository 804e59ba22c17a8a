"""`torch.cuda` as the place to be: on a CPU that place is the CPU, and moving there is free."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from megatron_moe.platform.patches.base import AttributePatch, ConstantPatch


class CurrentDevice(AttributePatch):
    """`device=torch.cuda.current_device()` is how the engine allocates nearly everything."""

    name = "current-device"

    # Here and elsewhere a new function for each name, however alike: `torch.compile` does not load
    # if two names of `torch.cuda` share one.
    def replacements(self) -> list[tuple[Any, str, Any]]:
        cpu = torch.device("cpu")
        return [
            (torch.cuda, "current_device", lambda: cpu),
            (torch.cuda, "synchronize", lambda device=None: None),
        ]


class MoveToDevice(AttributePatch):
    """`.cuda()` of a tensor, and so of a module, that is already in the right place."""

    name = "move-to-device"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        return [(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)]


class DeviceLiterals(ConstantPatch):
    """`device="cuda"` written out, in the functions of our training path that have it."""

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
        "megatron.core.transformer.moe.moe_utils:track_moe_metrics",
        "megatron.core.utils:local_multi_tensor_l2_norm",
    )


class TensorTypeNames(ConstantPatch):
    """The optimizers sort parameters by the name of their tensor type, e.g. a CUDA FloatTensor."""

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
