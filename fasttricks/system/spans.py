"""Named ranges around the phases of a step, for torch.profiler's trace and for NVIDIA's Nsight Systems (NVTX).

The trainer's are data, forward, backward and step. They say when the host issued the work; a GPU does it later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch.profiler import record_function

T = TypeVar("T")
_END = object()


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range called `name` over the block: a user annotation while a torch profiler records, NVTX once CUDA is in use.

    Never waits for the device, and needs no driver. A block that raises ends its range. For use around a compiled
    network, not inside one. Cost without a profiler: about 2 us a range, and NVTX's cost on a GPU. record_function
    alone takes 8 us and more even then (both on a busy CPU), so it is entered only while a torch profiler records.
    """
    nvtx = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # asked once, so that push and pop are a pair
    if nvtx:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
    try:
        with record_function(name) if torch.autograd._profiler_enabled() else nullcontext():
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def spanned(name: str, items: Iterable[T]) -> Iterator[T]:
    """`items`, with a span called `name` over the wait for each of them, and over the last wait, which ends them."""
    iterator = iter(items)
    while True:
        with span(name):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]
