"""The releases of Megatron-Core that this program runs on, and what differs between them.

Patches say themselves which release they fit (`patches/`). What else differs is here, so that the
rest of the program does not ask for a release.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import shutil
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from megatron_moe.errors import UsageError

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor

OLD, NEW = "0.16.1", "0.19.2"
RELEASES = (OLD, NEW)
"""The releases that the patches fit and the tests are run on; 0.17 and later need Python 3.12."""


def pinned_release() -> str:
    """The release that `constraints.txt` pins for this Python."""
    return NEW if sys.version_info >= (3, 12) else OLD


def installed_release() -> str:
    """The installed release.

    Raises:
        UsageError: there is none, or another one than `RELEASES`.
    """
    fix, expected = f"pip install megatron-core=={pinned_release()}", " or ".join(RELEASES)
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError("package megatron-core", "missing", expected, fix) from None
    if version not in RELEASES:
        raise UsageError("package megatron-core", version, expected, fix)
    return version


def attention_config(config: TransformerConfig, norms: bool) -> TransformerConfig:
    """The configuration for attention.

    0.19 rejects norms of queries and keys without `qk_layernorm`, which elsewhere sums their
    gradients over tensor-parallel ranks: right for one weight for all heads, wrong for one that is
    split over these ranks. So attention alone sees it.

    Args:
        config: of the layer.
        norms: whether queries and keys have norms, of either kind.
    """
    if not norms or config.qk_layernorm or installed_release() == OLD:
        return config
    own = copy.copy(config)
    own.qk_layernorm = True
    return own


def check_norm_recomputation(modules: Collection[str]) -> None:
    """Check what recomputed norms need on a GPU; on a CPU a patch does without.

    Args:
        modules: that are recomputed.

    Raises:
        UsageError: 0.19 will compile an extension for them, and there is no ninja.
    """
    if "layernorm" in modules and installed_release() != OLD and shutil.which("ninja") is None:
        fix = "pip install ninja, or do not recompute layernorm: Megatron-Core compiles a function"
        raise UsageError(
            "program ninja", "missing", "in PATH with --recompute-modules layernorm", fix
        )


def build_from_spec(spec: Any, *args: Any, **kwargs: Any) -> Any:
    """A part of one of Megatron-Core's own specs, which are functions in part since 0.19."""
    from megatron.core.transformer.spec_utils import build_module

    if isinstance(spec, functools.partial):
        return spec(*args, **kwargs)
    return build_module(spec, *args, **kwargs)


def gradients_for_norm(part: MegatronOptimizer) -> list[Tensor]:
    """The gradients that one optimizer adds to the norm: each once over all of its ranks.

    Args:
        part: an optimizer, not a chain of them.

    Returns:
        Without those that are shared or are replicas on another tensor-parallel rank.
    """
    # 0.19 calls it differently, as it has norms of groups of parameters too.
    name = "get_grads_for_grad_norm"
    select = getattr(part, name if hasattr(part, name) else "get_main_grads_for_grad_norm")
    found: list[Tensor] = select()
    return found
