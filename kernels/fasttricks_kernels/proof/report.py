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
from collections.abc import Iterable, Iterator

import torch
import triton

from . import cases
from .cases import Case


def choose(dtypes: list[str], only: str) -> list[Case]:
    """Every case of these dtypes whose name contains `only`."""
    return [case for case in cases.every_case() if case.dtype in dtypes and only in case.name]


def machine_code_rows(chosen: list[Case], architectures: list[int]) -> Iterator[str]:
    """One line a case, launch and architecture. sm_70 is read from PTX, which names no registers."""
    from .aot import inspect, record_launches

    yield "| kernel | shape | dtype | sm | warps | registers | shared B | occupancy | loads, by bits | stores | local | atomics |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in followed(chosen, "compiled"):
        for launch in record_launches(case.run):
            for arch in architectures:
                code = inspect(launch, arch)
                known = (code.registers, f"{code.occupancy:.0%}") if code.registers else ("-", "-")
                yield (
                    f"| {case.family} | {case.shape} | {case.dtype} | {arch} | {code.warps} | {known[0]} "
                    f"| {code.shared_bytes} | {known[1]} | {_widths(code.loads)} | {_widths(code.stores)} "
                    f"| {code.local_accesses} | {code.atomics} |"
                )


def _widths(counts: Counter[int]) -> str:
    return ", ".join(f"{counts[bits]} x {bits}" for bits in sorted(counts, reverse=True))


def bytes_rows(chosen: list[Case]) -> Iterator[str]:
    """One line a case. Needs the interpreter: TRITON_INTERPRET=1 before this package is imported."""
    from .ledger import ledger

    yield "| kernel | shape | dtype | floor, bytes | asked for | ratio | unique ratio |"
    yield "|---|---|---|---|---|---|---|"
    for case in followed(chosen, "counted"):
        with ledger() as book:
            case.run()
        yield (
            f"| {case.family} | {case.shape} | {case.dtype} | {case.floor_bytes} | {book.total} "
            f"| {book.total / case.floor_bytes:.4f} | {book.unique / case.floor_bytes:.4f} |"
        )


def followed(chosen: list[Case], done: str) -> Iterator[Case]:
    """The cases, each with a line on standard error; none where the rows themselves are seen on a terminal."""
    for number, case in enumerate(chosen, 1):
        if not sys.stdout.isatty():
            print(f"{number:4d}/{len(chosen)} {done}: {case.name}", file=sys.stderr, flush=True)
        yield case


def _print(rows: Iterable[str]) -> None:
    for row in rows:
        print(row, flush=True)


def refusal(options: argparse.Namespace, chosen: list[Case]) -> str:
    """Why there can be no report, with the way out; empty where there can."""
    from .aot import MULTIPROCESSORS, missing_tools

    unknown = [arch for arch in options.arch if arch not in MULTIPROCESSORS]
    if unknown:
        return f"arch = {unknown[0]}: must be one of {', '.join(map(str, MULTIPROCESSORS))}"
    if not chosen:
        names = ", ".join(dict.fromkeys(case.family for case in cases.every_case()))
        return f"only = {options.only!r}: no case of {' or '.join(options.dtype)} has this in its name; the kernels are {names}"
    if missing := missing_tools():
        way_out = f"the triton wheel brings them; or name yours in {', '.join(missing.values())}"
        return f"the report needs {', '.join(missing)} of CUDA, which this Triton cannot start; {way_out}"
    return ""


def main() -> None:
    """Print the report, row by row; exits 2 with one line where there can be none."""
    parser = argparse.ArgumentParser(description="Machine code and bytes of the kernels, as Markdown. Needs no GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=[70, 80, 90, 100], help="compute capabilities")
    parser.add_argument("--dtype", nargs="+", default=["fp16", "fp32"], choices=list(cases.DTYPES))
    parser.add_argument("--only", default="", help="cases whose name contains this, e.g. K=1000")
    parser.add_argument("--bytes-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = choose(options.dtype, options.only)
    if wrong := refusal(options, chosen):
        print(f"error: {wrong}", file=sys.stderr)
        raise SystemExit(2)
    if options.bytes_only:
        _print(bytes_rows(chosen))
        return
    print(f"{len(chosen)} cases; each takes seconds to compile for the first time", file=sys.stderr, flush=True)
    print(
        f"# Kernels, compiled ahead of time\n\nTriton {triton.__version__}, torch {torch.__version__}; no GPU was used.\n"
    )
    print("## Machine code\n", flush=True)
    _print(machine_code_rows(chosen, options.arch))
    print("\n## Bytes\n", flush=True)
    # In a process of its own: the interpreter is chosen before a kernel's module is imported.
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.report", "--bytes-only", "--only", options.only]
    done = subprocess.run(
        [*command, "--dtype", *options.dtype], check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
