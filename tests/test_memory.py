"""Freed memory stays with the process: held to the page faults that the kernel counts, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from fasttricks.system import distributed
from lib.tiny import environment

WORK = """
import ctypes, json, resource
from fasttricks.system.distributed import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)


def two_passes():
    faults = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(40 << 20)
        ctypes.memset(block, 1, 40 << 20)
        libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


print(json.dumps([two_passes(), keep_freed_memory(), two_passes()]))
"""
PAGES = 40 * 256
"""Of 4 KiB, in the 40 MiB that a pass takes and frees."""


def test_freed_memory_is_found_again_without_a_fault() -> None:
    """What a new process takes, writes and frees twice, as glibc has it and then kept."""
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, env=environment(), check=True)
    default, set_, kept = json.loads(done.stdout)
    assert min(default) > PAGES / 2, "glibc keeps large blocks by itself now: is mallopt still needed?"
    assert set_ is True
    assert sum(kept[1:]) < PAGES / 100


def test_another_c_library_is_left_as_it_is(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: object())
    assert distributed.keep_freed_memory() is False


def test_a_refusal_is_said(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    class Refuses:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            return 0

    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: Refuses)
    assert distributed.keep_freed_memory() is False
