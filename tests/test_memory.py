"""Freed memory stays with the process: held to the page faults that the kernel counts. Each case is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from fasttricks.system import distributed
from lib.tiny import environment

WORK = """
import ctypes, json, resource, sys
from fasttricks.system.distributed import keep_freed_memory
note = keep_freed_memory() if sys.argv[1] == "kept" else ""
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(40 << 20) for _ in range(1)]
    for block in blocks:
        ctypes.memset(block, 1, 40 << 20)
    for block in blocks:
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([note, faults]))
"""
PAGES = 40 * 256
"""Of 4 KiB, in the 40 MiB that a pass takes and frees."""


def work(kind: str) -> tuple[str, list[int]]:
    """(note, page faults a pass) of a new process that takes, writes and frees 40 MiB twice."""
    done = subprocess.run(
        [sys.executable, "-c", WORK, kind], capture_output=True, text=True, env=environment(), check=True
    )
    note, faults = json.loads(done.stdout)
    return note, faults


def test_freed_memory_is_found_again_without_a_fault() -> None:
    _, default = work("default")
    assert min(default) > PAGES / 2, "glibc keeps large blocks by itself now: is mallopt still needed?"
    note, kept = work("kept")
    assert note == "freed memory stays with the process"
    assert sum(kept[1:]) < PAGES / 100


def test_another_c_library_is_named(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: object())
    assert distributed.keep_freed_memory() == "as the C library has it: it is not glibc"


def test_a_refusal_is_said(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Refuses:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            return 0

    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: Refuses)
    assert distributed.keep_freed_memory() == "as glibc has it: it refused mallopt"
