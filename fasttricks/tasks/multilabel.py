"""Multilabel: each image has any number of the classes. One sigmoid a class, binary cross-entropy, mean average precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.config import DataConfig, LossConfig, TrainConfig
from fasttricks.data.batch import Batch
from fasttricks.data.sources import Source, Split, find_dataset
from fasttricks.learning.learner import Learner, TaskFacts
from fasttricks.learning.precision import Autocast
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World
from fasttricks.tasks.classification import CLASSIFICATION, evaluation_logits
from fasttricks.tasks.label_answers import LabelAnswered, LabelScores
from fasttricks.tasks.losses import mix_images

if TYPE_CHECKING:
    from fasttricks.data.pipeline.loader import Loader

_PANEL = "Validation", "mAP, micro F1 (%)"
METRICS = (Metric("map", "mAP", "%", _PANEL), Metric("micro_f1", "micro F1", "%", _PANEL))


class Multilabel:
    """Any number of the classes an image, from a table with data.label_separator: learner.Task specifies each method."""

    name = "multilabel"
    facts = TaskFacts(several_labels=True)

    def metrics_of(self, num_classes: int) -> tuple[Metric, ...]:
        """METRICS, of any number of classes."""
        return METRICS

    def open_data(self, config: DataConfig) -> tuple[Source, Source]:
        """As data.sources.find_dataset."""
        return find_dataset(config)

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> Loader:
        """As in classification, with the labels (N, K)."""
        return CLASSIFICATION.train_batches(config, source, world)

    def open_split(self, config: DataConfig, split: Split, classes: Sequence[str]) -> Source:
        """As data.sources.open_split."""
        return CLASSIFICATION.open_split(config, split, classes)

    def val_batches(
        self, config: TrainConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> Loader:
        """As in classification, with the labels (N, K)."""
        return CLASSIFICATION.val_batches(config, source, world, batch_size=batch_size, dtype=dtype)

    def make_model(self, config: TrainConfig, num_classes: int) -> nn.Module:
        """As models.build_model."""
        return CLASSIFICATION.make_model(config, num_classes)

    def loss(self, learner: Learner, batch: Batch, lam: float | Tensor) -> tuple[Tensor, int]:
        """Binary cross-entropy of images and labels, smoothed and mixed as the config says."""
        config, images, targets = learner.config, batch.images, batch.labels
        if config.loss.mixup_alpha > 0:
            images = mix_images(images, lam)
            targets = lam * targets + (1 - lam) * targets.flip(0)
        with learner.autocast():
            outputs = learner.forward(images)
        return binary_loss(outputs, targets, config.loss), len(batch)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], world: World, config: TrainConfig, autocast: Autocast
    ) -> dict[str, float]:
        """The metrics of answer(). Raises ValueError where no rank has an image, or a batch does not number its images."""
        return metrics_in(self._answers(model, batches, world, config, autocast))

    def answer(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        num_classes: int,
    ) -> tuple[dict[str, float], LabelAnswered]:
        """The metrics; average precision, precision, recall and F1 by class. Raises as evaluate()."""
        answers = self._answers(model, batches, world, config, autocast)
        return metrics_in(answers), answers

    @torch.no_grad()
    def _answers(
        self, model: nn.Module, batches: Iterable[Batch], world: World, config: TrainConfig, autocast: Autocast
    ) -> LabelAnswered:
        """The answers over the batches of all ranks. `model` is in eval mode during it. A collective, and one sync at the end.

        Raises ValueError where no rank has an image, and for a batch that does not number its images (Batch.shown).
        """
        scores, was_training = LabelScores(), model.training
        model.eval()
        for batch in batches:
            if not len(batch):
                continue
            if batch.shown is None:
                raise ValueError("the scores of a class are ranked by image; this batch does not number its images")
            logits = evaluation_logits(model, batch.images, flip=config.eval.flip, autocast=autocast)
            scores.update(logits, batch.labels, batch.shown)
        model.train(was_training)
        return scores.result(world)

    def describe(self, config: TrainConfig, source: Source, class_weights: Tensor | None) -> str:
        """As in classification."""
        return CLASSIFICATION.describe(config, source, class_weights)

    def example(
        self, config: TrainConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """Normal noise of the images' mean and deviation, and any labels, from torch's global generator."""
        batch = CLASSIFICATION.example(config, batch_size, num_classes, device=device, dtype=dtype)
        labels = torch.randint(2, (batch_size, num_classes), device=device).float()
        return Batch(batch.images, labels)


MULTILABEL = Multilabel()


def metrics_in(answers: LabelAnswered) -> dict[str, float]:
    """Each of METRICS in percent, val_loss in nats, and val_images."""
    return {
        "map": 100 * answers.mean_average_precision,
        "micro_f1": 100 * answers.micro_f1,
        "val_loss": answers.loss,
        "val_images": answers.images,
    }


def binary_loss(outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, config: LossConfig) -> Tensor:
    """The recipe's loss, summed over the images of the batch: a float32 scalar.

    outputs: logits (N, K), float16, bfloat16 or float32; or (logits, logits of an auxiliary head), whose loss is added times
    config.aux_weight. targets: (N, K), 0 to 1. It is torch's binary cross-entropy with the smoothed targets. N = 0 gives 0.
    """
    logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
    smooth = smoothed(targets, config)
    loss = binary_cross_entropy(logits, smooth)
    return loss if auxiliary is None else loss + config.aux_weight * binary_cross_entropy(auxiliary, smooth)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over images: its value is the mean over the classes, as val_loss, and its gradient that of their sum.

    The sum has the gradient that the recipes' learning rates are for: CIFAR-10 with kinds of its classes (14 labels, 500 images a
    class, ResNet-10-D of width 0.25, 6 epochs, lr 0.1 at 256) reached mAP 59.8 % by it, and 52.0 % by the mean. The mean as the
    value does not grow with the classes, as the limit max_loss does not.
    """
    total = functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
    return total.detach() / logits.shape[1] + (total - total.detach())


def smoothed(targets: Tensor, config: LossConfig) -> Tensor:
    """Label smoothing of K = 2, there or not: over all, s / 2 to either; over others, s to the one that is wrong."""
    moved = config.smoothing if config.smoothing_over == "others" else config.smoothing / 2
    return targets if not moved else targets * (1 - 2 * moved) + moved
