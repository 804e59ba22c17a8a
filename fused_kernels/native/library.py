"""The compiled operations: where the library is cached and how it is compiled; `call` calls it.

The first process of a machine that needs it runs the C++ compiler, `$CXX` or the first of
`COMPILERS`, for about two seconds, while others wait. The library is cached in
`$MEGATRON_MOE_KERNEL_CACHE`, `$XDG_CACHE_HOME/megatron_moe` or `~/.cache/megatron_moe`. Its name is
a hash of the sources, the command, the compiler's version and the processor, so that no node loads
instructions of another node's processor, and of its own bytes, so that none loads a partial file.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
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
from collections.abc import Iterator
from pathlib import Path

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
COMPILER_SECONDS = 300
"""A compiler that takes longer hangs."""
CAUSES = ("no space", "fatal", "error")
"""Words of the line of a compiler's output that gives the cause, the most specific first."""


class NativeUnavailable(RuntimeError):
    """The operations are unavailable on this machine; the message is the reason in a few words."""


def unavailable() -> str | None:
    """Why the operations are unavailable on this machine; `None` if they are available."""
    found = _library_or_reason()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The compiled operations.

    Raises:
        NativeUnavailable: they are unavailable on this machine.
    """
    found = _library_or_reason()
    if isinstance(found, str):
        raise NativeUnavailable(found)
    return found


@functools.cache
def _library_or_reason() -> ctypes.CDLL | str:
    """Tried once per process, also when it fails: a compiler takes seconds."""
    try:
        return ctypes.CDLL(str(_compiled()))
    except (NativeUnavailable, OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _compiled() -> Path:
    """The library's file, compiled if it does not exist."""
    command = [*compiler(), *FLAGS, *WIDE_FLAGS.get(platform.machine(), ())]
    directory, key = _cache_directory(), _key(command)
    found = _complete(directory, key)
    if found is None:
        with _alone(directory / f"native-{key}.lock"):
            found = _complete(directory, key) or _compile(command, directory, key)
    return found


def _complete(directory: Path, key: str) -> Path | None:
    """An existing library whose bytes match its name; loading a truncated one ends the process."""
    for found in sorted(directory.glob(f"native-{key}-*.so")):
        if found == _name(directory, key, found.read_bytes()):
            return found
    return None


def _name(directory: Path, key: str, content: bytes) -> Path:
    """The file name of a complete library with these bytes."""
    return directory / f"native-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock of a library: a file that other processes have loaded must not be replaced."""
    with lock.open("w") as file:
        # On a file system without locks, all processes compile.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiler() -> list[str]:
    """`$CXX`, which may be several words, as in `ccache g++`; or the first of `COMPILERS` found.

    Raises:
        NativeUnavailable: none is found, or this is not Linux.
    """
    if sys.platform != "linux":
        raise NativeUnavailable(f"only on Linux, this is {sys.platform}")
    text = os.environ.get("CXX", "")
    try:
        asked = shlex.split(text)
    except ValueError as error:
        raise NativeUnavailable(f"CXX is {text!r}: {error}") from None
    for name in asked[:1] or COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return [found, *asked[1:]]
    why = f"CXX is {text!r}, which is no command" if asked else "no C++ compiler (set CXX)"
    raise NativeUnavailable(why)


def _key(command: list[str]) -> str:
    """A hash of everything that the library depends on."""
    version = _run([*command, "--version"]).stdout
    parts = ["\0".join([*command, version, *platform.libc_ver()]).encode(), _processor()]
    parts += [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the C locale: `_cause` looks for English words."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command,
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment,
        errors="replace",
        timeout=COMPILER_SECONDS,
    )


def _processor() -> bytes:
    """What `-march=native` depends on: the machine and the processor's features."""
    able = [
        line
        for line in Path("/proc/cpuinfo").read_bytes().splitlines()
        if line.startswith((b"model name", b"flags", b"Features", b"CPU part"))
    ]
    return b"\n".join([platform.machine().encode(), *sorted(set(able))])


def _cache_directory() -> Path:
    """A directory that only this user or root can write to: its files are loaded as code."""
    try:
        directory = _cache_place()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except (OSError, RuntimeError) as error:
        why = f"no cache directory (set MEGATRON_MOE_KERNEL_CACHE): {error}"
        raise NativeUnavailable(why) from None
    others = stat.S_IWGRP | stat.S_IWOTH
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & others:
        raise NativeUnavailable(f"others may write to {directory} (set MEGATRON_MOE_KERNEL_CACHE)")
    return directory


def _cache_place() -> Path:
    """Absolute: the loader searches its own path for a name without a slash."""
    asked = os.environ.get("MEGATRON_MOE_KERNEL_CACHE")
    if asked:
        return Path(asked).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache").absolute() / "megatron_moe"


def _compile(command: list[str], directory: Path, key: str) -> Path:
    """Compile all sources into a library, renamed into place when it is complete."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    try:
        with tempfile.TemporaryDirectory(prefix="compile-", dir=directory) as scratch:
            made = Path(scratch) / "native.so"
            done = _run([*command, *sources, "-o", str(made)])
            if done.returncode:
                why = _cause(done.stderr).replace(f"{scratch}/", "")
                raise NativeUnavailable(f"{command[0]} failed: {why}")
            return made.replace(_name(directory, key, made.read_bytes()))
    except OSError as error:
        raise NativeUnavailable(f"{directory} cannot be written: {error}") from None


def _cause(output: str) -> str:
    """The line of a compiler's output that most likely gives the cause."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for cause in CAUSES:
        for line in lines:
            if cause in line.lower():
                return line
    return lines[0] if lines else "no message"
