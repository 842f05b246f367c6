"""Batch norm, the addition and ReLU, forward and backward: device time and bytes/s beside torch's, eager and compiled.

The bytes are those of the fused passes: 3 and 5 tensors of x's size, with a residual 4 and 7. A contestant that moves more shows
as a lower rate. The roof is the copy rate of the first part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu.child import attempt
from bench.gpu.clock import device_of
from bench.gpu.losses import COMPILED, DTYPES, OURS, Work, compare, compiled
from bench.gpu.parts import Job, Row
from fasttricks_kernels import batch_norm_act

SIZES = ((128, 64, 112, False), (128, 256, 56, True), (128, 128, 28, False), (128, 512, 28, True), (128, 2048, 7, True))
"""Images, channels, side, and whether a residual is added: of a ResNet-50-D."""
TINY = ((2, 8, 4, False), (2, 8, 4, True))


def measure(job: Job) -> Iterator[Row]:
    """Rows of each size, ours first."""
    device = device_of(job.device)
    for images, channels, side, added in TINY if job.tiny else SIZES:
        name = "fp32" if job.tiny else "fp16"
        size = {"size": f"{images} x {channels} x {side} x {side} {name}", "residual": "yes" if added else "no"}
        make = partial(works, (images, channels, side, side), DTYPES[name], device, with_residual=added, tiny=job.tiny)
        yield from attempt(size, partial(compare, make, device, job.facts))


def works(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, with_residual: bool, tiny: bool
) -> tuple[dict[str, Work], int]:
    """(Name -> a forward and backward pass, equal for all; the bytes of the fused one's passes)."""
    torch.manual_seed(0)
    x, residual, grad = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(3)
    )
    weight, bias = (torch.rand(shape[1], device=device, requires_grad=True) for _ in range(2))
    running = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    leaves = [x.requires_grad_(), weight, bias, *([residual.requires_grad_()] if with_residual else [])]
    added = residual if with_residual else None

    def ours(x: Tensor) -> Tensor:
        return batch_norm_act(
            x, weight, bias, *running, residual=added, act="relu", training=True, momentum=0.1, eps=1e-5
        )

    def theirs(x: Tensor) -> Tensor:
        y = F.batch_norm(x, *running, weight, bias, True, 0.1, 1e-5)
        return F.relu(y if added is None else y + added, inplace=True)

    def without_cudnn(x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return theirs(x)

    def once(layer: Callable[[Tensor], Tensor]) -> object:
        return torch.autograd.grad(layer(x), leaves, grad)

    layers = {
        OURS: ours,
        "torch": theirs,
        "torch without cuDNN": without_cudnn,
        COMPILED: compiled(theirs, tiny=tiny),
    }
    passes = 4 + 7 if with_residual else 3 + 5
    return {name: partial(once, layer) for name, layer in layers.items()}, passes * x.nbytes
