"""What the engine needs beside itself, checked by name before it is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from megatron_moe.errors import UsageError

ENGINE_VERSION = "0.16.1"
"""The one version of Megatron-Core that the patches and the tests are for."""


def check_requirements() -> None:
    """Check that the engine is the one we know and that its neighbours are what they claim to be.

    Raises:
        UsageError: Megatron-Core is missing or of another version; `psutil` is missing; or a
            package that is not NVIDIA's Apex is installed under the name `apex`.
    """
    _check_engine()
    _check_psutil()
    _check_apex()


def _check_engine() -> None:
    fix = f"pip install megatron-core=={ENGINE_VERSION}"
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError("package megatron-core", "missing", ENGINE_VERSION, fix) from None
    if version != ENGINE_VERSION:
        raise UsageError("package megatron-core", version, ENGINE_VERSION, fix)


def _check_psutil() -> None:
    # Without it the engine's writer of distributed checkpoints waits for ever instead of failing.
    if importlib.util.find_spec("psutil") is None:
        raise UsageError("package psutil", "missing", "any version", "pip install psutil")


def _check_apex() -> None:
    # Found by its files: importing a stranger's package to see who it is would run its code.
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "multi_tensor_apply" / "__init__.py").is_file() for place in places):
        raise UsageError(
            "package apex",
            str(places[0] if places else spec.origin),
            "NVIDIA's Apex built from its source, or none",
            "the apex on the package index is another project: pip uninstall apex",
        )
