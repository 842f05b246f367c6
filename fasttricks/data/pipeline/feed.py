"""The input of the pipeline: the images of a rank, read ahead by threads, in an order known beforehand.

Plain JPEGs and PNGs stay encoded for DALI; images of other kinds are decoded here (sources/decode.py says why).

A bad file neither stops nor shifts an epoch. In training the next good image of its class (of several labels: with the same
ones), or else of all, takes its place, with its random numbers; in validation it is left out, as another in its place would
count twice. Which image that is depends on the files alone. No DALI and no torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import DataConfig
from fasttricks.data.pipeline.draws import balanced_order, epoch_order
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.pipeline.stand_ins import StandIns
from fasttricks.data.sources import Source
from fasttricks.data.sources.bad import require_few_bad
from fasttricks.data.sources.decode import BadImage, decodable, decode, quiet_pillow, to_pnm
from fasttricks.data.sources.errors import DataError, why_unreadable
from fasttricks.system.process import threads_per_rank

_Read = tuple[int, int, bytes]

READ_AHEAD = 4
"""Batches that are read before they are asked for, one at least."""
AHEAD_BYTES = 1 << 30
"""Fewer, where they would hold more than this: decoded images may be a hundred times as large as encoded ones."""


class Job(NamedTuple):
    """A batch before it is decoded. N may be 0."""

    epoch: int
    step: int
    places: NDArray[np.int64]
    """(N,): the images whose turn it is, by number, plus k times the number of images for the k-th time again in an epoch
    (data.balance); they decide the random numbers."""
    images: NDArray[np.int64]
    """(N,): the images that are shown; another than in `places` where that one is bad."""
    labels: NDArray[np.int64]
    """(N,), of `images`, as Source.labels has them."""
    encoded: list[bytes]
    """N plain JPEGs, plain PNGs or PNMs."""

    def one(self, number: int) -> Job:
        """A job of its image `number` alone."""
        only = slice(number, number + 1)
        return Job(self.epoch, self.step, self.places[only], self.images[only], self.labels[only], self.encoded[only])


class Feed:
    """The jobs of one rank, in order, from any (epoch, step) on; epochs follow each other without end.

    training: in a new random order each epoch, equal on all ranks for equal seeds; else in the order of `source`.

    Raises DataError for more bad files than config.max_bad allows, while reading too.
    """

    def __init__(
        self,
        source: Source,
        shards: Shards,
        config: DataConfig,
        *,
        training: bool,
        seed: int,
        rank: int,
    ) -> None:
        self._source, self._shards, self._config = source, shards, config
        self._training, self._seed = training, seed
        self.bad: dict[int, str] = {}
        """Bad images found so far, by number, and why."""
        self._by_pillow: set[int] = set()
        """Images that DALI could not decode."""
        self._part = shards.part(rank)
        self._labels = np.asarray(source.labels, np.int64)
        self.recall({})
        quiet_pillow()
        threads = config.threads or threads_per_rank()
        self._may_read, self._may_decode = Semaphore(config.readers), Semaphore(threads)
        self._pool = ThreadPoolExecutor(max(config.readers, threads), thread_name_prefix="read")

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The turns of this rank as Job.places has them, in the order of `epoch`, bad images' too."""
        count, balance = len(self._source), self._config.balance
        if not self._training:
            order = np.arange(count)
        elif balance > 0:
            order = balanced_order(self._seed, epoch, self._labels, balance)
        else:
            order = epoch_order(self._seed, epoch, count)
        return order[self._part.start : self._part.stop]

    def jobs(self, epoch: int, step: int) -> Iterator[Job]:
        """From batch `step` of `epoch` on. Up to READ_AHEAD batches are under way while the caller works on one."""
        waiting: deque[tuple[int, int, list[Future[list[_Read]]]]] = deque()
        ahead = READ_AHEAD
        try:
            while True:
                order, size = self.order(epoch), self._shards.batch_size
                for at in range(step, len(self._shards)):
                    places = order[at * size : (at + 1) * size]
                    parts = np.array_split(places, min(self._config.readers, max(1, len(places))))
                    waiting.append((epoch, at, [self._pool.submit(self._read, part.tolist()) for part in parts]))
                    while len(waiting) > ahead:
                        job = self._job(*waiting.popleft())
                        size_bytes = 1 + sum(map(len, job.encoded))
                        ahead = max(1, min(READ_AHEAD, AHEAD_BYTES // size_bytes))
                        yield job
                        del job  # the caller's alone now
                epoch, step = epoch + 1, 0
        finally:
            for _, _, parts_left in waiting:
                for part_left in parts_left:
                    part_left.cancel()

    def _job(self, epoch: int, step: int, parts: list[Future[list[_Read]]]) -> Job:
        read = [one for part in parts for one in part.result()]
        places, images = np.array([one[:2] for one in read], np.int64).reshape(-1, 2).T
        return Job(epoch, step, places, images, self._labels[images], [file for _, _, file in read])

    def _read(self, places: list[int]) -> list[_Read]:
        """(place, image, file) of each place that has an image. In a thread of the pool."""
        read = []
        for place in places:
            wanted = place % len(self._source)
            image: int | None = wanted
            while image is not None:
                file = self._good(image)
                if file is not None:
                    read.append((place, image, file))
                    break
                image = self._stand_ins.after(wanted) if self._training else None
            else:
                if self._training:
                    why = next(reversed(self.bad.values()))
                    raise DataError(f"{self._source.root}: no good image is left; {why}")
        return read

    def _good(self, image: int) -> bytes | None:
        """As DALI takes it; None where it is bad, which is then known."""
        if image in self.bad:
            return None
        try:
            with self._may_read:
                file = self._source.read(image)
            limit = self._config.max_pixels
            with (
                self._may_decode
            ):  # readers that wait for a disk are many, and would else share the cores with the training
                return to_pnm(decode(file, limit)) if image in self._by_pillow else decodable(file, limit)
        except OSError as error:
            reason = why_unreadable(error)
        except BadImage as error:
            reason = str(error)
        self.mark(image, reason)
        return None

    def keep_from_dali(self, image: int, file: bytes) -> None:
        """Have Pillow decode an image from now on that DALI cannot decode; it is bad where Pillow cannot either. As mark()."""
        try:
            decode(file, self._config.max_pixels)
        except BadImage as error:
            self.mark(image, str(error))
        self._by_pillow.add(image)

    def mark(self, image: int, reason: str) -> None:
        """Record that an image is bad. Jobs read ahead do not change: ask for new ones. Raises DataError for too many."""
        self._stand_ins.mark(image)
        self.bad[image] = reason
        self._check_bad()

    def recall(self, bad: Mapping[int, str]) -> None:
        """Know those images as bad that an earlier Feed of this rank knew, and no others. Raises DataError for too many."""
        self.bad = {**self._source.bad, **bad}
        self._stand_ins = StandIns(self._labels)
        for image in self.bad:
            self._stand_ins.mark(image)
        self._check_bad()

    def _check_bad(self) -> None:
        source = self._source

        def last() -> tuple[str, str]:
            image, why = next(reversed(self.bad.items()))
            return source.name(image), why

        require_few_bad(source.root, len(self.bad), len(source), self._config.max_bad, last)
