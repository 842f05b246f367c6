"""An image and its annotation as a batch takes them: a pure function of (seed, epoch, place), computed in any process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fasttricks.data.pipeline.draws import epoch_order, image_draws
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources.decode import BadImage, quiet_pillow

C = TypeVar("C")
"""An image's part of a batch: arrays and not tensors, which would need room in /dev/shm, and a container has 64 MB of it."""
D = TypeVar("D")
"""The parts of a batch as they leave a worker."""


class AnnotatedSource(Protocol):
    """The images of a split, each with an annotation."""

    @property
    def root(self) -> Path:
        """The folder data.root."""

    @property
    def place(self) -> str:
        """Where the images are, for messages."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, by number."""

    @property
    def bad(self) -> Mapping[int, str]:
        """Images that are known beforehand not to be used, by number, and why."""

    @property
    def strays(self) -> Mapping[str, str]:
        """Files that belong to no image, by name, and why."""

    def __len__(self) -> int:
        """Images."""

    def name(self, index: int) -> str:
        """The name of image `index`; no two share it."""

    def fingerprint(self) -> str:
        """The same for the same images and annotations."""


class Turn(NamedTuple):
    """One image's turn in one epoch."""

    epoch: int
    place: int
    """The image, by number."""


@dataclass
class Turns:
    """The turns of each batch of one rank, from a position on; epochs follow each other without end.

    shuffles: in a new random order each epoch, equal on all ranks for equal seeds; else in the order of the source.
    """

    shards: Shards
    _: KW_ONLY
    shuffles: bool
    seed: int
    rank: int
    epoch: int = 0
    """Where the next iteration begins; step too."""
    step: int = 0

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The images of this rank, by number, in the order of `epoch`."""
        count, part = self.shards.num_images, self.shards.part(self.rank)
        order = epoch_order(self.seed, epoch, count) if self.shuffles else np.arange(count)
        return order[part.start : part.stop]

    def __iter__(self) -> Iterator[list[Turn]]:
        epoch, step, size = self.epoch, self.step, self.shards.batch_size
        while True:
            order = self.order(epoch)
            for at in range(step, len(self.shards)):
                yield [Turn(epoch, place) for place in order[at * size : (at + 1) * size].tolist()]
            epoch, step = epoch + 1, 0


def stand_in(seed: int, epoch: int, place: int, count: int) -> int:
    """Where the search for an image in place of a bad one begins: one of `count`, drawn with the rest of its numbers."""
    return int(float(image_draws(seed, epoch, np.array([place])).factors[0, 2]) * count)


@dataclass
class Sample(Generic[C]):
    """One image's part of a batch."""

    turn: Turn
    shown: int = -1
    """The image that is shown; -1: none."""
    content: C | None = None
    """None: as `shown`."""
    bad: dict[int, str] = field(default_factory=dict)
    """Images that were found bad on the way, and why."""


class Samples(ABC, Dataset[Sample[C]], Generic[C]):
    """The samples of a source, by turn. In training an image that is bad is replaced by another, in validation by none.

    The search for another begins at a number that is drawn with the rest of the numbers of the image whose turn it is, and takes
    the next good one. So the files alone decide it.
    """

    def __init__(self, source: AnnotatedSource, *, training: bool, seed: int) -> None:
        self._source, self._training, self._seed = source, training, seed
        quiet_pillow()

    @abstractmethod
    def make(self, image: int, turn: Turn) -> C:
        """The part of that image, with the random numbers of that turn. Raises BadImage."""

    def __getitem__(self, turn: Turn) -> Sample[C]:
        """Raises nothing for a bad image."""
        sample: Sample[C] = Sample(turn)
        for image in self._candidates(turn):
            if image in self._source.bad:
                continue
            try:
                with torch.no_grad():
                    sample.content = self.make(image, turn)
            except BadImage as error:
                sample.bad[image] = str(error)
                continue
            sample.shown = image
            break
        return sample

    def _candidates(self, turn: Turn) -> Iterator[int]:
        yield turn.place
        if self._training:
            count = len(self._source)
            first = stand_in(self._seed, turn.epoch, turn.place, count)
            yield from (image % count for image in range(first, first + count) if image % count != turn.place)


@dataclass(frozen=True, eq=False)
class Drawn(Generic[D]):
    """A batch on the host, before it is normalised."""

    turns: Sequence[Turn]
    shown: NDArray[np.int64]
    """(N,): numbers of the images; N may be below the number of turns, and 0."""
    places: NDArray[np.int64]
    """(N,)"""
    content: D
    bad: dict[int, str]


def collate(samples: Sequence[Sample[C]], join: Callable[[list[C]], D]) -> Drawn[D]:
    """The batch of `samples`. Those without an image are left out. join: makes one of N parts, also where N is 0."""
    there = [sample for sample in samples if sample.content is not None]
    return Drawn(
        turns=[sample.turn for sample in samples],
        shown=np.array([sample.shown for sample in there], np.int64),
        places=np.array([sample.turn.place for sample in there], np.int64),
        content=join([sample.content for sample in there if sample.content is not None]),
        bad={image: why for sample in samples for image, why in sample.bad.items()},
    )
