"""Argument errors: each names the value, the rule and the way out. None of them reads a value on a GPU."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.int64, torch.int32)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        rule = f"{name} must be a torch.Tensor, not {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")
        makes = {"numpy": "torch.as_tensor"}.get(kind.__module__, "torch.tensor" * isinstance(value, (int, float)))
        raise TypeError(f"{rule}; {makes}({name}) makes one" if makes else rule)


def check_tensors(name: str, values: Any) -> None:
    """A list of tensors."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, not {type(values).__name__}")
    for position, value in enumerate(values):
        if not isinstance(value, Tensor):
            check_tensor(f"{name}[{position}]", value)


def check_number(name: str, value: Any) -> None:
    """A number of the host: int, float or NumPy's. A tensor is none, which a GPU would have to be waited for."""
    if not isinstance(value, (int, float, Real)):
        hint = "; float(...) makes one, on a GPU by waiting for it" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a number, not {type(value).__name__}{hint}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but is {value!r}")


def check_logits(name: str, logits: Tensor) -> None:
    check_tensor(name, logits)
    if logits.dim() != 2:
        raise ValueError(
            f"{name} must be (N, K), the class dimension last, but has shape {tuple(logits.shape)}; "
            f"a dense prediction (N, K, H, W) becomes that by {name}.movedim(1, -1).flatten(0, -2)"
        )
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, not {logits.dtype}")
    if logits.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, but has shape {tuple(logits.shape)}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The same shape and device as `other`."""
    check_tensor(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {other_name} has {tuple(other.shape)}; they must be equal"
        )
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but {other_name} on {other.device}; move one of them")


def check_labels(name: str, labels: Tensor, logits: Tensor) -> None:
    check_tensor(name, labels)
    if labels.dtype not in LABELS:
        hint = "; for soft targets pass the pair: target, target_b and lam" if labels.is_floating_point() else ""
        raise TypeError(f"{name} must hold int64 or int32 labels, not {labels.dtype}{hint}")
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"{name} must be ({logits.shape[0]},), one label a row of the ({logits.shape[0]}, {logits.shape[1]}) "
            f"logits, but has shape {tuple(labels.shape)}"
        )
    check_device(name, labels, "logits", logits)


def check_class_weights(weight: Tensor, logits: Tensor) -> None:
    check_tensor("weight", weight)
    num_classes = logits.shape[1]
    if weight.shape != (num_classes,):
        raise ValueError(f"weight must be ({num_classes},), one a class, but has shape {tuple(weight.shape)}")
    if weight.dtype not in weight_dtypes(logits):
        wanted = " or ".join(map(str, dict.fromkeys(weight_dtypes(logits))))
        raise TypeError(
            f"weight must be {wanted} for {logits.dtype} logits, not {weight.dtype}; weight.to(...) casts it"
        )
    if weight.requires_grad:
        raise ValueError("weight must not require grad, for it gets no gradient; pass weight.detach()")
    check_device("weight", weight, "logits", logits)


def weight_dtypes(logits: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes that class weights and dense targets may have: the logits', and float32 for narrower ones."""
    return logits.dtype, torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_pair(target_b: Tensor | None, lam: Tensor | float | None, logits: Tensor) -> None:
    if (target_b is None) != (lam is None):
        missing = "target_b" if target_b is None else "lam"
        raise ValueError(f"target_b and lam come together (mixup's second label and its weight), but {missing} is None")
    if target_b is not None and lam is not None:
        check_labels("target_b", target_b, logits)
        check_lam(lam, logits.shape[0], "logits", logits)


def check_lam(lam: Tensor | float, num_samples: int, other_name: str, other: Tensor) -> None:
    """A share in [0, 1]. A tensor's values are checked where they can be read without a sync: on the CPU, in the op."""
    if not isinstance(lam, Tensor):
        check_share("lam", lam)
        return
    if not lam.is_floating_point():
        raise TypeError(f"lam must be floating point, not {lam.dtype}")
    if lam.shape not in ((), (num_samples,)):
        raise ValueError(f"lam must be a number, () or ({num_samples},), but has shape {tuple(lam.shape)}")
    check_device("lam", lam, other_name, other)


def check_loss_scale(loss_scale: Tensor | float, logits: Tensor) -> None:
    """One real number for the whole batch. Other shapes would be spread over rows or classes, or end deep in torch."""
    if not isinstance(loss_scale, Tensor):
        check_number("loss_scale", loss_scale)
    elif loss_scale.numel() != 1 or loss_scale.is_complex():
        raise ValueError(
            f"loss_scale must be a number or a () tensor of real numbers, one for the batch, but is "
            f"{tuple(loss_scale.shape)} {loss_scale.dtype}; factors of rows belong in the loss, by reduction='none'"
        )
    else:
        check_device("loss_scale", loss_scale, "logits", logits)


def check_permutation(permutation: Tensor, images: Tensor) -> None:
    check_tensor("permutation", permutation)
    if permutation.dtype not in LABELS:
        raise TypeError(f"permutation must be int64 or int32, not {permutation.dtype}")
    if permutation.shape != images.shape[:1]:
        raise ValueError(
            f"permutation must be ({images.shape[0]},), one partner an image, but has {tuple(permutation.shape)}"
        )
    check_device("permutation", permutation, "images", images)


def check_count(name: str, value: Any, least: int = 0) -> None:
    """A whole number from `least` to 2^31 - 1. A bool is refused: it is a flag in the wrong place."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not least <= int(value) < 2**31:
        raise ValueError(f"{name} must lie in [{least}, {2**31 - 1}], but is {value}")


def check_share(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], but is {value}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, but is {value}")


def check_weight(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, but is {value}")


def check_ignore_index(value: Any) -> None:
    if value is not None and (not isinstance(value, int) or not -(2**63) <= value < 2**63):
        raise ValueError(f"ignore_index must be None or an int64, but is {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}")


def uniform_share(label_smoothing: float, smoothing_over: str, num_classes: int) -> float:
    """The share of the target to spread evenly over all K classes: the smoothing itself, or K / (K - 1) of it for "others".

    That may be more than 1: then a label has less than the others.
    """
    check_share("label_smoothing", label_smoothing)
    check_choice("smoothing_over", smoothing_over, ("all", "others"))
    if smoothing_over == "all" or label_smoothing == 0:
        return label_smoothing
    if num_classes == 1:
        raise ValueError("smoothing_over='others' needs at least two classes; with one class pass label_smoothing=0")
    return label_smoothing * num_classes / (num_classes - 1)


def check_label_values(name: str, labels_N: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """CPU only: every label in [0, K), or the ignored one. On a GPU such a row becomes NaN instead, without a sync."""
    error = bad_label(name, labels_N, num_classes, ignore_index)
    if error is not None:
        raise error


def bad_label(name: str, labels_N: Tensor, num_classes: int, ignore_index: int | None) -> IndexError | None:
    """The error that names the first bad label by its index in `labels`, of any shape; None on a GPU."""
    if labels_N.is_cuda:
        return None
    labels_N = labels_N.long()
    bad_N = (labels_N < 0) | (labels_N >= num_classes)
    if ignore_index is not None:
        bad_N = bad_N & (labels_N != ignore_index)  # not in place, which torch.func.functionalize refuses
    if not bad_N.any():
        return None
    at = tuple(bad_N.nonzero()[0].tolist())
    place = f"{name}[{', '.join(map(str, at))}]" if at else name
    ignored = "" if ignore_index is None else f", or ignore_index = {ignore_index}"
    return IndexError(
        f"{place} is {int(labels_N[at])}, but must lie in [0, {num_classes}){ignored}; "
        f"check the labels against the number of classes"
    )


def check_lam_values(lam: Tensor | None) -> None:
    """CPU only, as check_label_values."""
    if lam is not None and not lam.is_cuda and lam.numel() and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam must lie in [0, 1], but ranges over [{float(lam.min())}, {float(lam.max())}]")


def check_permutation_values(permutation: Tensor, lam: Tensor | None, pairs: bool) -> None:
    """CPU only, as check_label_values: a permutation, under `pairs` its own inverse, and lam in range."""
    if permutation.is_cuda:
        return
    check_lam_values(lam)
    every = torch.arange(len(permutation))
    if not torch.equal(permutation.long().sort().values, every):
        raise ValueError(f"permutation must hold each of 0 .. {len(every) - 1} once, but is {permutation.tolist()}")
    if pairs and not torch.equal(permutation[permutation.long()].long(), every):
        raise ValueError(
            "pairs=True needs a permutation that is its own inverse, such as the reversed batch; "
            f"pass pairs=False for {permutation.tolist()}"
        )
