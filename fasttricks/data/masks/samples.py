"""An image and its mask as a batch takes them: a pure function of (seed, epoch, place), computed in any process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fasttricks.config import DataConfig, SegmentConfig
from fasttricks.data.masks.pixels import Pair, read_pair
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.masks.views import draw_view, show, show_whole, stand_in
from fasttricks.data.pipeline.draws import epoch_order
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources.decode import BadImage, quiet_pillow


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


@dataclass
class Sample:
    """One image's part of a batch. Arrays and not tensors, which would need room in /dev/shm, and a container has 64 MB of it."""

    turn: Turn
    shown: int = -1
    """The image that is shown; -1: none."""
    image: NDArray[np.uint8] | None = None
    """(h, w, 3)"""
    mask: NDArray[np.uint8] | None = None
    """(H, W)"""
    classes: NDArray[np.bool_] | None = None
    """(K,): whether the whole mask has a pixel of each class."""
    bad: dict[int, str] = field(default_factory=dict)
    """The images that were found bad on the way, by number, and why."""


class Samples(Dataset[Sample]):
    """The sample of each turn.

    training: a random view of the image. Where it is bad, the next good one from a random number on takes its place, with its
    random numbers. Else the whole image, and none where it is bad.
    """

    def __init__(
        self, source: MaskSource, config: DataConfig, segment: SegmentConfig, *, training: bool, seed: int
    ) -> None:
        self._source, self._config, self._segment = source, config, segment
        self._training, self._seed = training, seed
        quiet_pillow()

    def __getitem__(self, turn: Turn) -> Sample:
        """Raises nothing for a bad image."""
        sample = Sample(turn)
        for image in self._candidates(turn):
            if image in self._source.bad:
                continue
            try:
                pair = read_pair(self._source, image, self._config.max_pixels)
            except BadImage as error:
                sample.bad[image] = str(error)
                continue
            sample.shown, sample.classes = image, pair.counts > 0
            with torch.no_grad():
                sample.image, sample.mask = self._shown(pair, turn)
            break
        return sample

    def _candidates(self, turn: Turn) -> Iterator[int]:
        yield turn.place
        if self._training:
            count = len(self._source)
            first = stand_in(self._seed, turn.epoch, turn.place, count)
            yield from (image % count for image in range(first, first + count) if image % count != turn.place)

    def _shown(self, pair: Pair, turn: Turn) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if not self._training:
            return show_whole(pair.image, self._config).numpy(), pair.mask
        size = (pair.mask.shape[0], pair.mask.shape[1])
        view = draw_view(size, self._config, self._segment, seed=self._seed, epoch=turn.epoch, place=turn.place)
        pixels, classes = show(pair.image, pair.mask, view, self._config)
        return pixels.numpy(), classes.numpy()


class Drawn(NamedTuple):
    """A batch on the host, before it is normalised."""

    turns: Sequence[Turn]
    shown: NDArray[np.int64]
    """(N,): numbers of the images; N may be below the number of turns, and 0."""
    places: NDArray[np.int64]
    """(N,)"""
    images: NDArray[np.uint8] | None
    """(N, h, w, 3); None for N = 0."""
    masks: NDArray[np.uint8] | None
    """(N, H, W); None for N = 0."""
    classes: NDArray[np.bool_] | None
    """(K,): whether the mask of one of the images has a pixel of each class; None for N = 0."""
    bad: dict[int, str]


def collate(samples: Sequence[Sample]) -> Drawn:
    """The batch of `samples`, whose images have one size. Those without an image are left out."""
    there = [sample for sample in samples if sample.shown >= 0]
    stack = [np.stack([getattr(sample, name) for sample in there]) if there else None for name in ("image", "mask")]
    return Drawn(
        turns=[sample.turn for sample in samples],
        shown=np.array([sample.shown for sample in there], np.int64),
        places=np.array([sample.turn.place for sample in there], np.int64),
        images=stack[0],
        masks=stack[1],
        classes=np.any([sample.classes for sample in there if sample.classes is not None], 0) if there else None,
        bad={image: why for sample in samples for image, why in sample.bad.items()},
    )
