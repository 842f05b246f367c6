"""Classification: the one place that knows a label an image, top-1 and top-k. Its losses are in losses.py beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.config import DataConfig, TrainConfig
from fasttricks.data.batch import Batch
from fasttricks.data.sources import Source, Split, find_dataset, open_split
from fasttricks.data.sources.class_counts import class_counts, describe_counts
from fasttricks.data.sources.label_sets import sets_of
from fasttricks.learning.learner import Learner, TaskFacts
from fasttricks.learning.precision import Autocast, image_dtype
from fasttricks.learning.schedule import image_size
from fasttricks.models import build_model
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World
from fasttricks.system.spans import span
from fasttricks.tasks.answers import Answered, Answers
from fasttricks.tasks.losses import Targets, mix_batch, training_loss

if TYPE_CHECKING:
    from fasttricks.data.pipeline.loader import Loader

_ENGINE_LOAD = 0.65
"""Share of a batch that the card's JPEG engine decodes under --deterministic off: DALI's default, not measured here."""
_PANEL = "Validation accuracy", "images classified right (%)"
_RARE = 3
"""Images of the largest class for one of the smallest, from which on the header names the ways out."""
MOST = 5
"""The highest k of a top-k accuracy: ImageNet's second figure."""


class Classification:
    """One label an image, of the classes of data.root: learner.Task specifies each method."""

    name = "classification"
    facts = TaskFacts()

    def metrics_of(self, num_classes: int) -> tuple[Metric, ...]:
        """Top-1, and top-k of the k in tops()."""
        return tuple(Metric(f"top{k}", f"top-{k}", "%", _PANEL) for k in tops(num_classes))

    def open_data(self, config: DataConfig) -> tuple[Source, Source]:
        """As data.sources.find_dataset."""
        return find_dataset(config)

    def open_split(self, config: DataConfig, split: Split, classes: Sequence[str]) -> Source:
        """As data.sources.open_split."""
        return open_split(config, split, classes=tuple(classes))

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> Loader:
        """Images of the precision's dtype, cropped, flipped and coloured at random, their side by the epoch."""
        from fasttricks.data.pipeline.loader import Loader  # DALI, which networks and losses can do without

        size_at = partial(image_size, config=config.schedule, full=config.data.image_size, epochs=config.epochs)
        return Loader(
            source,
            config.data,
            training=True,
            batch_size=config.micro_batch_size(world.size),
            device=world.device,
            dtype=image_dtype(config.precision, world.device),
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            image_size_at=size_at,
            hw_decoder_load=_ENGINE_LOAD if config.deterministic == "off" else 0.0,
        )

    def val_batches(
        self, config: TrainConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> Loader:
        """The centre of each image, once."""
        from fasttricks.data.pipeline.loader import Loader

        return Loader(
            source,
            config.data,
            training=False,
            batch_size=batch_size,
            device=world.device,
            dtype=dtype,
            rank=world.rank,
            world_size=world.size,
        )

    def make_model(self, config: TrainConfig, num_classes: int) -> nn.Module:
        """As models.build_model."""
        return build_model(config.model, num_classes)

    def loss(self, learner: Learner, batch: Batch, lam: float | Tensor) -> tuple[Tensor, int]:
        """Cross-entropy of images and labels, smoothed, weighted, mixed and judged by the teacher as the config says."""
        config, (images, targets) = learner.config, prepare(learner, batch, lam)
        with learner.autocast():
            logits = learner.forward(images)
        return training_loss(logits, targets, config.loss, config.distill, learner.class_weights), len(batch)

    def evaluate(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        answers: Answers | None = None,
    ) -> dict[str, float]:
        """As evaluate() below."""
        return evaluate(model, batches, world, flip=config.eval.flip, autocast=autocast, answers=answers)

    def answer(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        num_classes: int,
    ) -> tuple[dict[str, float], Answered]:
        """The metrics; the confusion matrix, the mistakes and the calibration."""
        answers = Answers(num_classes, world.device)
        metrics = self.evaluate(model, batches, world, config, autocast, answers)
        return metrics, answers.result(world)

    def describe(self, config: TrainConfig, source: Source, class_weights: Tensor | None) -> str:
        """The images a class, and the treatment of rare classes; where they have none, the two for one label an image."""
        counts, told = class_counts(source), describe_counts(source)
        if config.data.balance:
            drawn = f"by n^{1 - config.data.balance:g}" if config.data.balance < 1 else "alike"
            return f"{told}; drawn {drawn}"
        if config.loss.class_weights and class_weights is not None:
            low, high = (float(limit) for limit in class_weights.aminmax())
            return f"{told}; their loss is weighted {low:.3g} to {high:.3g} ({config.loss.class_weights})"
        if counts.max() < _RARE * max(1, counts.min()) or sets_of(source):
            return told
        return (
            f"{told}; rare classes count little: --data.balance 1 draws, --loss.class-weights balanced weighs them more"
        )

    def example(
        self, config: TrainConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """Normal noise of the images' mean and deviation, and any labels, from torch's global generator."""
        side = config.data.image_size
        images = torch.randn(batch_size, 3, side, side, device=device, dtype=dtype)
        labels = torch.randint(num_classes, (batch_size,), device=device)
        return Batch(images.contiguous(memory_format=torch.channels_last), labels)


CLASSIFICATION = Classification()


def prepare(learner: Learner, batch: Batch, lam: float | Tensor) -> tuple[Tensor, Targets]:
    """Inputs and targets of the network, with mixup by lam and the teacher's logits as the config says."""
    config, (images, targets) = learner.config, (batch.images, Targets(batch.labels))
    if config.loss.mixup_alpha > 0:
        images, targets = mix_batch(images, batch.labels, lam)
    if learner.teacher is not None:
        with span("teacher"):
            targets = targets._replace(teacher_logits=learner.teacher.judge(batch, images))
    return images, targets


def tops(num_classes: int) -> tuple[int, ...]:
    """The k whose top-k accuracy is measured for so many classes: 1, and MOST or, below that many others, K - 1.

    Top-K of K classes is 100 % of every network; top-1 alone is left for two classes.
    """
    return (1, min(MOST, num_classes - 1)) if num_classes > 2 else (1,)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose label is among the first 1, 2, ..., MOST of the logits: int64 (MOST,), on the logits' device.

    logits: (N, K); labels: (N,) int64. From k = K on all K count. Among equal logits the lower class comes first. An image
    with a NaN among its logits is wrong for every k. No sync.
    """
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > target) | ((logits == target) & (classes < labels[:, None]))
    valid = ~logits.isnan().any(1)
    rank = ahead.sum(1, keepdim=True)
    return ((rank < torch.arange(1, MOST + 1, device=logits.device)) & valid[:, None]).sum(0)


def evaluation_logits(
    model: nn.Module,
    images: Tensor,
    *,
    flip: bool = False,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Float32 logits (N, K) of `images`; flip: the mean of theirs and their mirror images'."""
    with autocast():
        logits: Tensor = model(images).float()
        return (logits + model(images.flip(3)).float()) / 2 if flip else logits


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    flip: bool = False,
    autocast: Autocast = nullcontext,
    answers: Answers | None = None,
) -> dict[str, float]:
    """Top-1 and top-k in percent, by the names of metrics_of(K) for the K outputs of `model`; val_loss, the mean cross-entropy
    in nats, and val_images. Over the batches of all ranks.

    `model` is in eval mode during it. Counts are integers and the loss is summed in float64, so neither batch size nor ranks
    change them. flip: average the logits of an image and its mirror image. Two collectives and one sync, at the end.
    answers: takes each image too, by its number (Batch.shown). Raises ValueError where no rank has an image.
    """
    counts = torch.zeros(MOST + 2, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    for batch in batches:
        if not len(batch):
            continue
        logits = evaluation_logits(model, batch.images, flip=flip, autocast=autocast)
        loss += functional.cross_entropy(logits.double(), batch.labels, reduction="sum")
        counts[:MOST] += count_correct(logits, batch.labels)
        counts[MOST] += len(batch)
        counts[MOST + 1] += logits.numel()  # a rank without images learns K so
        if answers is not None:
            if batch.shown is None:
                raise ValueError("answers need the images' numbers; this batch has none")
            answers.update(logits, batch.labels, batch.shown)
    model.train(was_training)
    world.sum_(counts)
    world.sum_(loss)
    *right, seen, outputs = counts.tolist()
    if not seen:
        raise ValueError("evaluate() got no image on any rank; find_dataset refuses an empty val/ before this")
    scores = {f"top{k}": 100 * right[k - 1] / seen for k in tops(outputs // seen)}
    return {**scores, "val_loss": loss.item() / seen, "val_images": seen}
