"""Mixup and the loss of a recipe. The only importer of fasttricks_kernels' losses and mixup in the trainer."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fasttricks.config import DistillConfig, LossConfig
from fasttricks_kernels import cross_entropy, distillation_loss, losses_compiled, mixup

NO_TEACHER = DistillConfig()
"""No distillation."""


class Targets(NamedTuple):
    """The targets of a batch: `lam` of `labels` and 1 - lam of `labels_b`, never a dense N x K matrix."""

    labels: Tensor
    """(N,) int64, 0 <= label < K."""
    labels_b: Tensor | None = None
    """(N,) int64: the label of the image mixed in; None without mixup."""
    lam: float | Tensor | None = None
    """Share of the first image, 0 to 1, a tensor () float32; None without mixup."""
    teacher_logits: Tensor | None = None
    """(N, K) of the images as the student sees them, mixed and all; None without distillation."""


def mix_batch(images: Tensor, labels: Tensor, lam: float | Tensor) -> tuple[Tensor, Targets]:
    """Blend each image with its partner: lam x image + (1 - lam) x partner, the partner taken from the reversed batch.

    images: (N, C, H, W) of a float type; labels: (N,) int64; lam in [0, 1]. One lambda a batch and the reversed batch
    follow the authors' published code. Out of place, deterministic, no sync. The oracle is in tests/test_losses.py.
    Raises ValueError for labels of another shape or kind.
    """
    if labels.dim() != 1 or labels.is_floating_point():
        kind = f"{tuple(labels.shape)} {labels.dtype}"
        raise ValueError(
            f"labels must be (N,) whole numbers, one label an image, but are {kind}; mix_images() takes none"
        )
    return mix_images(images, lam), Targets(labels, labels.flip(0), lam)


def mix_images(images: Tensor, lam: float | Tensor) -> Tensor:
    """The images of mix_batch(), for targets that are blended elsewhere."""
    return mixup(images, torch.arange(len(images) - 1, -1, -1, device=images.device), lam, pairs=True)


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    targets: Targets,
    config: LossConfig,
    distill: DistillConfig | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The recipe's loss, summed over the images of the batch: a float32 scalar.

    outputs: logits (N, K), float16, bfloat16 or float32; or (logits, logits of an auxiliary head), whose loss with the
    labels alone is added times config.aux_weight. distill: temperature and weights, for targets.teacher_logits; their loss
    is that of section 5.3 less T^2 x the teacher's entropy, which has no gradient and would hide the rest (921 of 922).
    class_weights: as weighted_loss() takes them; None: all alike.
    A sum, not a mean, so that the caller can divide by the images of all micro-batches and ranks: the gradient is then the
    mean over images, whatever way they were split. N = 0 gives 0.
    """
    logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
    loss = weighted_loss(logits, targets, config, distill or NO_TEACHER, class_weights)
    if auxiliary is None:
        return loss
    labels_alone = targets._replace(teacher_logits=None)
    return loss + config.aux_weight * weighted_loss(auxiliary, labels_alone, config, NO_TEACHER, class_weights)


def weighted_loss(
    logits: Tensor, targets: Targets, config: LossConfig, distill: DistillConfig, class_weights: Tensor | None
) -> Tensor:
    """one_loss() summed over the images, each times the weight of its class; of a mixed image each label's share has its own.

    class_weights: (K,) float32 on the logits' device. Without smoothing this is torch's `weight`; with it torch weighs each term
    by the class of the term, and here the image has one weight, its label's. Mixed images take two launches in place of one.
    """
    if class_weights is None:
        return one_loss(logits, targets, config, distill)

    def part(labels: Tensor) -> Tensor:
        rows = one_loss(logits, Targets(labels, teacher_logits=targets.teacher_logits), config, distill, "none")
        return (class_weights[labels] * rows).sum()

    if targets.labels_b is None or targets.lam is None:
        return part(targets.labels)
    return targets.lam * part(targets.labels) + (1 - targets.lam) * part(targets.labels_b)


def one_loss(
    logits: Tensor,
    targets: Targets,
    config: LossConfig,
    distill: DistillConfig,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """Cross-entropy of `logits` (N, K) with the labels, mixed and smoothed, and with the teacher: the sum, or of each image."""
    of_labels: dict[str, Any] = {
        "target_b": targets.labels_b,
        "lam": targets.lam,
        "smoothing": config.smoothing,
        "smoothing_over": config.smoothing_over,
        "reduction": reduction,
    }
    if targets.teacher_logits is None:
        return cross_entropy(logits, targets.labels, **of_labels)
    loss = distillation_loss(
        logits,
        targets.teacher_logits.to(logits.dtype),
        targets.labels,
        temperature=distill.temperature,
        hard_weight=distill.hard_weight,
        soft_weight=distill.soft_weight,
        **of_labels,
    )
    terms = softened_entropy(targets.teacher_logits, distill.temperature)
    # one sum over all: a sum of rows' sums has other last bits, and old runs resume bit for bit
    return loss - distill.soft_weight * distill.temperature**2 * (terms.sum() if reduction == "sum" else terms.sum(1))


@torch.no_grad()
def softened_entropy(logits: Tensor, temperature: float) -> Tensor:
    """The terms of the entropy of softmax(logits / temperature), in nats: float32 (N, K)."""
    log_p = (logits.float() / temperature).log_softmax(1)
    return -(log_p.exp() * log_p)


def arithmetic() -> str:
    """The implementation of cross-entropy on this CPU: compiled C, or torch without a compiler. Their last bits differ."""
    return "compiled" if losses_compiled() else "torch"
