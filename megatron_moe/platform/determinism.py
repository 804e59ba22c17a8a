"""`--deterministic-mode`: the same run twice gives the same bits, on a GPU as well.

The rules are Megatron-LM's. On a CPU runs are reproducible in any case; there the mode makes
PyTorch reject an operation that is not.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from megatron_moe.errors import UsageError

_NCCL = ("Ring", "CollnetDirect", "CollnetChain", "^NVLS")
"""Algorithms of NCCL that add in a fixed order. `Tree` does not: its order depends on the nodes."""
_VALUES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Other environment variables and their deterministic values, the one that is set first."""


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Select deterministic algorithms in PyTorch, cuBLAS, Transformer Engine and NCCL.

    Called before the first GEMM and the first process group: the libraries read their variables
    then. Variables that are set stay as they are.

    Args:
        environment: of this process.

    Raises:
        UsageError: a variable is set to a value with which results vary.
    """
    algorithms = environment.get("NCCL_ALGO")
    if algorithms is not None:
        chosen = [word.strip() for word in algorithms.split(",") if word.strip()]
        if not chosen or any(word not in _NCCL for word in chosen):
            _reject("NCCL_ALGO", algorithms, f"of {', '.join(_NCCL)}")
    for name, values in _VALUES.items():
        if environment.get(name, values[0]) not in values:
            _reject(name, environment[name], " or ".join(values))
    environment.setdefault("NCCL_ALGO", _NCCL[0])
    for name, values in _VALUES.items():
        environment.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)


def _reject(name: str, found: str, expected: str) -> None:
    what, fix = f"environment variable {name}", "or leave it unset"
    raise UsageError(what, found, f"{expected} with --deterministic-mode", fix)
