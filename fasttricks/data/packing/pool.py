"""Worker processes that leave it to their command when to end. No torch, no DALI."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.synchronize import Event

from fasttricks.system.process import deaf_children


class _Process(SpawnProcess):
    """A terminal sends Ctrl-C and its end to every process. This one is deaf to both from its first instruction on."""

    def start(self) -> None:
        with deaf_children(signal.SIGINT, signal.SIGHUP):
            super().start()


class _Context(SpawnContext):
    Process = _Process


CONTEXT = _Context()
"""Spawns: a fork would copy the locks of this process's threads."""


_stop: Event | None = None
"""In a worker: set where its command ends early."""


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of so many processes, 1 or more. Ctrl-C and a closed terminal reach them too, but only the command obeys.

    Where the block ends in an error, by Ctrl-C too, waiting tasks are dropped and those under way see it by stopping().
    """
    with deaf_children(signal.SIGINT, signal.SIGHUP):
        resource_tracker.ensure_running()  # it would die of SIGHUP
    stop = CONTEXT.Event()
    with ProcessPoolExecutor(workers, mp_context=CONTEXT, initializer=_listen, initargs=(stop,)) as pool:
        try:
            yield pool
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def stopping() -> bool:
    """In a worker, between two images: whether its result is of no use any more."""
    return _stop is not None and _stop.is_set()


def _listen(stop: Event) -> None:
    global _stop
    _stop = stop
