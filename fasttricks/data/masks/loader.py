"""The MaskLoader: an epoch's images and masks, decoded and transformed by worker processes; bad files named and replaced."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fasttricks.config import DataConfig, SegmentConfig, show_name
from fasttricks.data.annotated.loader import AnnotatedLoader, LoaderOptions
from fasttricks.data.annotated.pixels import normalise
from fasttricks.data.annotated.samples import Drawn
from fasttricks.data.masks.batch import MaskBatch
from fasttricks.data.masks.samples import MaskSamples, Shown, join
from fasttricks.data.masks.source import MaskSource
from fasttricks.system.transfer import to_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MaskLoader(AnnotatedLoader[Shown, Shown | None, MaskBatch]):
    """Batches of images and masks.

    Training: a random view of each image (views.py). Validation: one whole image a batch, its short side at data.val_resize, with
    its mask at full size: so a metric counts the pixels of the annotation, once each.
    Arguments and all else as AnnotatedLoader, which reads image_size and flip of `config` too here. segment: base_size, scale,
    blur.
    """

    def __init__(
        self, source: MaskSource, config: DataConfig, segment: SegmentConfig, **options: Unpack[LoaderOptions]
    ) -> None:
        super().__init__(source, config, **options)
        self._masks, self._segment = source, segment
        self._classes: NDArray[np.bool_] | None = None
        """The classes that the masks of this epoch have, from its first batch on; None: not to be told."""
        self._tells = self._training and not self._rank

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As AnnotatedLoader.load_state_dict."""
        super().load_state_dict(state)
        self._classes = None

    def _samples(self) -> MaskSamples:
        return MaskSamples(self._masks, self._config, self._segment, training=self._training, seed=self._seed)

    @staticmethod
    def _join(parts: list[Shown]) -> Shown | None:
        return join(parts)

    def _batch(self, drawn: Drawn[Shown | None]) -> MaskBatch:
        side, shown = self._config.image_size, drawn.content
        if shown is None:
            shown = Shown(
                np.empty((0, side, side, 3), np.uint8), np.empty((0, side, side), np.uint8), np.array([False])
            )
        self._see_classes(shown.classes)
        images = to_device(torch.from_numpy(shown.image), self._device)
        masks = to_device(torch.from_numpy(shown.mask), self._device).long()
        return MaskBatch(normalise(images, self._config, self._dtype), masks, drawn.places, drawn.shown)

    def _epoch_ended(self) -> None:
        self._tell_classes()

    def _see_classes(self, classes: NDArray[np.bool_]) -> None:
        if self._tells and self._step == 0:
            self._classes = np.zeros(len(self.classes), bool)
        if self._classes is not None:
            self._classes |= classes

    def _tell_classes(self) -> None:
        """After the first whole epoch: warn of each class that no mask of it had. The masks' values are not read before."""
        if self._classes is None:
            return
        ranks, masks = self.shards.world_size, len(self.shards.part(self._rank))
        for number in np.flatnonzero(~self._classes).tolist():
            value, name = number + self._masks.first, show_name(self._source.classes[number])
            read = f"{masks} training masks{f' of rank {self._rank}' * (ranks > 1)}"
            text = f"class {name} (value {value}) is in none of the {read}; check the names and their order"
            print(f"warning: {text}", file=sys.stderr, flush=True)
        self._classes, self._tells = None, False
