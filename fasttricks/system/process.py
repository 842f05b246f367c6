"""A rank and the process that started it: its share of the cores, torchrun's restarts, its death, the command to
resume. No torch."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from fasttricks.config.launch import read_launch

LONGEST_COMMAND = 10_000
"""Characters that are kept of a command line."""
_PR_SET_PDEATHSIG = 1


def under_torchrun() -> bool:
    """Whether torchrun (or another user of torch.distributed.elastic) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """How often torchrun has started this rank again after a failure (--max-restarts); 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


_kept_from: list[int] = []
"""The number of cores that this process had before keep_to(); empty: it was not called."""


def threads_per_rank() -> int:
    """CPU cores of this process, those before keep_to(), shared out among the ranks of this machine; 1 at least."""
    cores = _kept_from[0] if _kept_from else len(os.sched_getaffinity(0))
    return max(1, cores // read_launch().local_size)


def keep_to(cores: set[int]) -> bool:
    """Let the threads of this process, and all that they start, run on these cores alone. Returns whether the system does so."""
    before = len(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # a container may lack some of them
        return False
    _kept_from[:] = _kept_from or [before]
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread), cores)
    return True


def die_with_launcher() -> None:
    """Let the kernel kill this rank at the moment its torchrun ends, killed with -9 too: no orphan holds a GPU.

    For the first lines of an entry point, before seconds of imports. Does nothing without torchrun. Linux's prctl.
    """
    if not under_torchrun():
        return
    die_with_parent()
    if os.getppid() == 1 and not any("torch" in part for part in _command_of(1)):  # it died before the line above
        raise SystemExit(1)


def die_with_parent() -> None:
    """Let the kernel kill this process at the moment the thread that started it ends. Linux's prctl."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextmanager
def deaf_children(*signals: signal.Signals) -> Iterator[None]:
    """A process that is started within the block has `signals` blocked for good; this one gets them after the block.

    For workers: a terminal's Ctrl-C and a batch system's SIGTERM reach every process, and only the command is to obey.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launch_token() -> str:
    """Names the torchrun that started this process, the same in each of its restarts; empty without torchrun."""
    if not under_torchrun():
        return ""
    parent = os.getppid()
    started = (
        Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    )  # in ticks since the boot
    return f"{os.environ['TORCHELASTIC_RUN_ID']}/{socket.gethostname()}/{parent}/{started}"


def command_to_resume() -> str:
    """The command line that resumes this run: this process's own, torchrun's where that started it, and --resume."""
    words = _own_command()
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def activation() -> str:
    """The command that activates this process's virtual environment in a shell; empty where the shell has it, and without one."""
    folder = Path(sys.prefix, "bin")
    found = shutil.which("python")
    if sys.prefix == sys.base_prefix or (found and os.path.realpath(Path(found).parent) == os.path.realpath(folder)):
        return ""
    return f"source {shlex.quote(str(folder / 'activate'))}"


def this_start() -> dict[str, str]:
    """The command line of this process (torchrun's where that started it), the date in UTC and the name of the machine."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": shlex.join(_own_command())[:LONGEST_COMMAND], "date": now, "host": socket.gethostname()}


def _own_command() -> list[str]:
    return _command_of(os.getppid()) if under_torchrun() else [*sys.orig_argv]


def _command_of(pid: int) -> list[str]:
    return [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
