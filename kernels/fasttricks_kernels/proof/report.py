"""`python -m fasttricks_kernels.proof.report`: the kernels' machine code and bytes on GPUs that are not here, as Markdown.

Machine code: registers, shared memory, occupancy, widths of loads and stores, spills, atomics, for each kernel and
architecture. Bytes: the requests of each kernel, against the least that it can move. Neither is a measurement of time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

from . import cases
from .cases import Case


def choose(dtypes: list[str], only: str) -> list[Case]:
    """Every case of these dtypes whose name contains `only`."""
    return [case for case in cases.every_case() if case.dtype in dtypes and only in case.name]


def machine_code_table(chosen: list[Case], architectures: list[int]) -> str:
    """One line a case and architecture. sm_70 is read from PTX, which names no registers."""
    from .aot import inspect, record_launches

    lines = [
        "| kernel | shape | dtype | sm | warps | registers | shared B | occupancy | loads, by bits | stores | local | atomics |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in chosen:
        for launch in record_launches(case.run):
            for arch in architectures:
                code = inspect(launch, arch)
                known = (code.registers, f"{code.occupancy:.0%}") if code.registers else ("-", "-")
                lines.append(
                    f"| {case.family} | {case.shape} | {case.dtype} | {arch} | {code.warps} | {known[0]} "
                    f"| {code.shared_bytes} | {known[1]} | {_widths(code.loads)} | {_widths(code.stores)} "
                    f"| {code.local_accesses} | {code.atomics} |"
                )
    return "\n".join(lines)


def _widths(counts: Counter[int]) -> str:
    return ", ".join(f"{counts[bits]} x {bits}" for bits in sorted(counts, reverse=True))


def bytes_table(chosen: list[Case]) -> str:
    """One line a case. Needs the interpreter: TRITON_INTERPRET=1 before this package is imported."""
    from .ledger import ledger

    lines = [
        "| kernel | shape | dtype | floor, bytes | asked for | ratio | unique ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in chosen:
        with ledger() as book:
            case.run()
        lines.append(
            f"| {case.family} | {case.shape} | {case.dtype} | {case.floor_bytes} | {book.total} "
            f"| {book.total / case.floor_bytes:.4f} | {book.unique / case.floor_bytes:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine code and bytes of the kernels, as Markdown.")
    parser.add_argument("--arch", type=int, nargs="+", default=[70, 80, 90, 100], help="compute capabilities")
    parser.add_argument("--dtype", nargs="+", default=["fp16", "fp32"], choices=list(cases.DTYPES))
    parser.add_argument("--only", default="", help="cases whose name contains this, e.g. K=1000")
    parser.add_argument("--bytes-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = choose(options.dtype, options.only)
    if options.bytes_only:
        print(bytes_table(chosen))
        return
    print(
        f"# Kernels, compiled ahead of time\n\nTriton {version('triton')}, torch {version('torch')}; no GPU was used.\n"
    )
    print(f"## Machine code\n\n{machine_code_table(chosen, options.arch)}\n\n## Bytes\n", flush=True)
    # In a process of its own: the interpreter is chosen before a kernel's module is imported.
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.report", "--bytes-only", "--only", options.only]
    subprocess.run([*command, "--dtype", *options.dtype], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    main()
