"""Compiles kernels for devices that are not there, and reads what the compiled code uses.

Triton compiles with the `ptxas` that comes with it; `cuobjdump`, likewise, gives registers, stack
and instructions. None of this runs a kernel: it shows what the code needs, not how long it takes.
Needs a process without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_kernels.triton.launch import Launch

TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
"""Triton's names of dtypes."""
ALIGNMENT = 16
"""Triton compiles a kernel for addresses and integers that are multiples of this, where they are;
what torch allocates is."""
WARP_SIZE = 32
REGISTERS_PER_SM = 65536
REGISTER_UNIT = 256
"""Registers of a warp are allocated in such units."""
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
SHARED_PER_SM = {80: 167_936, 90: 233_472, 100: 233_472}
"""Bytes of shared memory of an SM by compute capability. Source for this and the limits above: CUDA
Programming Guide, table of technical specifications per compute capability."""
SHARED_RESERVED = 1024
"""Bytes that the system keeps of each block's shared memory."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel uses.

    Args:
        registers: of a thread.
        stack: bytes of a thread.
        local: bytes of local memory of a thread.
        spills: instructions that load from or store to local memory.
        shared: bytes of shared memory of a program, static and dynamic.
        wide_loads: instructions that load 128 bits or more from global memory.
        wide_stores: likewise stores.
        tensor_core: instructions of tensor cores.
        to_fp8: instructions that convert to FP8, saturating.
        warps: of a program.
        capability: that it was compiled for, e.g. 90.
    """

    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    tensor_core: int
    to_fp8: int
    warps: int
    capability: int

    @property
    def occupancy(self) -> float:
        """The share of an SM's warps that can be resident at once, at most."""
        by_warp = -(-self.registers * WARP_SIZE // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS_PER_SM // by_warp // self.warps
        by_shared = SHARED_PER_SM[self.capability] // (self.shared + SHARED_RESERVED)
        blocks = min(by_registers, by_shared, BLOCKS_PER_SM, WARPS_PER_SM // self.warps)
        return blocks * self.warps / WARPS_PER_SM


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile a kernel as `launch` starts it, for a compute capability such as 90.

    Raises:
        Exception: of Triton, if it cannot.
    """
    source = ASTSource(
        launch.kernel, _signature(launch), dict(_constants(launch)), _attributes(launch)
    )
    target = GPUTarget("cuda", capability, WARP_SIZE)
    made = triton.compile(source, target=target, options={"num_warps": launch.warps})
    return _resources(made.asm["cubin"], made.metadata.shared, launch.warps, capability)


def _signature(launch: Launch) -> dict[str, str]:
    """The type of each of the kernel's arguments, in its order."""
    constants = _constants(launch)
    return {
        name: "constexpr" if name in constants else _type(launch.arguments[name])
        for name in launch.kernel.arg_names
    }


def _type(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _constants(launch: Launch) -> Mapping[str, Any]:
    """What is known when it is compiled: Triton makes an integer 1 a constant, too."""
    ones = {name: value for name, value in launch.arguments.items() if _is_one(value)}
    return {**ones, **launch.constants}


def _is_one(value: Tensor | int) -> bool:
    return not isinstance(value, Tensor) and value == 1


def _attributes(launch: Launch) -> dict[tuple[int, ...], list[list[Any]]]:
    """Which arguments are multiples of `ALIGNMENT`."""
    constants = _constants(launch)
    return {
        (place,): [["tt.divisibility", ALIGNMENT]]
        for place, name in enumerate(launch.kernel.arg_names)
        if name not in constants and _aligned(launch.arguments[name])
    }


def _aligned(value: Tensor | int) -> bool:
    return isinstance(value, Tensor) or value % ALIGNMENT == 0


def _resources(cubin: bytes, shared: int, warps: int, capability: int) -> Resources:
    usage = _dumped(cubin, "-res-usage")
    found = {
        name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)
    }
    code = _dumped(cubin, "-sass")
    return Resources(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        spills=_count(r"(?:LDL|STL)\b", code),
        shared=max(shared, found["SHARED"]),
        wide_loads=_count(r"LDG\.\S*(?:128|256)\b", code),
        wide_stores=_count(r"STG\.\S*(?:128|256)\b", code),
        tensor_core=_count(r"(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b", code),
        to_fp8=_count(r"F2FP\.SATFINITE\.(?:E4M3|E5M2)\b", code),
        warps=warps,
        capability=capability,
    )


def _dumped(cubin: bytes, what: str) -> str:
    """What `cuobjdump` prints of compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), what, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _count(pattern: str, code: str) -> int:
    """Instructions whose name matches."""
    return len(re.findall(rf"\b{pattern}", code))
