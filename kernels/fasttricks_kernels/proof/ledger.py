"""Count the bytes a kernel moves, under Triton's interpreter: live lanes times element size, addresses kept.

It counts the program's requests. A re-read that a cache would serve counts again in `total`, and once in
`unique`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Ledger:
    """Bytes asked for so far, and the addresses they were at."""

    loaded: int = 0
    stored: int = 0
    atomics: int = 0
    load_spans: list[np.ndarray] = field(default_factory=list)
    store_spans: list[np.ndarray] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    @property
    def unique(self) -> int:
        """Distinct bytes read plus distinct bytes written."""
        return sum(np.unique(np.concatenate(s)).size for s in (self.load_spans, self.store_spans) if s)

    def read_again(self, tensor: torch.Tensor) -> int:
        """Bytes asked for of this tensor, without the first request of each."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        asked = np.concatenate([span[(span >= start) & (span < end)] for span in self.load_spans])
        return asked.size - np.unique(asked).size

    def add(self, spans: list[np.ndarray], addresses: np.ndarray, mask: np.ndarray, size: int) -> int:
        lanes = np.broadcast_to(mask, np.broadcast_shapes(mask.shape, addresses.shape)).astype(bool)  # may come as 0, 1
        live = np.broadcast_to(addresses, lanes.shape)[lanes].astype(np.int64)
        spans.append((live[:, None] + np.arange(size)).reshape(-1))
        return live.size * size


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Every load and store of an interpreted kernel inside the block is written to the ledger."""
    book = Ledger()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def count_load(builder, ptrs, mask, *rest):
        value = load(builder, ptrs, mask, *rest)
        book.loaded += book.add(book.load_spans, ptrs.data, mask.data, value.data.dtype.itemsize)
        return value

    def count_store(builder, ptrs, value, mask, *rest):
        book.stored += book.add(book.store_spans, ptrs.data, mask.data, value.data.dtype.itemsize)
        return store(builder, ptrs, value, mask, *rest)

    def count_rmw(builder, *args):
        book.atomics += 1
        return rmw(builder, *args)

    def count_cas(builder, *args):
        book.atomics += 1
        return cas(builder, *args)

    with mock.patch.multiple(
        InterpreterBuilder,
        create_masked_load=count_load,
        create_masked_store=count_store,
        create_atomic_rmw=count_rmw,
        create_atomic_cas=count_cas,
    ):
        yield book
