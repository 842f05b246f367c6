"""What goes into the pipeline: the encoded images of a rank, read ahead by threads, in an order known beforehand.

No DALI and no torch here. A `Source` is where images come from: an ImageFolder, or anything that reads the bytes of
image i.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.draws import epoch_order
from fasttricks.data.folder import DataError
from fasttricks.data.shards import Shards

READ_THREADS = 4
"""Cold and network disks answer many requests at once; more threads than this only wait for each other on a warm one."""
READ_AHEAD = 4
"""Batches that are read before they are asked for: the memory is theirs, encoded."""


class Source(Protocol):
    """Encoded images by number."""

    @property
    def root(self) -> Path:
        """Where they are, for messages."""

    @property
    def labels(self) -> Sequence[int]:
        """labels[i] is the class of image i."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The file of image `index`, as it lies on the disk. Called from several threads. Raises OSError."""

    def name(self, index: int) -> str:
        """What to call it in a message."""

    def fingerprint(self) -> str:
        """The same for the same names and labels in the same order."""


class Job(NamedTuple):
    """A batch before it is decoded. N may be 0."""

    epoch: int
    step: int
    indices: NDArray[np.int64]
    """(N,): where the images stand in the source."""
    labels: NDArray[np.int64]
    """(N,)"""
    encoded: list[bytes]
    """N files."""


class Feed:
    """The jobs of one rank, in order, from any (epoch, step) on; epochs follow each other without end.

    training: in a new random order each epoch, equal on all ranks for equal seeds; else in the order of `source`.
    """

    def __init__(self, source: Source, shards: Shards, *, training: bool, seed: int, rank: int) -> None:
        self._source, self._shards, self._training, self._seed = source, shards, training, seed
        self._part = shards.part(rank)
        self._labels = np.asarray(source.labels, np.int64)
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Where in the source the images of this rank stand, in the order of `epoch`."""
        count = len(self._source)
        order = epoch_order(self._seed, epoch, count) if self._training else np.arange(count)
        return order[self._part.start : self._part.stop]

    def jobs(self, epoch: int, step: int) -> Iterator[Job]:
        """From batch `step` of `epoch` on. READ_AHEAD batches are under way while the caller works on one."""
        waiting: deque[tuple[int, int, NDArray[np.int64], list[Future[list[bytes]]]]] = deque()
        try:
            while True:
                order, size = self.order(epoch), self._shards.batch_size
                for at in range(step, len(self._shards)):
                    indices = order[at * size : (at + 1) * size]
                    parts = np.array_split(indices, min(READ_THREADS, max(1, len(indices))))
                    waiting.append((epoch, at, indices, [self._pool.submit(self._read, part) for part in parts]))
                    if len(waiting) > READ_AHEAD:
                        yield self._job(*waiting.popleft())
                epoch, step = epoch + 1, 0
        finally:
            for *_, parts_left in waiting:
                for part_left in parts_left:
                    part_left.cancel()

    def _job(self, epoch: int, step: int, indices: NDArray[np.int64], parts: list[Future[list[bytes]]]) -> Job:
        encoded = [file for part in parts for file in part.result()]
        return Job(epoch, step, indices, self._labels[indices], encoded)

    def _read(self, indices: NDArray[np.int64]) -> list[bytes]:
        files = []
        for index in indices.tolist():
            try:
                files.append(self._source.read(index))
            except OSError as error:
                name = self._source.name(index)
                raise DataError(f"{self._source.root}: cannot read {name}: {error.strerror}") from error
        return files
