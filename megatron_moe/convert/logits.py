"""Whether two models say the same of a prompt; for models that fit in memory."""

from __future__ import annotations

from math import prod
from pathlib import Path

import psutil
import torch

from megatron_moe.convert.model import Model
from megatron_moe.model.reference import ReferenceOpenMoE

PROMPT = (7, 3, 11, 3, 19, 2, 5, 13)
"""Token ids, taken modulo the vocabulary, on which logits are compared."""
_SPARE = 1.2
"""Memory beside the weights, as a factor: one tensor twice, activations."""
_CGROUP = Path("/sys/fs/cgroup")


def memory_needed(model: Model) -> int:
    """Bytes for the single-device model in fp32."""
    return int(_SPARE * sum(4 * prod(tensor.shape) for tensor in model.tensors.values()))


def free_memory() -> int:
    """Bytes that this process can still get, its container's limit regarded."""
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def logits_difference(first: Model, second: Model) -> float:
    """Largest difference of logits on a prompt, by the single-device model in fp32."""
    found = []
    for model in (first, second):
        moe, size = model.config.moe, model.vocab_size
        reference = ReferenceOpenMoE(model.config.model, moe, size, seed=None)
        reference.load_logical((n, t.whole().float()) for n, t in model.tensors.items())
        tokens = torch.tensor([[token % size for token in PROMPT]])
        with torch.no_grad():
            found.append(reference.eval()(tokens, training_capacity=False).logits)
    return float((found[0] - found[1]).abs().max())
