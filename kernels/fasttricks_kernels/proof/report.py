"""`python -m fasttricks_kernels.proof.report`: the kernels' machine code and bytes on GPUs that are not here, as Markdown.

Machine code: registers, shared memory, occupancy, widths of loads and stores, spills, atomics, for each kernel and
architecture. Bytes: the requests of each kernel, against the least that it can move. Neither is a measurement of time.

Without options the first call took 165 seconds on two cores of a Xeon (323 CPU seconds); Triton keeps the kernels after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch
import triton

from . import cases
from .cases import Case

if TYPE_CHECKING:  # at run time later: whether kernels are interpreted is settled as they are imported
    from .aot import MachineCode
    from .ledger import Ledger

T = TypeVar("T")


def choose(dtypes: list[str], only: str) -> list[Case]:
    """Every case of these dtypes whose name contains `only`."""
    return [case for case in cases.every_case() if case.dtype in dtypes and only in case.name]


def machine_code_rows(chosen: list[Case], architectures: list[int]) -> Iterator[str]:
    """One line a case, launch and architecture. sm_70 is read from PTX, which names no registers."""
    yield "| kernel | shape | dtype | sm | warps | registers | shared B | occupancy | loads, by bits | stores | local | atomics |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case, codes in followed(_compiled(chosen, architectures), len(chosen), "compiled"):
        for code in codes:
            known = (code.registers, f"{code.occupancy:.0%}") if code.registers else ("-", "-")
            yield (
                f"| {case.family} | {case.shape} | {case.dtype} | {code.arch} | {code.warps} | {known[0]} "
                f"| {code.shared_bytes} | {known[1]} | {_widths(code.loads)} | {_widths(code.stores)} "
                f"| {code.local_accesses} | {code.atomics} |"
            )


def _compiled(chosen: list[Case], architectures: list[int]) -> Iterator[tuple[Case, list[MachineCode]]]:
    """Each case with its machine code, a launch and architecture at a time, as soon as it and those before it are compiled.

    A thread a core compiles: most of that time is spent in programs of CUDA and in passes that leave Python.
    """
    from .aot import inspect, record_launches

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = []
        for case in chosen:
            launches = record_launches(case.run)  # not in a thread: it takes the place of Triton's launch in all
            waiting.append([pool.submit(inspect, launch, arch) for launch in launches for arch in architectures])
        try:
            for case, codes in zip(chosen, waiting, strict=True):
                yield case, [code.result() for code in codes]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C or a failure nothing else is begun


def _widths(counts: Counter[int]) -> str:
    return ", ".join(f"{counts[bits]} x {bits}" for bits in sorted(counts, reverse=True))


def bytes_rows(chosen: list[Case]) -> Iterator[str]:
    """One line a case. Needs the interpreter: TRITON_INTERPRET=1 before this package is imported."""
    yield "| kernel | shape | dtype | floor, bytes | asked for | ratio | unique ratio |"
    yield "|---|---|---|---|---|---|---|"
    for case, book in followed(_counted(chosen), len(chosen), "counted"):
        yield (
            f"| {case.family} | {case.shape} | {case.dtype} | {case.floor_bytes} | {book.total} "
            f"| {book.total / case.floor_bytes:.4f} | {book.unique / case.floor_bytes:.4f} |"
        )


def _counted(chosen: list[Case]) -> Iterator[tuple[Case, Ledger]]:
    """Each case with the bytes that it asks for."""
    from .ledger import ledger

    for case in chosen:
        with ledger() as book:
            case.run()
        yield case, book


def followed(results: Iterable[tuple[Case, T]], count: int, done: str) -> Iterator[tuple[Case, T]]:
    """The results, each with a line on standard error; none where the rows themselves are seen on a terminal."""
    began = time.monotonic()
    for number, (case, result) in enumerate(results, 1):
        if not sys.stdout.isatty():
            spent = time.monotonic() - began
            print(f"{number:4d}/{count} {done}: {case.name}  {spent:.0f} s", file=sys.stderr, flush=True)
        yield case, result


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
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 70 80 90 100")
    parser.add_argument("--dtype", nargs="+", default=["fp16"], choices=list(cases.DTYPES))
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
    print(f"{len(chosen)} cases; one takes up to 10 s to compile for the first time", file=sys.stderr, flush=True)
    print(
        f"# Kernels, compiled ahead of time\n\nTriton {triton.__version__}, torch {torch.__version__}; no GPU was used.\n"
    )
    print("## Machine code\n", flush=True)
    # In a process of its own: the interpreter is chosen before a kernel's module is imported. It counts while this one compiles.
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.report", "--bytes-only", "--only", options.only]
    command += ["--dtype", *options.dtype]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with (
        tempfile.TemporaryFile("w+") as table,
        subprocess.Popen(command, stdout=table, env=environment) as counting,
    ):
        try:
            _print(machine_code_rows(chosen, options.arch))
            counting.wait()
        finally:
            counting.kill()  # after Ctrl-C or a failure; nothing where it has ended
        table.seek(0)
        print(f"\n## Bytes\n\n{table.read()}", end="", flush=True)
    raise SystemExit(counting.returncode)


if __name__ == "__main__":
    main()
