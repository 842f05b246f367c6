"""Shared by the losses' public functions and operators: the labels, checked and in one piece; rows reduced; the scale.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _checks

Reduction = Literal["mean", "sum", "none"]
SmoothingOver = Literal["all", "others"]

# A loss takes a dozen options. Its operators are declared by schema, so that each list of them is written once: here,
# in a tuple's fields and the same fields' schema.
LABELS = (
    "Tensor target, Tensor? target_b, Tensor? lam_N, Tensor? weight_K, float lam, float uniform, SymInt? ignore_index"
)
LABEL_TENSORS = 4  # of LABELS, the first
WEIGHTS = "float temperature, float hard_weight, float soft_weight"
# After the options of an operator that writes a scaled gradient: the factor on a row's gradient is the product of the
# two. The part that the host knows is a number, not a tensor, so that nothing is copied to the device for it.
SCALE = "Tensor? device_scale_N, float host_scale"


class Labels(NamedTuple):
    """The labels of N samples as an operator takes them, LABELS by position.

    A floating-point target, of the logits' shape, holds no labels but the targets themselves.
    """

    target: Tensor
    target_b: Tensor | None = None
    lam_N: Tensor | None = None  # () or (N,)
    weight_K: Tensor | None = None  # of the classes
    lam: float = 1.0
    uniform: float = 0.0  # share of the target that is spread evenly over all K classes
    ignore_index: int | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first LABEL_TENSORS fields."""
        return self.target, self.target_b, self.lam_N, self.weight_K

    @property
    def share(self) -> Tensor | float:
        """The weight of `target`."""
        return self.lam if self.lam_N is None else self.lam_N

    @property
    def named(self) -> dict[str, Any]:
        """As reference.py takes them."""
        of_classes = {} if self.weight_K is None else {"weight_K": self.weight_K}  # distillation has none
        return of_classes | {
            "target_N": self.target,
            "target_b_N": self.target_b,
            "lam": self.share,
            "uniform": self.uniform,
            "ignore_index": self.ignore_index,
        }

    @property
    def dense(self) -> bool:
        return self.target.is_floating_point()

    @property
    def ignored(self) -> Tensor | None:
        """Rows whose labels all weigh nothing, for they are ignored; None without an ignore_index."""
        if self.ignore_index is None or self.dense:
            return None
        ignored_N, share = self.target.long() == self.ignore_index, self.share
        if self.target_b is None:
            return ignored_N
        return (ignored_N | (share == 0)) & ((self.target_b.long() == self.ignore_index) | (share == 1))

    @property
    def unequal(self) -> bool:
        """Whether rows may differ in the weight of their labels: then it is the device that knows a mean's divisor."""
        return not self.dense and (self.ignore_index is not None or self.weight_K is not None)

    def denominator(
        self, reduction: Reduction, ignored: Ignored | None = None, label_weight_N: Tensor | None = None
    ) -> Tensor | float:
        """Divisor of the summed loss: for a mean the weight of the labels that are not ignored, on their device.

        A number of the host where that is known: without an ignore_index, and on the CPU where losses.c has counted.
        label_weight_N: as a kernel of Triton has written it, in place of an operator or two for each step of the sum.
        """
        if reduction != "mean":
            return 1
        if self.dense:
            return self.target.numel() // self.target.shape[1]
        if label_weight_N is not None:
            return label_weight_N.sum()
        if self.weight_K is not None:
            return self._weight_of_labels(self.weight_K.double())
        num_rows = self.target.numel()
        if self.ignore_index is None or (ignored is not None and not ignored.target and not ignored.target_b):
            return num_rows
        if ignored is not None and self.target_b is None:
            return num_rows - ignored.target
        if ignored is not None and self.lam_N is None:
            kept, kept_b = (self.target.new_tensor(num_rows - n, dtype=torch.float64) for n in ignored[:2])
            return torch.lerp(kept_b, kept, self.lam)  # as below
        kept_N = self.target.long() != self.ignore_index  # in int32, torch takes 2^31 for -2^31
        if self.target_b is None:
            return kept_N.sum()
        kept_b_N = self.target_b.long() != self.ignore_index
        share = self.share.double() if isinstance(self.share, Tensor) else self.share
        if isinstance(share, Tensor) and share.dim():
            return (share * kept_N.double() + (1 - share) * kept_b_N.double()).sum()
        return torch.lerp(kept_b_N.sum(dtype=torch.float64), kept_N.sum(dtype=torch.float64), share)

    def _weight_of_labels(self, weight_K: Tensor) -> Tensor:
        """The sum of the classes' weights of the labels that are not ignored, each by its share."""

        def counts(label_N: Tensor) -> Tensor:
            label_N = label_N.long()
            weight_N = weight_K[label_N.clamp(0, weight_K.shape[0] - 1)]
            return weight_N if self.ignore_index is None else torch.where(label_N == self.ignore_index, 0, weight_N)

        if self.target_b is None:
            return counts(self.target).sum()
        share = self.share.double() if isinstance(self.share, Tensor) else self.share
        return (share * counts(self.target) + (1 - share) * counts(self.target_b)).sum()


class Ignored(NamedTuple):
    """How much is ignored, as losses.c counts it in passing; torch would launch an operator or more for each."""

    target: int  # labels that are ignored
    target_b: int
    rows: int  # rows whose labels all weigh nothing


class Weights(NamedTuple):
    """The numbers of distillation as its operators take them, WEIGHTS by position; the names are reference.py's."""

    temperature: float
    hard_weight: float
    soft_weight: float


def named(labels: Labels, weights: Weights | None = None) -> dict[str, Any]:
    """The options of a loss as reference.py takes them."""
    return labels.named if weights is None else {**labels.named, **weights._asdict()}


def one_smoothing(label_smoothing: float, smoothing: float | None) -> float:
    """The smoothing under its two names. torch takes a negative one, and NaN, for 0 without a word; here they are refused."""
    if smoothing is not None:
        if label_smoothing:
            raise ValueError(f"label_smoothing = {label_smoothing} and smoothing = {smoothing} are one thing; give one")
        label_smoothing = smoothing
    if not label_smoothing >= 0:
        raise ValueError(f"label_smoothing must lie in [0, 1], but is {label_smoothing}")
    return label_smoothing


def checked_labels(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | float | None,
    label_smoothing: float,
    smoothing_over: SmoothingOver,
    ignore_index: int | None,
    reduction: Reduction,
    weight: Tensor | None = None,
    *,
    planes: bool = False,
) -> Labels:
    """The arguments that every loss takes, checked. Raises TypeError and ValueError; reads no value on a GPU."""
    if not planes or logits.dim() != 3:
        _checks.check_logits("logits", logits)
    _checks.check_labels("target", target, logits)
    _checks.check_pair(target_b, lam, logits)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    _checks.check_ignore_index(ignore_index)
    if weight is not None:
        _checks.check_class_weights(weight, logits)
    uniform = _checks.uniform_share(label_smoothing, smoothing_over, logits.shape[1])
    lam_N, lam = (lam, 1.0) if isinstance(lam, Tensor) else (None, 1.0 if lam is None else float(lam))
    return Labels(target, target_b, lam_N, weight, lam, uniform, ignore_index)


def checked_weights(temperature: float, hard_weight: float, soft_weight: float) -> Weights:
    _checks.check_positive("temperature", temperature)
    _checks.check_weight("hard_weight", hard_weight)
    _checks.check_weight("soft_weight", soft_weight)
    return Weights(float(temperature), float(hard_weight), float(soft_weight))


def reduce_rows(loss_N: Tensor, reduction: Reduction, denominator: Tensor | float) -> Tensor:
    if reduction == "none":
        return loss_N
    if isinstance(denominator, Tensor):
        denominator = denominator.to(loss_N.dtype)  # or a float64 lam makes the loss float64
    return loss_N.sum() / denominator if reduction == "mean" else loss_N.sum()


def scale_in_parts(
    loss_scale: Tensor | float, denominator: Tensor | float, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """SCALE, loss_scale / denominator: the factor that only the device knows, in the losses' dtype, and the host's."""
    if not isinstance(denominator, Tensor):
        number = 1.0 / max(denominator, 1)  # an empty batch has no gradient to scale
        return (loss_scale, number) if isinstance(loss_scale, Tensor) else (None, loss_scale * number)
    return loss_scale / denominator.to(dtype), 1.0  # by whole numbers, torch would divide in float32


def scale_of_rows(loss_N: Tensor, device_scale_N: Tensor | None, host_scale: float) -> Tensor:
    """SCALE as one number a row, in the losses' dtype."""
    if device_scale_N is None:
        return loss_N.new_full(loss_N.shape, host_scale)
    return (host_scale * device_scale_N).to(loss_N.dtype).expand_as(loss_N)
