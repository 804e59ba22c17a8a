"""Whether Transformer Engine is installed, whole, and where `--transformer-impl` takes its layers.

Three packages make one installation: `transformer-engine` (Python), `transformer_engine_cu*` (the
CUDA library) and `transformer_engine_torch` (the extension for PyTorch, built on the user's
machine). They are recognised by their files. Importing them needs the CUDA driver, and the Python
package alone raises an error that Megatron-Core, which imports it wherever it finds it, passes on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config import RunConfig
from megatron_moe.config.parallel import TransformerImpl
from megatron_moe.errors import UsageError

LEAST, LIMIT = (2, 9), (2, 12)
"""Releases >= 2.9 and < 2.12 fit, which megatron-core 0.16.1 declares."""
INSTALL = "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]==2.11.0'"
"""Without isolation the extension is built against the PyTorch that is installed; with it, against
the newest one, and the two do not fit together."""
_LIBRARIES = ("libtransformer_engine", "transformer_engine_torch")
"""Names that the files of the CUDA library and of the extension begin with."""
_WGRAD = "fused_weight_gradient_mlp_cuda"


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A package called `transformer_engine`."""

    version: str
    """Of its metadata, or `unknown`."""
    place: Path
    """Its folder."""
    missing: tuple[str, ...]
    """Libraries without a file; empty for a whole installation."""

    @property
    def fits(self) -> bool:
        """Whether Megatron-Core is made for its version."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return found is not None and LEAST <= (int(found[1]), int(found[2])) < LIMIT


@dataclass(frozen=True)
class ChosenImpl:
    """What `--transformer-impl` resolves to, and why; for the log."""

    name: TransformerImpl
    reason: str


def installation() -> Installation | None:
    """What is installed, found without importing it; `None` if nothing is."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations)))
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    # Where Transformer Engine looks: next to the package (an editable installation), in it (one
    # built from source), in `wheel_lib` (wheels), and the same in this interpreter's packages.
    roots = dict.fromkeys([place.parent, Path(sysconfig.get_paths()["purelib"])])
    folders = [
        folder
        for root in roots
        for folder in (root, root / place.name, root / place.name / "wheel_lib")
    ]
    missing = [name for name in _LIBRARIES if not any(_has(folder, name) for folder in folders)]
    if "transformer_engine_torch" in sys.modules:  # what is imported is there
        missing = []
    return Installation(version=version, place=place, missing=tuple(missing))


def _has(folder: Path, library: str) -> bool:
    return any(folder.glob(f"{library}*.so"))


def check_installation() -> None:
    """Reject an incomplete installation: Megatron-Core would fail to import with a traceback.

    Raises:
        UsageError: the package is there without one of its libraries.
    """
    found = installation()
    if found is not None and found.missing:
        what = f"version {found.version} in {found.place} without {' and '.join(found.missing)}"
        fix = (
            f"{INSTALL} builds the extension against the installed PyTorch; without"
            " --no-build-isolation pip builds it against another one"
        )
        raise UsageError("package transformer-engine", what, "installed whole, or not at all", fix)


def unavailable(device_type: str) -> tuple[str, str] | None:
    """Why Transformer Engine's layers cannot run on a device, and how they could.

    Returns:
        The reason, and the fix or an empty text; `None` where they can.
    """
    if device_type != "cuda":
        return "this machine has no CUDA device", ""
    found = installation()
    if found is None:
        return "Transformer Engine is not installed", INSTALL
    if not found.fits:
        return f"Transformer Engine {found.version} is not >= 2.9 and < 2.12", INSTALL
    return None


def choose_impl(config: RunConfig, device_type: str) -> ChosenImpl:
    """`--transformer-impl` on a device.

    Args:
        config: `parallel.transformer_impl`; and `moe.moe_expert_impl`, whose other values than
            `auto` name local experts.
        device_type: `cuda` or `cpu`.

    Raises:
        UsageError: `transformer_engine` is requested where it cannot run.
    """
    requested = config.parallel.transformer_impl
    if requested == "local":
        return ChosenImpl("local", "as requested")
    obstacle = unavailable(device_type)
    if requested == "transformer_engine":
        if obstacle is not None:
            reason, fix = obstacle
            text = f"{reason}; {fix}" if fix else reason
            raise UsageError("--transformer-impl", requested, "local or auto here", text)
        return ChosenImpl("transformer_engine", f"as requested, version {_version()}")
    if obstacle is not None:
        return ChosenImpl("local", f"auto: {obstacle[0]}")
    if config.precision.fp8_emulate:
        return ChosenImpl("local", "auto: --fp8-emulate rounds in local layers")
    experts = config.moe.moe_expert_impl
    if experts != "auto":
        return ChosenImpl("local", f"auto: --moe-expert-impl {experts} is one of local experts")
    return ChosenImpl("transformer_engine", f"auto: version {_version()} is installed")


def _version() -> str:
    found = installation()
    return "unknown" if found is None else found.version


def check_implementation(config: RunConfig, device_type: str) -> None:
    """Check `--transformer-impl`, and that `--gradient-accumulation-fusion` has its kernels.

    Transformer Engine has kernels of its own. Megatron-Core's layers take Apex's, whose absence it
    notices in some layers only, with a traceback, and in others not before the first backward pass.

    Raises:
        UsageError: the layers that are requested cannot run here, or there are no such kernels.
    """
    chosen = choose_impl(config, device_type)
    if not config.parallel.gradient_accumulation_fusion:
        return
    flag = "--gradient-accumulation-fusion"
    if device_type != "cuda":
        raise UsageError(flag, True, "unset without a CUDA device")
    if chosen.name == "local" and importlib.util.find_spec(_WGRAD) is None:
        expected = f"unset without the module {_WGRAD} of NVIDIA's Apex"
        fix = (
            "docs/transformer_engine.md has the commands that build it from source; layers of"
            " --transformer-impl transformer_engine need no Apex"
        )
        raise UsageError(flag, True, expected, fix)
