"""A block in which a wait for the device is an error: for the tests on a GPU, and for bench."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_sync() -> Iterator[None]:
    """Within, an operation on CUDA for which the host waits raises RuntimeError. The mode before comes back in every case.

    torch warns, once a process, that this mode is a prototype; it does so after it has set the mode. Where warnings are errors,
    that one would end the block before it began and leave the mode set, so it is ignored, and no other.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set("error")
        yield
    finally:
        _set(before)


def _set(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
