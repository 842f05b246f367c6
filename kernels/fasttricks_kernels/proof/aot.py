"""Compile a kernel ahead of time for a GPU that is not here, and inspect the machine code.

A launch is recorded rather than written down again, so the compiled kernel is the one that would run, with its warps,
compile-time constants and pointer alignments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
MULTIPROCESSORS = {
    70: (96 << 10, 64),
    75: (64 << 10, 32),
    80: (164 << 10, 64),
    86: (100 << 10, 48),
    89: (100 << 10, 48),
    90: (228 << 10, 64),
    100: (228 << 10, 64),
    120: (100 << 10, 48),
}
"""Compute capability -> shared memory in bytes and warps of a multiprocessor, as of the CUDA programming guide."""
REGISTERS = 65536
"""All registers of a multiprocessor; a warp gets them in units of 256."""
TOOLS = ("ptxas", "nvdisasm", "cuobjdump")
"""The programs that assemble and disassemble a kernel: CUDA's, from Triton's wheel."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch as it was asked for: the function, its arguments by name, its options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class MachineCode:
    """One kernel compiled for one architecture. `loads` and `stores`: instructions by width in bits."""

    kernel: str
    arch: int
    registers: int
    shared_bytes: int
    local_accesses: int  # spills, and arrays that did not fit registers
    atomics: int
    loads: Counter[int]
    stores: Counter[int]
    warps: int

    @property
    def occupancy(self) -> float:
        """Resident warps over the most a multiprocessor holds, as registers and shared memory allow."""
        if not self.registers:  # no listing for this architecture
            return float("nan")
        shared, warps = MULTIPROCESSORS[self.arch]
        blocks = REGISTERS // (-(-self.registers * 32 // 256) * 256 * self.warps)
        if self.shared_bytes:
            blocks = min(blocks, shared // (self.shared_bytes + 1024))
        return min(blocks * self.warps, warps) / warps


def record_launches(run: Callable[[], object]) -> list[Launch]:
    """Call `run`, which launches kernels on CPU tensors; keep the launches and start none of them."""
    launches: list[Launch] = []

    def keep(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments.update({name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names})
        launches.append(Launch(kernel, arguments, kwargs))

    with mock.patch.object(JITFunction, "run", keep):
        run()
    return launches


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for compute capability `arch` (80 for sm_80). Cached on disk by Triton."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def inspect(launch: Launch, arch: int) -> MachineCode:
    """Compile, disassemble, count."""
    compiled = compile_launch(launch, arch)
    if arch < 75:  # this CUDA release assembles sm_70, but does not list it: read the PTX
        text, registers = compiled.asm["ptx"], 0
        loads, stores = _ptx_widths(text, "ld"), _ptx_widths(text, "st")
        local, atomics = len(re.findall(r"\b(?:ld|st)\.local", text)), len(re.findall(r"\b(?:atom|red)\.", text))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(compiled.asm["cubin"])
            text = _tool("nvdisasm", "-c", cubin.name)
            registers = _number(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", cubin.name))
        loads, stores = _sass_widths(text, "LDG"), _sass_widths(text, "STG")
        local, atomics = len(re.findall(r"\b(?:LDL|STL)\b", text)), len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", text))
    return MachineCode(
        kernel=launch.kernel.fn.__name__,
        arch=arch,
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        local_accesses=local,
        atomics=atomics,
        loads=loads,
        stores=stores,
        warps=compiled.metadata.num_warps,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(
            f"the output of the compiler's tools has no {pattern!r}: {text[:200]!r}; is this another release?"
        )
    return int(found[1])


def _sass_widths(text: str, instruction: str) -> Counter[int]:
    widths: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", text):
        width = re.search(r"\.[USF]?(8|16|64|128|256)\b", modifiers)
        widths[int(width[1]) if width else 32] += 1
    return widths


def _ptx_widths(text: str, instruction: str) -> Counter[int]:
    widths: Counter[int] = Counter()
    for modifiers in re.findall(rf"\b{instruction}\.global((?:\.[\w:]+)*)", text):
        vector = re.search(r"\.v(\d)", modifiers)
        widths[_number(r"\.[busf](\d+)$", modifiers) * (int(vector[1]) if vector else 1)] += 1
    return widths


def missing_tools() -> dict[str, str]:
    """Those of TOOLS that Triton cannot find or start -> the environment variable that may name one."""
    missing = {}
    for name in TOOLS:
        try:
            getattr(triton.knobs.nvidia, name)
        except RuntimeError:
            missing[name] = f"TRITON_{name.upper()}_PATH"
    return missing


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
