"""The engine's small functions as they are written, not compiled.

Megatron-Core decorates them with `torch.compile`. On a CPU that needs a C++ compiler at run time,
takes seconds at the first step and, before anything runs, makes importing the engine more than
twice as slow (`docs/cpu_engine.md`).
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron_moe.platform.patches.base import Patch


class NoFusion(Patch):
    """Loads the engine uncompiled; if it is loaded already, uncovers the written functions."""

    name = "no-fusion"

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def apply(self) -> None:
        original = torch.compile
        torch.compile = _plain  # type: ignore[assignment]
        try:
            import megatron.core.jit as jit
        finally:
            torch.compile = original  # type: ignore[assignment]
        self._replace(jit, "jit_fuser", jit.noop_decorator)
        for module in engine_modules():
            for owner in (module, *_classes_of(module)):
                self._uncover(owner)

    def undo(self) -> None:
        while self._saved:
            owner, attribute, original = self._saved.pop()
            setattr(owner, attribute, original)

    def _uncover(self, owner: Any) -> None:
        for attribute, value in list(vars(owner).items()):
            static = isinstance(value, staticmethod)
            compiled = value.__func__ if static else value
            if attribute != "jit_fuser" and getattr(compiled, "_is_torch_compile", False) is True:
                plain = compiled._torchdynamo_orig_callable
                self._replace(owner, attribute, staticmethod(plain) if static else plain)

    def _replace(self, owner: Any, attribute: str, value: Any) -> None:
        self._saved.append((owner, attribute, vars(owner)[attribute]))
        setattr(owner, attribute, value)


def engine_modules() -> list[Any]:
    """The modules of Megatron-Core that are loaded now."""
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
