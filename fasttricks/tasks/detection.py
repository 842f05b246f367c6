"""Detection (section 6.1): the task of boxes around objects, each of a class. Its scores are in average_precision.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fasttricks.config import DataConfig, TrainConfig, show_name
from fasttricks.data.boxes.batch import BoxBatch
from fasttricks.data.boxes.places import BoxSplit, open_box_split, open_boxes
from fasttricks.data.boxes.source import Boxes, BoxSource
from fasttricks.data.sources import Source
from fasttricks.learning.learner import Learner, TaskFacts
from fasttricks.learning.precision import Autocast
from fasttricks.models.detector import build_detector
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World
from fasttricks.tasks.annotated import training_options, validation_options
from fasttricks.tasks.average_precision import AveragePrecision, BoxScores, Found

if TYPE_CHECKING:
    from fasttricks.data.boxes.loader import BoxLoader

_BOTH = "Validation boxes, both forms", "mean average precision at IoU 0.5 (%)"
METRICS = (
    Metric("map", "mAP", "%", ("Validation boxes", "mean average precision at IoU 0.5 (%)")),
    Metric("map_voc07", "mAP at 11 recalls", "%", _BOTH),
    Metric("map_area", "mAP by area", "%", _BOTH),
)
"""The first is the headline, by which runs are compared: that of the other two which detect.average names."""


class Detection:
    """Boxes of objects, of the classes of data.root: learner.Task specifies each method."""

    name = "detection"
    facts = TaskFacts(
        heads="heads'",
        one_output_a_class=False,
        least_classes=1,  # it tells objects from the background too
        whole_images="detect.base_size",
        steps_alike=False,
        loss_parts=("objectness", "rpn_box_reg", "classifier", "box_reg"),
        packages=("torchvision", "pillow"),
    )

    def metrics_of(self, num_classes: int) -> tuple[Metric, ...]:
        """METRICS, of any number of classes."""
        return METRICS

    def open_data(self, config: DataConfig) -> tuple[Source, Source]:
        """As data.boxes.places.open_boxes."""
        return open_boxes(config)

    def open_split(self, config: DataConfig, split: BoxSplit, classes: Sequence[str]) -> BoxSource:
        """As data.boxes.places.open_box_split."""
        return open_box_split(config, split, classes=classes)

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> BoxLoader:
        """Whole images, mirrored at random."""
        from fasttricks.data.boxes.loader import BoxLoader  # torchvision, which networks and losses can do without

        return BoxLoader(cast(BoxSource, source), config.data, config.detect, **training_options(config, world))

    def val_batches(
        self, config: TrainConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> BoxLoader:
        """Whole images, one a batch. batch_size: has no effect."""
        from fasttricks.data.boxes.loader import BoxLoader

        return BoxLoader(cast(BoxSource, source), config.data, config.detect, **validation_options(world, dtype))

    def make_model(self, config: TrainConfig, num_classes: int) -> nn.Module:
        """As models.detector.build_detector."""
        return build_detector(config.model, config.detect, num_classes)

    def loss(self, learner: Learner, batch: BoxBatch, lam: float | Tensor) -> tuple[Tensor, int]:
        """(4,): torchvision's losses, means over the samples of the batch, times its images; named by facts.loss_parts.

        torch's global generator draws the samples; the trainer seeds it with (seed, step, rank) before each step. Nothing is
        mixed: lam has no effect. Other than those of the other tasks it waits for the device.
        """
        targets = [
            {"boxes": boxes, "labels": labels + 1} for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        with learner.autocast():
            losses: dict[str, Tensor] = learner.forward(batch.images, targets)
        return torch.stack([losses[f"loss_{name}"] for name in self.facts.loss_parts]) * len(batch), len(batch)

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[BoxBatch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
    ) -> dict[str, float]:
        """The metrics of answer()."""
        return self.answer(model, batches, world, config, autocast, model.num_classes)[0]  # type: ignore[arg-type]

    @torch.no_grad()
    def answer(
        self,
        model: nn.Module,
        batches: Iterable[BoxBatch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        num_classes: int,
    ) -> tuple[dict[str, float], BoxScores]:
        """(map, map_voc07 and map_area in percent, and val_images; the scores of each class) over the batches of all ranks.

        `model`, a Detector, is in evaluation mode during it. There is no validation loss: the detector has losses of random
        samples, in training. Neither ranks nor the order of the batches change a bit of the scores. Two collectives at the
        end. Waits for the device at each image, as the detector does. Raises DataError where no object counts.
        """
        precision, images = AveragePrecision(num_classes), 0
        was_training = model.training
        model.eval()
        for batch in batches:
            if not len(batch):
                continue
            assert batch.shown is not None
            precision.update(detect(model, batch.images, autocast), truths(batch), batch.shown)
            images += len(batch)
        model.train(was_training)
        count = world.sum_(torch.tensor(images, dtype=torch.int64, device=world.device))
        found = precision.result(world)
        both = {"map_voc07": found.map_voc07, "map_area": found.map_area}
        return {"map": both[f"map_{config.detect.average}"], **both, "val_images": int(count.item())}, found

    def describe(self, config: TrainConfig, source: Source, class_weights: Tensor | None) -> str:
        """The boxes of all classes, and of the rarest and the most frequent."""
        every, names = cast(BoxSource, source).every, source.classes
        counts = np.bincount(every.labels, minlength=len(names))
        told = f"{counts.sum():,} boxes, {every.difficult.sum():,} of them difficult"
        if len(counts) == 1:
            return told
        least, most = int(counts.argmin()), int(counts.argmax())
        ends = f"fewest: {show_name(names[least])}, most: {show_name(names[most])}"
        return f"{told}; {counts[least]:,} to {counts[most]:,} a class ({ends})"

    def example(
        self, config: TrainConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> BoxBatch:
        """Normal noise in images of the largest size, each with two boxes, from torch's global generator."""
        height, width = config.detect.base_size, config.detect.max_size
        images = torch.randn(batch_size, 3, height, width, device=device, dtype=dtype)
        box = torch.tensor([[0.0, 0.0, 1 / 2, 1 / 2], [1 / 4, 1 / 4, 1.0, 1.0]], device=device)
        boxes = box * torch.tensor([width, height, width, height], device=device)
        return BoxBatch(
            images=list(images),
            boxes=[boxes] * batch_size,
            labels=list(torch.randint(num_classes, (batch_size, 2), device=device)),
            difficult=[torch.zeros(2, dtype=torch.bool, device=device)] * batch_size,
            sizes=np.full((batch_size, 2), (height, width), np.int64),
        )


@torch.no_grad()
def detect(model: nn.Module, images: Sequence[Tensor], autocast: Autocast) -> list[Found]:
    """The detections on each image, (3, h, w), of `model`, a Detector in evaluation mode; the surest first."""
    with autocast():
        found: list[dict[str, Any]] = model(images)
    return [Found(one["boxes"], one["scores"], one["labels"] - 1) for one in found]


def truths(batch: BoxBatch) -> list[Boxes]:
    """The objects on each image, on the host. Waits for the device."""
    parts = zip(batch.boxes, batch.labels, batch.difficult, strict=True)
    return [Boxes(*(part.cpu().numpy() for part in one)) for one in parts]


DETECTION = Detection()
