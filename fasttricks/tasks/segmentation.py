"""Segmentation (section 6.2): the task of a class for each pixel. Its loss and the scores of whole images are in pixels.py."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from fasttricks.config import DataConfig, TrainConfig, show_name
from fasttricks.data.masks.batch import MaskBatch
from fasttricks.data.masks.places import MaskSplit, open_mask_split, open_masks
from fasttricks.data.masks.source import IGNORED, MaskSource
from fasttricks.data.sources import Source
from fasttricks.learning.class_weights import BALANCED
from fasttricks.learning.learner import Learner, TaskFacts
from fasttricks.learning.precision import Autocast
from fasttricks.models.fcn import build_fcn
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World
from fasttricks.tasks.annotated import training_options, validation_options
from fasttricks.tasks.pixel_counts import PixelCounts, PixelScores
from fasttricks.tasks.pixels import pixel_loss, pixel_scores, resized_in_bands

if TYPE_CHECKING:
    from fasttricks.data.masks.loader import MaskLoader

_PANEL = "Validation pixels", "mean IoU, pixel accuracy (%)"
METRICS = (Metric("miou", "mIoU", "%", _PANEL), Metric("pixel_accuracy", "pixel accuracy", "%", _PANEL))
"""The first is the headline, by which runs are compared."""


class Segmentation:
    """A class for each pixel, of the classes of data.root: learner.Task specifies each method."""

    name = "segmentation"
    facts = TaskFacts(
        heads="heads'",
        one_output_a_class=False,
        whole_images="data.val_resize",
        packages=("torchvision", "pillow"),
    )

    def metrics_of(self, num_classes: int) -> tuple[Metric, ...]:
        """METRICS, of any number of classes."""
        return METRICS

    def open_data(self, config: DataConfig) -> tuple[Source, Source]:
        """As data.masks.places.open_masks."""
        return open_masks(config)

    def open_split(self, config: DataConfig, split: MaskSplit, classes: Sequence[str]) -> MaskSource:
        """As data.masks.places.open_mask_split."""
        return open_mask_split(config, split, classes=classes)

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> MaskLoader:
        """Squares of data.image_size, cut out of images that were scaled at random."""
        from fasttricks.data.masks.loader import MaskLoader  # torchvision, which networks and losses can do without

        return MaskLoader(cast(MaskSource, source), config.data, config.segment, **training_options(config, world))

    def val_batches(
        self, config: TrainConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> MaskLoader:
        """Whole images, one a batch, and their masks at full size. batch_size: has no effect."""
        from fasttricks.data.masks.loader import MaskLoader

        return MaskLoader(cast(MaskSource, source), config.data, config.segment, **validation_options(world, dtype))

    def make_model(self, config: TrainConfig, num_classes: int) -> nn.Module:
        """As models.fcn.build_fcn."""
        return build_fcn(config.model, config.segment, num_classes)

    def loss(self, learner: Learner, batch: MaskBatch, lam: float | Tensor) -> tuple[Tensor, int]:
        """As pixel_loss(), which mixes nothing: lam has no effect."""
        config = learner.config
        with learner.autocast():
            outputs = learner.forward(batch.images)
        loss = pixel_loss(
            outputs,
            batch.masks,
            config.loss,
            aux_weight=config.segment.aux_weight,
            class_weights=learner.class_weights,
        )
        return loss, len(batch)

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[MaskBatch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
    ) -> dict[str, float]:
        """The metrics of answer()."""
        return self.answer(model, batches, world, config, autocast, num_classes(model))[0]

    @torch.no_grad()
    def answer(
        self,
        model: nn.Module,
        batches: Iterable[MaskBatch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        num_classes: int,
    ) -> tuple[dict[str, float], PixelScores]:
        """(miou and pixel_accuracy in percent, val_loss and val_images; the scores of each class) over the batches of all ranks.

        val_loss: the mean over the images of the mean cross-entropy of their valid pixels, in nats. `model`, an FCN, is in
        evaluation mode during it. A whole image is scored at the size of its mask; with eval.flip and segment.test_scales its
        probabilities are averaged. Counts of pixels are whole numbers and the loss is summed in float64, so neither batch size
        nor ranks change them. Three collectives, at the end. Raises ValueError where no rank has an image, and as
        PixelCounts.result.
        """
        counts = PixelCounts(num_classes, world.device)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss, images
        was_training = model.training
        model.eval()
        numbers: list[int] = []
        alone: list[Tensor] = []
        for batch in batches:
            if not len(batch):
                continue
            each = [PixelCounts(num_classes, world.device) for _ in range(len(batch))]
            scores = pixel_scores(
                model, batch.images, scales=config.segment.test_scales, flip=config.eval.flip, autocast=autocast
            )
            loss = torch.zeros(len(batch), dtype=torch.float64, device=world.device)
            for rows, band in resized_in_bands(scores, *batch.masks.shape[1:]):
                masks = batch.masks[:, rows]
                for number, one in enumerate(each):
                    one.update(band[number].argmax(0), masks[number])
                valid = masks != IGNORED
                picked = band.log_softmax(1).gather(1, torch.where(valid, masks, 0)[:, None])[:, 0]
                loss -= torch.where(valid, picked, 0.0).sum((1, 2), dtype=torch.float64)
            sums[0] += (loss / (batch.masks != IGNORED).sum((1, 2)).clamp(min=1)).sum()
            sums[1] += len(batch)
            for one in each:
                counts.add(one)
            if batch.shown is not None:
                numbers += batch.shown.tolist()
                alone += [one.mean_iou() for one in each]
        model.train(was_training)
        total, images = world.sum_(sums).tolist()
        if not images:
            raise ValueError("no image on any rank; open_masks refuses an empty split before this")
        found = _with_images(counts.result(world), numbers, alone, world)
        metrics = {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}
        return {**metrics, "val_loss": total / images, "val_images": int(images)}, found

    def describe(self, config: TrainConfig, source: Source, class_weights: Tensor | None) -> str:
        """The pixels that do not count, and the weights of the others."""
        told = f"a class for each pixel; {0 if cast(MaskSource, source).first else IGNORED} in a mask is ignored"
        if class_weights is None:
            return told
        weights, chosen = class_weights.tolist(), config.loss.class_weights
        least, most = (
            f"{limit:.3g} ({show_name(source.classes[weights.index(limit)])})" for limit in (min(weights), max(weights))
        )
        how = "balanced by median frequency" if chosen == BALANCED else chosen
        return f"{told}; their loss is weighted {least} to {most}, {how}"

    def example(
        self, config: TrainConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> MaskBatch:
        """Normal noise of the images' mean and deviation, and any classes, from torch's global generator."""
        side = config.data.image_size
        images = torch.randn(batch_size, 3, side, side, device=device, dtype=dtype)
        masks = torch.randint(num_classes, (batch_size, side, side), device=device)
        return MaskBatch(images.contiguous(memory_format=torch.channels_last), masks)


def _with_images(found: PixelScores, numbers: list[int], alone: list[Tensor], world: World) -> PixelScores:
    """`found` with the score of each image of all ranks. A collective and a sync."""
    mine = pickle.dumps((numbers, torch.stack(alone).tolist() if alone else []))
    pairs = sorted(pair for part in world.gather(mine) for pair in zip(*pickle.loads(part), strict=True))
    images, ious = np.array([pair[0] for pair in pairs], np.int64), np.array([pair[1] for pair in pairs], np.float64)
    return found._replace(images=images, image_iou=ious)


def num_classes(model: nn.Module) -> int:
    """The classes of an FCN."""
    layers: tuple[nn.Conv2d, ...] = model.get_classifier()  # type: ignore[operator]
    return layers[0].out_channels


SEGMENTATION = Segmentation()
