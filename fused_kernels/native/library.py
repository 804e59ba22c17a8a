"""The compiled operations: where they are kept, how they are made, how they are called.

The first process that needs them runs the machine's C++ compiler, `$CXX` or the first of
`COMPILERS`, for about two seconds. The library is kept in `$MEGATRON_MOE_KERNEL_CACHE`,
`$XDG_CACHE_HOME/megatron_moe` or `~/.cache/megatron_moe`, under a name made of the sources, the
command, the compiler's version and the processor, so that no node loads what another one's
processor can do, and of its own bytes, so that none loads half of it. It appears there when it is
complete: processes that compile at once do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Without these a comparison or a rounding keeps the compiler from whole vectors; neither
    # changes a result.
    *("-fno-math-errno", "-fno-trapping-math"),
)
WIDE_FLAGS = {"x86_64": ("-mprefer-vector-width=512",)}
"""By machine. Compilers prefer half of AVX-512's width; the gate's gradient of 2048 x 512 takes
0.52 ms with all of it and 0.62 to 0.72 ms with half."""
SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
_INDEX_OUT_OF_RANGE = 1


class NativeUnavailable(RuntimeError):
    """The operations cannot be had here; the message says why, in a few words."""


def unavailable() -> str | None:
    """Why the operations cannot be had here; `None` if they can."""
    try:
        _library()
    except NativeUnavailable as error:
        return str(error)
    return None


@functools.cache
def _library_or_reason() -> ctypes.CDLL | str:
    """Tried once per process, also when it fails: a compiler takes its time."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (NativeUnavailable, OSError) as error:
        return str(error)


def _library() -> ctypes.CDLL:
    found = _library_or_reason()
    if isinstance(found, str):
        raise NativeUnavailable(found)
    return found


def _compiled() -> Path:
    """The library's file, made if it is not there."""
    if sys.platform != "linux":
        raise NativeUnavailable(f"only on Linux, this is {sys.platform}")
    command = [*_compiler(), *FLAGS, *WIDE_FLAGS.get(platform.machine(), ())]
    directory, key = _cache_directory(), _key(command)
    for library in sorted(directory.glob(f"native-{key}-*.so")):
        # Loading a file that lost its end would end the process.
        if library == _name(directory, key, library.read_bytes()):
            return library
    return _compile(command, directory, key)


def _name(directory: Path, key: str, content: bytes) -> Path:
    """Of a complete library with these bytes."""
    return directory / f"native-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _compiler() -> list[str]:
    """`$CXX`, which may be several words, as in `ccache g++`; or the first that there is."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for name in asked[:1] or COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found, *asked[1:]]
    raise NativeUnavailable(
        f"CXX is {' '.join(asked)!r}, which is no command" if asked else "no C++ compiler (set CXX)"
    )


def _key(command: list[str]) -> str:
    """Of all that the library depends on."""
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    parts = [" ".join([*command, *platform.libc_ver()]).encode(), version, _processor()]
    parts += [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> bytes:
    """What `-march=native` means here: the machine, and what Linux says that it can do."""
    able = [
        line
        for line in Path("/proc/cpuinfo").read_bytes().splitlines()
        if line.startswith((b"model name", b"flags", b"Features", b"CPU part"))
    ]
    return b"\n".join([platform.machine().encode(), *sorted(set(able))])


def _cache_directory() -> Path:
    """A directory of this user's alone: whoever can write there can run code here."""
    asked = os.environ.get("MEGATRON_MOE_KERNEL_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(asked) if asked else Path(home) / "megatron_moe"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except (OSError, RuntimeError) as error:
        raise NativeUnavailable(
            f"no cache directory (set MEGATRON_MOE_KERNEL_CACHE): {error}"
        ) from None
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise NativeUnavailable(f"others may write to {directory} (set MEGATRON_MOE_KERNEL_CACHE)")
    return directory


def _compile(command: list[str], directory: Path, key: str) -> Path:
    """Compile all sources into a library, which appears when it is complete."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    try:
        with tempfile.TemporaryDirectory(prefix="compile-", dir=directory) as scratch:
            made = Path(scratch) / "native.so"
            done = subprocess.run(
                [*command, *sources, "-o", str(made)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
                why = (errors or done.stderr.splitlines() or ["no message"])[0]
                raise NativeUnavailable(f"{command[0]} failed: {why}")
            return made.replace(_name(directory, key, made.read_bytes()))
    except OSError as error:
        raise NativeUnavailable(f"{directory} cannot be written: {error}") from None


def runs_on(*tensors: Tensor) -> bool:
    """Whether the tensors have memory to work on: a fake one has a shape alone, and the reference
    implementation gives it that of the result.
    """
    return all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def operation(name: str, dtype: torch.dtype | None, *arguments: Tensor | int) -> Callable[[], None]:
    """A call to be made later, as often as wanted.

    Args:
        name: of the C++ function.
        dtype: of its elements, which the name of the function ends in; `None` where it has none.
        arguments: contiguous tensors of the CPU, whose memory is handed over, and numbers.

    Raises:
        TypeError: elements of that type are not computed with.
        ValueError: a tensor that is elsewhere, not contiguous, or of another dtype.
        IndexError: by the call, an index that lies outside of what it points into.
    """
    if dtype is not None:
        if dtype not in SUFFIXES:
            known = ", ".join(str(known).removeprefix("torch.") for known in SUFFIXES)
            raise TypeError(f"{name} of {dtype}, expected {known}; use the reference kernels")
        name = f"{name}_{SUFFIXES[dtype]}"
    function = getattr(_library(), name)
    dtypes = {torch.int64, torch.bool, dtype, dtype and torch.promote_types(dtype, torch.float32)}
    values = [_argument(name, x, dtypes) for x in arguments]

    def call() -> None:
        if function(*values) == _INDEX_OUT_OF_RANGE:
            raise IndexError(f"{name}: an index lies outside of what it points into")

    call.keeps = arguments  # type: ignore[attr-defined]
    return call


def _argument(
    name: str, x: Tensor | int, dtypes: set[torch.dtype | None]
) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(x, int):
        return ctypes.c_int64(x)
    if x.device.type != "cpu" or x.dtype not in dtypes or not x.is_contiguous():
        known = ", ".join(sorted(str(dtype) for dtype in dtypes if dtype is not None))
        found = f"{x.dtype} on {x.device}, strides {x.stride()} of shape {tuple(x.shape)}"
        raise ValueError(f"{name}: expected contiguous {known} on the CPU, found {found}")
    return ctypes.c_void_p(x.data_ptr())
