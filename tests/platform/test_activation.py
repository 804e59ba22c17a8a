"""Nothing happens at import; activation is idempotent and complete; a GPU is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from megatron_moe.errors import UsageError
from megatron_moe.platform import activate, activation, deactivate
from megatron_moe.platform.patches import PatchMismatchError, patches_of
from megatron_moe.platform.patches.base import AttributePatch, ConstantPatch, find_function
from megatron_moe.platform.release import installed_release

ROOT = Path(__file__).resolve().parents[2]
NO_CUDA = r"Torch not compiled with CUDA enabled|Found no NVIDIA driver"
"""What builds of torch without and with CUDA say where there is no GPU."""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # torch's, where CUDA's tools are installed and a GPU is not.
    lines = (done.stdout + done.stderr).splitlines(keepends=True)
    return "".join(line for line in lines if "No CUDA runtime is found" not in line)


def test_importing_the_platform_changes_nothing() -> None:
    shown = python(
        "import torch\n"
        "before = {**vars(torch.cuda)}, torch.Tensor.cuda, torch.compile\n"
        "import megatron_moe.platform, sys\n"
        "after = {**vars(torch.cuda)}, torch.Tensor.cuda, torch.compile\n"
        "print(before == after, any(n.startswith('megatron.') for n in sys.modules))"
    )
    assert shown == "True False\n"


def test_activation_before_megatron_core_is_imported_is_quiet_and_compiles_nothing() -> None:
    shown = python(
        "from megatron_moe.platform import activate\n"
        "activate()\n"
        "import sys\n"
        "print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)\n"
        "import torch._dynamo, torch\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())"
    )
    assert shown == "False False\n2.0\n"


def test_activation_after_megatron_core_is_imported_replaces_its_compiled_functions() -> None:
    shown = python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core\n"
        "from megatron.core.fusions import fused_bias_swiglu as f\n"
        "from megatron.core.transformer.moe.router import TopKRouter as R\n"
        "compiled = lambda x: getattr(x, '_is_torch_compile', False)\n"
        "print(compiled(f.swiglu), compiled(R._apply_expert_bias))\n"
        "from megatron_moe.platform import activate, deactivate\n"
        "activate(); print(compiled(f.swiglu), compiled(R._apply_expert_bias))\n"
        "deactivate(); print(compiled(f.swiglu), compiled(R._apply_expert_bias))"
    )
    assert shown == "True True\nFalse False\nTrue True\n"


def snapshot() -> dict[str, Any]:
    """Everything that patches replace, as it is now."""
    seen: dict[str, Any] = {"torch.compile": torch.compile}
    for kind in patches_of(installed_release()):
        patch = kind()
        if isinstance(patch, AttributePatch):
            for owner, name, _ in patch.replacements():
                seen[f"{owner.__name__}.{name}"] = vars(owner).get(name, "absent")
        if isinstance(patch, ConstantPatch):
            seen |= {name: find_function(name).__code__ for name in patch.literals()}
    return seen


def test_a_second_activation_does_nothing_and_deactivation_undoes_the_first() -> None:
    activate()
    deactivate()
    original = snapshot()
    platform = activate()
    assert platform.patches == tuple(kind.name for kind in patches_of(installed_release()))
    active = snapshot()
    assert {name for name in original if active[name] is original[name]} == {"torch.compile"}
    assert activate() == platform
    assert all(snapshot()[name] is active[name] for name in active)
    deactivate()
    assert all(snapshot()[name] is original[name] for name in original)
    deactivate()
    activate()


class Planted(ConstantPatch):
    name = "planted"
    constants: ClassVar = {"cuda": "cpu"}
    functions = ("megatron.core.utils:gone",)


def test_a_patch_that_does_not_fit_leaves_nothing_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    deactivate()
    kinds = (*patches_of(installed_release()), Planted)
    monkeypatch.setattr(activation, "patches_of", lambda release: kinds)
    with pytest.raises(PatchMismatchError, match=r"no function megatron\.core\.utils:gone"):
        activate()
    assert activation._applied == []
    with pytest.raises((AssertionError, RuntimeError), match=NO_CUDA):
        torch.zeros(1).cuda()
    monkeypatch.undo()
    activate()


def test_a_cpu_is_named_and_rejects_nccl() -> None:
    platform = activate("gloo")
    assert (platform.kind, platform.device, platform.backend) == (
        "cpu",
        torch.device("cpu"),
        "gloo",
    )
    with pytest.raises(UsageError) as caught:
        activate("nccl")
    message = "--distributed-backend must be gloo or auto (got 'nccl'); this machine has no GPU"
    assert str(caught.value) == message


@pytest.mark.parametrize(("asked", "taken"), [("auto", "nccl"), ("nccl", "nccl")])
def test_a_gpu_is_taken_as_it_is(asked: Any, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deactivate()
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    platform = activate(asked)
    assert platform.patches == () and activation._applied == []
    assert (platform.kind, platform.device, platform.backend) == (
        "cuda",
        torch.device("cuda", 3),
        taken,
    )
    assert chosen == [torch.device("cuda", 3)]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(
        UsageError, match=r"--distributed-backend must be nccl or auto on a GPU \(got 'gloo'\)"
    ):
        activate("gloo")
    with pytest.raises(
        UsageError, match=r"LOCAL_RANK must be < 4, the GPUs of this node \(got 4\)"
    ):
        activate(asked)
    monkeypatch.undo()
    activate()
