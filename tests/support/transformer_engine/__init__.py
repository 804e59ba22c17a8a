"""Transformer Engine's own Python on a CPU, without its compiled libraries.

`install()` makes `import transformer_engine` work in this process, and everything of Megatron-Core
that depends on it. Layers, their signatures, parameters, recipes, autograd and checkpointing are
those of the wheel, unchanged. Only what is compiled is replaced: `transformer_engine_torch`, by
`compiled.py`, where torch computes the GEMMs; and facts of a device that is not there. So the tests
say nothing of CUDA kernels, of the library's FP8 quantisation, or of speed.

For processes of its own: what is replaced here stays replaced. `make setup` puts the wheel in a
folder that is not on Python's path, since Megatron-Core imports Transformer Engine wherever it
finds it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

FOLDER = Path(sys.prefix) / "transformer-engine"
"""Where `make setup` installs the wheel."""
START = (
    "from tests.support.transformer_engine import install; install();"
    "from tests.support.worker import main; main()"
)
"""What a process of the pool runs."""


def install() -> None:
    """Make `transformer_engine` importable, before Megatron-Core is imported."""
    if not (FOLDER / "transformer_engine").is_dir():
        raise FileNotFoundError(f"{FOLDER} has no transformer_engine: make setup")
    assert "megatron.core" not in sys.modules, "it has been imported without Transformer Engine"
    sys.path.append(str(FOLDER))
    from tests.support.transformer_engine import compiled, placeholders

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then loads no CUDA libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    sys.modules["transformer_engine_torch"] = placeholders.module_of(compiled)
    placeholders.replace_kernel_modules()
    _set_device_facts()
    _import()
    _run_on_a_cpu()


def _import() -> None:
    """Import the package, whose first line would load the extension from its file."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")


def _set_device_facts() -> None:
    """Those of a Hopper GPU, which Transformer Engine asks for."""
    import torch

    class Properties:
        major, minor, multi_processor_count = 9, 0, 132

    torch.cuda.get_device_properties = lambda device=None: Properties()  # type: ignore
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *args: None)


def _run_on_a_cpu() -> None:
    """Let modules be built and run without a CUDA device, and let ours take them there."""
    import torch
    from transformer_engine.pytorch import distributed, quantization
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base

    from megatron_moe.platform import transformer_engine
    from megatron_moe.platform.patches.base import ConstantPatch

    # `assert torch.cuda.is_available()` in one function and `assert inp.is_cuda` in another ask for
    # other attributes: patched in torch, all code of this process would take itself for on a GPU.
    torch.cuda.is_available_here = lambda: True  # type: ignore[attr-defined]
    _rename(Base.__init__, "is_available", "is_available_here")
    _rename(Base.prepare_forward.__wrapped__, "is_cuda", "is_cpu")

    class Literals(ConstantPatch):
        name = "te-literals"
        constants: ClassVar = {"cuda": "cpu"}
        functions = (
            "transformer_engine.pytorch.optimizers.fused_adam:FusedAdam.__init__",
            "transformer_engine.pytorch.module.base:get_dummy_wgrad",
            "transformer_engine.pytorch.quantization:DelayedScalingRecipeState.__init__",
        )

    Literals().apply()
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    quantization.check_recipe_support = lambda recipe: None
    transformer_engine.unavailable = lambda device_type: None


def _rename(function: Any, old: str, new: str) -> None:
    assert isinstance(function, FunctionType)
    names = function.__code__.co_names
    assert old in names, f"{function.__qualname__} has no {old}"
    replaced = tuple(new if name == old else name for name in names)
    function.__code__ = function.__code__.replace(co_names=replaced)
