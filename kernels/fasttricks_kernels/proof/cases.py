"""The launches that are measured: every kernel at the shapes the project promises something about.

One list serves the byte ledger, the compile gate and the report. The launches take CPU tensors: the interpreter runs
them, and ahead-of-time compilation only looks at their dtypes and addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._launch import BLOCK
from ..images.augment import launch_augment
from ..images.mixup import launch_mixup
from ..losses._kernels import launch_cross_entropy, launch_distillation
from ..losses._options import Labels, Weights
from ..norm import _launches as norm
from ..norm._bits import empty_bits, fits_bits
from ..optim._kernels import launch_overflow, launch_sgd

CLASSES = (10, 100, 1000, 1001, 21843)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOSS_FORMS = ("loss_and_grad", "mixup", "forward", "backward")
"""forward writes the weights of the rows' labels too, as for a mean with an ignore_index."""
WEIGHTED_FORMS = ("class weights", "class weights, smoothed")
"""The forms of cross-entropy with class weights and mixup's pair: without smoothing the labels' weights are read, with it all."""
PLANE_FORMS = ("loss_and_grad", "class weights", "class weights, smoothed", "forward", "backward")
DENSE_FORMS = ("loss_and_grad", "class weights", "forward", "backward")
LOSSES: dict[str, tuple[Callable[..., object], int, tuple[Weights, ...]]] = {
    "cross_entropy": (launch_cross_entropy, 1, ()),
    "distillation": (launch_distillation, 2, (Weights(20.0, 1.0, 1.0),)),
}
"""A loss's launch, how many (N, K) tensors it reads, and its arguments after them and the labels."""


@dataclass(frozen=True)
class Case:
    """`run` launches the kernels once. `floor_bytes`: the least it can move. `wide`: 128-bit accesses are promised.

    `cached`: a small tensor that every program reads, so that a cache serves it; counted once in `floor_bytes`.
    `parts_bytes`: the parts of sums that one kernel writes and another reads; they are counted apart from the floor.
    """

    family: str
    shape: str
    dtype: str
    floor_bytes: int
    run: Callable[[], object]
    wide: bool = True
    cached: torch.Tensor | None = None
    parts_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.family}-{self.shape}-{self.dtype}"


def rows_a_launch(num_classes: int) -> int:
    """Enough rows to fill several programs and leave the last one a remainder; few, for the interpreter is slow."""
    return 3 + 4 * max(1, 1024 // num_classes) if num_classes < 1000 else 5


def loss_cases(loss: str, form: str) -> list[Case]:
    """One of LOSSES with smoothing, and a loss scale on the device, in one of LOSS_FORMS."""
    return [_loss_case(loss, form, k, dtype) for k in CLASSES for dtype in DTYPES]


def _loss_case(loss: str, form: str, num_classes: int, dtype: str) -> Case:
    launch, num_tensors, weights = LOSSES[loss]
    generator = torch.Generator().manual_seed(num_classes)
    num_rows = rows_a_launch(num_classes)
    shape = num_rows, num_classes
    rows = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(num_tensors)]
    target, target_b = torch.randint(num_classes, (2, num_rows), generator=generator)
    lam = torch.rand(num_rows, generator=generator)
    weighted, smoothed = form in WEIGHTED_FORMS, form != "class weights"
    second, lam_N = (target_b, lam) if form == "mixup" or weighted else (None, None)
    weight = torch.rand(num_classes, generator=generator) if weighted else None
    labels = Labels(target, second, lam_N, weight, uniform=0.1 if smoothed else 0.0)
    scale = {"backward": torch.ones(num_rows), "forward": None}.get(form, torch.tensor(1024.0))
    forward = form == "forward"
    wanted = {
        "want_loss": form != "backward",
        "want_grad": not forward,
        "label_weight_N": torch.empty(num_rows) if forward else None,
    }
    row_bytes = num_classes * rows[0].element_size()
    floor = (num_tensors + (not forward)) * row_bytes + (12 if second is None else 24) + 4 * forward
    floor = num_rows * (floor + 8 * weighted)  # the weights of two labels
    return Case(
        f"{loss} {form}",
        f"K={num_classes}",
        dtype,
        floor + 4 * num_classes * (weighted and smoothed),
        lambda: launch(*rows, labels, *weights, scale, **wanted),
        wide=row_bytes >= 1024,
        cached=weight if smoothed else None,
    )


def dense_cases() -> list[Case]:
    """Cross-entropy of smoothed dense targets, with class weights and without."""
    longest = {"class weights": BLOCK}  # of longer rows torch's operator takes them
    return [
        _dense_case(form, k, dtype)
        for form in DENSE_FORMS
        for k in CLASSES
        for dtype in DTYPES
        if k <= longest.get(form, k)
    ]


def _dense_case(form: str, num_classes: int, dtype: str) -> Case:
    generator = torch.Generator().manual_seed(num_classes)
    shape = rows_a_launch(num_classes), num_classes
    logits, target = (torch.rand(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    weight = torch.rand(num_classes, generator=generator) if form == "class weights" else None
    labels = Labels(target, None, None, weight, uniform=0.1)
    scale = {"backward": torch.ones(shape[0]), "forward": None}.get(form, torch.tensor(1024.0))
    wanted = {"want_loss": form != "backward", "want_grad": form != "forward"}
    row_bytes = num_classes * logits.element_size()
    return Case(
        f"cross_entropy dense {form}",
        f"K={num_classes}",
        dtype,
        shape[0] * ((2 + wanted["want_grad"]) * row_bytes + 4) + (0 if weight is None else 4 * num_classes),
        lambda: launch_cross_entropy(logits, labels, scale, **wanted),
        wide=row_bytes >= 1024,
        cached=weight,
    )


def plane_cases() -> list[Case]:
    """Cross-entropy of (N, K, P) logits: segmentation's numbers of classes, held and, of 1000, read again."""
    return [
        _plane_case(form, *shape, dtype)
        for form in PLANE_FORMS
        for shape in ((21, 336), (150, 136), (1000, 128))
        for dtype in DTYPES
    ]


def _plane_case(form: str, num_classes: int, num_pixels: int, dtype: str) -> Case:
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(2, num_classes, num_pixels, generator=generator).to(DTYPES[dtype])
    target = torch.randint(num_classes, (2, num_pixels), generator=generator)
    weight = torch.rand(num_classes, generator=generator) if "weights" in form else None
    smoothed = form != "class weights"
    read = () if weight is None else weight if smoothed else target.unique()  # the classes whose weights are needed
    labels = Labels(target, None, None, weight, uniform=0.1 if smoothed else 0.0, ignore_index=-100)
    scale = {"backward": torch.ones(2, num_pixels), "forward": None}.get(form, torch.tensor(1024.0))
    forward = form == "forward"
    wanted = {
        "want_loss": form != "backward",
        "want_grad": not forward,
        "label_weight_N": torch.empty(2, num_pixels) if forward else None,
    }
    tensors = (2 - forward) * logits.numel() * logits.element_size()
    return Case(
        f"cross_entropy planes {form}",
        f"K={num_classes}",
        dtype,
        tensors + (12 + 4 * forward) * target.numel() + 4 * len(read),
        lambda: launch_cross_entropy(logits, labels, scale, **wanted),
        cached=weight,
    )


def mixup_cases() -> list[Case]:
    """Blending with the reversed batch, by pairs and as any permutation; 3 x 32 x 32 images, the last block short."""
    return [_mixup_case(pairs, dtype) for pairs in (True, False) for dtype in DTYPES]


def _mixup_case(pairs: bool, dtype: str) -> Case:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    floor = 2 * images.numel() * images.element_size()
    return Case(
        f"mixup {'pairs' if pairs else 'any permutation'}",
        "3x32x32",
        dtype,
        floor,
        lambda: launch_mixup(images, torch.arange(4).flip(0), None, 0.3, pairs),
    )


BATCH_NORMS = {64: (2, 32, 33), 256: (32, 7, 7), 100: (2, 64, 33)}
"""Channels -> images, height, width: two programs down; a ResNet-50's last stage at batch 32; no power of two."""


BATCH_NORM_FORMS = {
    "values": 3,
    "values with a residual": 4,
    "gradients": 5,
    "gradients with a residual": 6,
    "gradients of a fork": 7,
    "gradients of a fork with a residual": 7,
}
"""A form -> its passes over a tensor of x's size. With a residual the mask's bytes come on top: one for 16 bytes of x."""


def batch_norm_cases() -> list[Case]:
    """In training with ReLU, and with a residual too: x to y, and the gradients of y to those of the inputs."""
    return [
        _batch_norm_case(form, channels, images, dtype)
        for form in BATCH_NORM_FORMS
        for channels, images in BATCH_NORMS.items()
        for dtype in DTYPES
    ]


def _batch_norm_case(form: str, channels: int, images: tuple[int, int, int], dtype: str) -> Case:
    backward, has_residual, fork = form.startswith("gradients"), "residual" in form, "fork" in form
    number, height, width = images
    shape = number, height, width, channels
    x, y, residual, second = (torch.zeros(shape, dtype=DTYPES[dtype]).movedim(-1, 1) for _ in range(4))
    mask = empty_bits(x).zero_() if fits_bits(x) else y
    weight, bias, mean, var = (torch.ones(channels) for _ in range(4))
    numbers_4C = torch.ones(4, channels)
    options = norm.Options("relu", True, 0.1, 1e-5)

    def run() -> object:
        if backward:
            grads, kept = (residual, second if fork else None), mask if has_residual else None
            return norm.launch_backward(*grads, x, kept, numbers_4C, options)
        of_channels = weight, bias, mean, var
        return norm.launch_forward(x, *of_channels, residual if has_residual else None, None, options, has_residual)

    parts = norm.tiles_of(x).grid[0]
    # weight, bias, and the running statistics as they were and as they are; or the gradients of weight and bias
    numbers = 2 if backward else 6
    # the parts' numbers a channel; the means are read a second time, for distances from the mean of all
    written, read = (2 * parts, 2 * parts) if backward else (3 * parts, 5 * parts + 1)
    of_mask = mask.nbytes if has_residual and (backward or mask is not y) else 0  # forward writes y anyway
    return Case(
        f"batch_norm_act {form}",
        f"C={channels}",
        dtype,
        BATCH_NORM_FORMS[form] * x.nbytes + of_mask + numbers * channels * 4,
        run,
        wide=channels % 8 == 0,
        parts_bytes=(written + read) * channels * 4,
    )


def sgd_cases() -> list[Case]:
    """The step, with momentum, and without and the rate on the device, on tensors that fill blocks and leave tails; overflow."""
    return [_sgd_case(kind, dtype) for kind in ("step", "step without momentum", "overflow") for dtype in DTYPES]


def _sgd_case(kind: str, dtype: str) -> Case:
    counts = (8192, 6000, 4096)
    low = DTYPES[dtype]
    weights, grads = ([torch.rand(n).to(low) for n in counts] for _ in range(2))
    masters = [] if dtype == "fp32" else [w.float() for w in weights]
    momenta = [torch.zeros(n) for n in counts] if kind == "step" else []
    size = weights[0].element_size()
    if kind == "overflow":
        return Case("sgd overflow", "3 tensors", dtype, sum(counts) * size, lambda: launch_overflow(grads))
    # FP32: gradient, weight and momentum, of which two are written; 16 bits: the same with a master, and the weight written
    bytes_each = (12 if masters else 4 + 8) + (8 if momenta else 0)
    options = 0.1, 0.9 if momenta else 0.0, 0.0, 1e-4, bool(momenta), False
    scalars = torch.tensor(1.0), torch.zeros(()), None if momenta else torch.tensor(0.1)
    return Case(
        f"sgd {kind}",
        "3 tensors",
        dtype,
        sum(counts) * bytes_each,
        lambda: launch_sgd(weights, grads, masters, momenta, *options, *scalars),
    )


def augment_cases() -> list[Case]:
    """Colour and flip; with mixup of the reversed batch by pairs; with any permutation. The last block is short."""
    return [_augment_case(kind, dtype) for kind in ("alone", "pairs", "any permutation") for dtype in DTYPES]


def _augment_case(kind: str, dtype: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 50, 99, 3), dtype=torch.uint8, generator=generator)
    matrix, flip = torch.rand(4, 3, 4, generator=generator), torch.tensor([True, False, True, True])
    permutation = None if kind == "alone" else torch.arange(4).flip(0)
    floor = images.numel() * (1 + torch.empty(0, dtype=DTYPES[dtype]).element_size())
    return Case(
        f"augment {kind}",
        "50x99",
        dtype,
        floor,
        lambda: launch_augment(images, matrix, flip, permutation, None, 0.3, kind == "pairs", DTYPES[dtype]),
        wide=False,  # three interleaved bytes a pixel
    )


def every_case() -> list[Case]:
    """Every kernel's cases, for report, ledger and compile gate: here a new kernel is added."""
    return [
        *(case for loss in LOSSES for form in LOSS_FORMS for case in loss_cases(loss, form)),
        *(case for form in WEIGHTED_FORMS for case in loss_cases("cross_entropy", form)),
        *dense_cases(),
        *plane_cases(),
        *mixup_cases(),
        *augment_cases(),
        *batch_norm_cases(),
        *sgd_cases(),
    ]
