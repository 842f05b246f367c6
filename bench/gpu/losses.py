"""Losses, forward and backward, and mixup of images: device time and bytes/s beside torch, compiled torch and Liger.

The bytes are the least that the maths needs: logits (and the teacher's) read once, their gradient written once; images read and
written once. So a contestant that moves more shows as a lower rate. The roof is the copy rate of the first part.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.child import attempt
from bench.gpu.clock import device_of, device_seconds, host_seconds
from bench.gpu.parts import COPY_RATE, Job, Row, is_installed
from bench.losses import LAM, SMOOTHING, pair
from fasttricks_kernels import distillation_loss, mixup

OURS, COMPILED = "fasttricks", "torch, compiled"
TEMPERATURE, CLASSES = 20.0, 1000
SIZES, TINY = ((1024, "fp16"), (65536, "fp16"), (128, "fp16")), ((8, "fp32"),)
"""Rows of logits: the paper's batch, one far beyond the caches, a GPU's share of the batch."""
ROUNDS = 5
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
Work = Callable[[], object]


def measure(job: Job) -> Iterator[Row]:
    """Rows of each loss and size, ours first."""
    device = device_of(job.device)
    for kind in ("labels", "mixup's labels", "distillation"):
        for rows, name in TINY if job.tiny else SIZES:
            size = {"loss": kind, "size": f"{rows} x {CLASSES} {name}"}
            make = partial(of_loss, kind, rows, DTYPES[name], device, tiny=job.tiny)
            yield from attempt(size, partial(compare, make, device, job.facts))
    for images, name in ((2, "fp32"),) if job.tiny else ((128, "fp16"),):
        side = 8 if job.tiny else 224
        size = {"loss": "mixup of images, no gradient", "size": f"{images} x 3 x {side} x {side} {name}"}
        make = partial(of_images, images, side, DTYPES[name], device, tiny=job.tiny)
        yield from attempt(size, partial(compare, make, device, job.facts))


def of_loss(
    kind: str, rows: int, dtype: torch.dtype, device: torch.device, *, tiny: bool
) -> tuple[dict[str, Work], int]:
    """(Name -> a forward and backward pass of the loss, equal for all; the least bytes of one)."""
    torch.manual_seed(0)
    logits = torch.randn(rows, CLASSES, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(rows, CLASSES, device=device, dtype=dtype)
    if kind == "distillation":
        labels = torch.randint(CLASSES, (rows,), device=device)
        ours: Any = partial(_distil_ours, teacher=teacher, labels=labels)
        theirs: Any = partial(_distil_torch, teacher=teacher, labels=labels)
    else:
        ours, theirs = pair(rows, CLASSES, device, mixup=kind != "labels")
    losses = {OURS: ours, "torch": theirs, COMPILED: compiled(theirs, tiny=tiny)}
    if kind == "labels" and device.type == "cuda" and is_installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        labels = torch.randint(CLASSES, (rows,), device=device)
        losses["Liger"] = lambda z: liger_cross_entropy(z, labels, label_smoothing=SMOOTHING)
    moved = rows * (CLASSES * dtype.itemsize * (3 if kind == "distillation" else 2))

    def once(loss: Callable[[Tensor], Tensor]) -> object:
        return torch.autograd.grad(loss(logits), logits)

    return {name: partial(once, loss) for name, loss in losses.items()}, moved


def of_images(
    images: int, side: int, dtype: torch.dtype, device: torch.device, *, tiny: bool
) -> tuple[dict[str, Work], int]:
    """The same of mixup: each image blended with its partner in the reversed batch."""
    torch.manual_seed(0)
    batch = torch.randn(images, 3, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    reverse = torch.arange(images, device=device).flip(0)

    def theirs(x: Tensor) -> Tensor:
        return LAM * x + (1 - LAM) * x.flip(0)

    works = {
        OURS: partial(mixup, batch, reverse, LAM, pairs=True),
        "torch": partial(theirs, batch),
        COMPILED: partial(compiled(theirs, tiny=tiny), batch),
    }
    return works, 2 * batch.nbytes


def compiled(function: Callable[[Tensor], Tensor], *, tiny: bool) -> Callable[[Tensor], Tensor]:
    """torch.compile, of one size; in the walk without its C++ compiler, which takes half a minute."""
    return torch.compile(function, dynamic=False, backend="eager" if tiny else "inductor")


def compare(
    make: Callable[[], tuple[dict[str, Work], int]], device: torch.device, facts: Mapping[str, Any]
) -> Iterator[Row]:
    """A row for each contestant; they alternate. Ratios are its time over ours within a round, the median of five."""
    works, moved = make()
    errors = {}
    for name, work in list(works.items()):
        try:
            work()  # compiles
        except Exception:
            errors[name] = traceback.format_exc()
            del works[name]
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(1 + ROUNDS):
        for name, work in works.items():
            taken = device_seconds(work, device)
            if index:
                seconds[name].append(taken)
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        row: Row = {"contestant": name, "us on the device": middle * 1e6, "bytes/s": moved / middle}
        if copy_rate := facts.get(COPY_RATE):
            row["of the copy rate"] = moved / middle / copy_rate
        if OURS in seconds:
            row["its time / ours"] = statistics.median(t / o for t, o in zip(taken, seconds[OURS], strict=True))
        yield row | {"us of the host": host_seconds(works[name], device) * 1e6}
    yield from ({"contestant": name, "error": error} for name, error in errors.items())


def _distil_ours(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distillation_loss(logits, teacher, labels, smoothing=SMOOTHING, temperature=TEMPERATURE)


def _distil_torch(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    hard = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    target = (teacher / TEMPERATURE).softmax(1)
    return hard + TEMPERATURE**2 * F.kl_div((logits / TEMPERATURE).log_softmax(1), target, reduction="batchmean")
