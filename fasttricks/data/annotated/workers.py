"""The processes that make the samples of a loader: torch's DataLoader, with workers that end with it."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fasttricks.system.process import deaf_children, die_with_parent


def start_workers(
    samples: Dataset[Any], turns: Iterable[Any], join: Callable[[Any], Any], *, workers: int, prefetch: int
) -> DataLoader[Any]:
    """A loader of join(samples of a batch) for each batch of `turns`; its processes are forked at its first iteration.

    workers: 0 for this process. prefetch: batches made ahead, of all workers.
    """
    many = workers > 0
    return DataLoader(
        samples,
        batch_sampler=turns,
        num_workers=workers,
        collate_fn=join,
        # the fork costs no second of imports, and a script needs no __main__ guard; nothing here holds a lock
        multiprocessing_context="fork" if many else None,
        prefetch_factor=-(-prefetch // workers) if many else None,
        persistent_workers=many,
        worker_init_fn=partial(_begin_worker, dies=threading.current_thread() is threading.main_thread()),
        generator=torch.Generator(),  # or each start would take a number from torch's own
    )


def _begin_worker(number: int, *, dies: bool) -> None:
    """In a worker, before its first batch."""
    if dies:
        # torch's own watch takes five seconds, in which the worker would keep the lock of the run folder, the sockets and the GPU
        die_with_parent()


@contextmanager
def workers_started() -> Iterator[None]:
    """Within the block workers are forked: deaf to the signals that the command answers, and without the usual warnings."""
    with deaf_children(signal.SIGINT, signal.SIGTERM, signal.SIGHUP), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more than cores: as asked
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        yield
