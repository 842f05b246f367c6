"""Losses forward and backward, a second, beside torch's own eager and compiled, and Liger's."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttricks_kernels import cross_entropy

SMOOTHING, LAM = 0.1, 0.3


Loss = Callable[[Tensor], Tensor]


def pair(rows: int, num_classes: int, device: torch.device, *, mixup: bool) -> tuple[Loss, Loss]:
    """Ours and torch's, of logits (rows, num_classes); targets are drawn here, equal for both."""
    a, b = torch.randint(num_classes, (2, rows), device=device)
    mixed = {"target_b": b, "lam": LAM} if mixup else {}

    def ours(z: Tensor) -> Tensor:
        return cross_entropy(z, a, smoothing=SMOOTHING, **mixed)

    def theirs(z: Tensor) -> Tensor:
        if not mixup:
            return F.cross_entropy(z, a, label_smoothing=SMOOTHING)
        target = LAM * F.one_hot(a, num_classes).float() + (1 - LAM) * F.one_hot(b, num_classes).float()
        return F.cross_entropy(z, target, label_smoothing=SMOOTHING)

    return ours, theirs


def contestants(
    rows: int, num_classes: int, device: torch.device, *, mixup: bool, compiled: bool
) -> tuple[dict[str, Callable[[], float]], list[str]]:
    """Name -> a turn, returning passes (forward and backward) a second; and which peers were left out, and why."""
    torch.manual_seed(0)
    logits = torch.randn(rows, num_classes, device=device, requires_grad=True)
    ours, theirs = pair(rows, num_classes, device, mixup=mixup)
    losses: dict[str, Loss] = {"fasttricks": ours, "torch, eager": theirs}
    skipped = []
    if compiled:
        losses["torch.compile"] = torch.compile(theirs)
    else:
        skipped.append("torch.compile (--compiled measures it)")
    if mixup:
        skipped.append("Liger (has no mixed targets)")
    elif device.type != "cuda":
        skipped.append("Liger (Triton: needs a GPU)")
    elif find_spec("liger_kernel") is None:
        skipped.append("Liger (not installed: pip install liger-kernel)")
    else:
        from liger_kernel.transformers.functional import liger_cross_entropy

        labels = torch.randint(num_classes, (rows,), device=device)
        losses["Liger"] = lambda z: liger_cross_entropy(z, labels, label_smoothing=SMOOTHING)
    return {name: _timed(loss, logits) for name, loss in losses.items()}, skipped


def _timed(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], float]:
    on_gpu, passes = logits.device.type == "cuda", 50

    def measure() -> float:
        if on_gpu:
            torch.cuda.synchronize(logits.device)
        start = time.perf_counter()
        for _ in range(passes):
            logits.grad = None
            # Liger's backward overwrites the logits it was given, so each contestant gets a copy of them
            loss(logits * 1.0).backward()
        if on_gpu:
            torch.cuda.synchronize(logits.device)
        return passes / (time.perf_counter() - start)

    return measure
