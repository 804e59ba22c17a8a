"""From a configuration value to the implementation that it names.

Routers, dispatchers and drop policies are looked up in a `Registry`: the built-in ones are entries
of its table, every other one is a file of the registry's folder that registers itself. Kernels are
selected by `kernels_for`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Generic, TypeVar

from fused_kernels import Kernels, KernelUnavailable, load_kernels
from megatron_moe.config import MoEConfig
from megatron_moe.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Implementations of one role by name.

    A name that is not in the table is the name of a file: `registry["ring"]` imports
    `megatron_moe.moe.<folder>.ring`, which calls `registry.register("ring")`. The configuration
    lists the same folder for the valid values of a flag (`config/moe.py`), so that adding a file
    is all it takes.

    Args:
        folder: subpackage of `megatron_moe.moe` with the added implementations.
        built_in: the others.
    """

    def __init__(self, folder: str, **built_in: T) -> None:
        self.folder = folder
        self._entries: dict[str, T] = dict(built_in)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that enters an implementation under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def enter(implementation: T) -> T:
            if name in self._entries:
                raise ValueError(f"{name!r} is already registered in moe/{self.folder}")
            self._entries[name] = implementation
            return implementation

        return enter

    def __getitem__(self, name: str) -> T:
        """The implementation called ``name``.

        Raises:
            LookupError: no file has that name, or the file does not register it.
        """
        if name not in self._entries:
            module = f"{__package__}.{self.folder}.{name}"
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        if name not in self._entries:
            text = f"megatron_moe/moe/{self.folder}/{name}.py must exist and register {name!r}"
            raise LookupError(text)
        return self._entries[name]


def kernels_for(moe: MoEConfig, device_type: str) -> Kernels:
    """The kernels of expert layers and of dense gates on a device.

    Raises:
        UsageError: the requested implementation is not available here; the text gives the reason.
    """
    return _kernels(moe.moe_dispatch_impl, device_type)


def check_norm_width(width: int, kernels: Kernels) -> None:
    """Check that the kernel of norms takes rows of the model's width, before the first step does.

    Raises:
        UsageError: it does not.
    """
    widest = kernels.rms_norm.WIDEST
    if widest is not None and width > widest:
        names = {each.operation: each.implementation for each in kernels.selected}
        expected = f"<= {widest} with the {names['rms_norm']} kernel of norms"
        raise UsageError("--hidden-size", width, expected, "set --kernel-impl reference")


@functools.cache
def _kernels(requested: str, device_type: str) -> Kernels:
    try:
        return load_kernels(requested, device_type)
    except KernelUnavailable as error:
        flag = "--kernel-impl"
        raise UsageError(flag, error.requested, error.expected, error.reason) from None
