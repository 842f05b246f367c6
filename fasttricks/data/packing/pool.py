"""Worker processes that leave it to their command when to end. No torch, no DALI."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of so many processes, 1 or more. Ctrl-C and a closed terminal reach them too, but only the command obeys."""
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_the_terminal)


def _ignore_the_terminal() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
