"""The kernels against float64, within bounds that are derived from their roundings: on a GPU, and interpreted on the CPU.

Each check returns its largest error as a share of its bound, so that a bound can be shown to be no looser than it must be.
Triton is told to fuse no multiplication with an addition (PINNED), so every operation rounds once, on each device alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from bench.no_sync import no_sync
from fasttricks_kernels import reference
from fasttricks_kernels._launch import INTERPRETED

U = 2.0**-24
"""Half of float32's relative spacing: one rounding's largest relative error."""
# The interpreter truncates to bfloat16 where the GPU rounds to nearest: one whole step instead of half of one.
STEP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float32: 0.0}
"""The same of storing a float32 value in each dtype."""
DTYPES = list(STEP)
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 0.0, torch.float32: 0.0}
"""Half of the spacing below the normal numbers. Those of the wide dtypes are too small to occur."""


def quiet(device: str) -> AbstractContextManager[object]:
    """On a GPU, a wait for it is an error."""
    return no_sync() if device == "cuda" else nullcontext()


def roundings(*steps: float) -> float:
    """The largest relative error of a value that is rounded so many times, each by at most its step."""
    return prod(1 + step for step in steps) - 1


def share(error: Tensor, bound: Tensor | float) -> float:
    """The largest error over its bound."""
    return float((error.abs() / bound).max())


def check_images(dtype: torch.dtype, device: str, side: int = 224) -> dict[str, float]:
    """augment, alone and with the partner in the same pass, and mixup by pairs.

    Nothing here is negative, so a value's relative error is at most that of the term that is rounded most often.
    Alone, ((m0 r + m1 g) + m2 b) + m3: m0 r is rounded as a product and in three sums, 4 times. Blended, lam a + (1 - lam) b:
    a product and a sum more, 6. torch.rand gives multiples of 2^-24, for which 1 - lam is exact. Then one rounding to `dtype`.
    """
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (6, side, side, 3), dtype=torch.uint8, generator=generator).to(device)
    matrix = (torch.rand(6, 3, 4, generator=generator) / 255).to(device)
    reverse, lam = torch.arange(6).flip(0).to(device), torch.rand(6, generator=generator).to(device)
    plain = reference.augment(raw, matrix.double(), None, None, 1.0, torch.float64)
    mixed = reference.mixup(plain, reverse, lam.double())

    def run() -> tuple[Tensor, Tensor, Tensor]:
        alone = fk.augment(raw, matrix, dtype=dtype)
        both = fk.augment(raw, matrix, permutation=reverse, lam=lam, pairs=True, dtype=dtype)
        return alone, both, fk.mixup(alone, reverse, lam, pairs=True)

    run()  # compiles
    with quiet(device):
        results = run()
    step, shares = STEP[dtype], {}
    bounds = {"alone": (U,) * 4 + (step,), "both": (U,) * 6 + (step,), "mixup": (U,) * 6 + (step, step)}
    for (name, steps), ours, truth in zip(bounds.items(), results, (plain, mixed, mixed), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        shares[name] = share(ours.double() - truth, roundings(*steps) * truth + 2 * SMALLEST[dtype])
    return shares


def check_losses(num_classes: int, dtype: torch.dtype, device: str, rows: int = 65) -> dict[str, float]:
    """Loss and gradient of both losses under mixup, smoothing and a loss scale on the device.

    A sum over a row has at most 12 levels within a chunk and 6 chunks; exp and log are right to 2 units of the last place,
    4 roundings. So a logarithm of a sum of exponentials has at most 26 roundings, and an exponential of magnitude e^-a the 4 |a|
    of its argument too.

    Loss: the 26, 18 of the second sum over the row, 7 of the mean over rows, few of the weights; of parts that are no larger
    than the loss. 64 with what is left over.
    Gradient: a difference of the student's probabilities and the target's, each with 28 roundings and 4 |log of it|; then one
    rounding of the difference, and one to `dtype`.
    These are worst cases: most of a sum's roundings cancel.
    """
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, rows, num_classes, generator=generator)).to(device, dtype).unbind()
    target, target_b = torch.randint(num_classes, (2, rows), generator=generator).to(device).unbind()
    pair = {"target_b": target_b, "lam": torch.rand(rows, generator=generator).to(device)}
    scale = torch.tensor(64.0, device=device)
    options: dict[str, Any] = {"smoothing": 0.1, "loss_scale": scale, **pair}
    z, t, lam = logits.double().requires_grad_(), teacher.double(), pair["lam"].double()
    hard, hard_b = (F.cross_entropy(z, y, label_smoothing=0.1, reduction="none") for y in (target, target_b))
    mixed = lam * hard + (1 - lam) * hard_b
    soft = F.cross_entropy(z / 20, (t / 20).softmax(1), reduction="none")
    student, softer, teachers = (x.log_softmax(1).detach() for x in (z, z / 20, t / 20))
    ends = one_hot_mixture(target, target_b, lam, num_classes)
    parts = 28 * ends + of_exponential(student)
    soft_parts = 20 * (of_exponential(softer) + of_exponential(teachers))
    one_pass: dict[str, tuple[Tensor, Tensor, Callable[[], tuple[Tensor, Tensor]]]] = {
        "cross_entropy": (mixed, parts, lambda: fk.cross_entropy_loss_and_grad(logits, target, **options)),
        "distillation": (
            mixed + 400 * soft,
            parts + soft_parts,
            lambda: fk.distillation_loss_and_grad(logits, teacher, target, **options),
        ),
    }
    shares = {}
    for name, (truth, rounded, run) in one_pass.items():
        (wanted,) = torch.autograd.grad(64 * truth.mean(), z, retain_graph=True)
        run()  # compiles
        with quiet(device):
            loss, grad = run()
        shares[f"{name} loss"] = share(loss.double() - truth.mean().detach(), 64 * U * truth.mean().detach())
        bound = roundings(U, STEP[dtype]) * wanted.abs() + U * 64 / rows * rounded + SMALLEST[dtype]
        shares[f"{name} gradient"] = share(grad.double() - wanted, bound)
        assert torch.equal(run()[1], grad)  # bit for bit
    return shares


def of_exponential(logs: Tensor) -> Tensor:
    """Roundings of exp(logs), each at most the value's own size, times that value."""
    return logs.exp() * (28 + 4 * logs.abs())


def one_hot_mixture(target: Tensor, target_b: Tensor, lam: Tensor, num_classes: int) -> Tensor:
    """(N, K) float64: the smoothed and mixed target distribution."""
    a, b = (F.one_hot(y, num_classes).double() for y in (target, target_b))
    return 0.9 * (lam[:, None] * a + (1 - lam[:, None]) * b) + 0.1 / num_classes


def check_sgd(dtype: torch.dtype, device: str, sizes: tuple[int, ...] = (1, 17, 1024, 100_003)) -> dict[str, float]:
    """Three steps and a skipped one, tails included, against torch.optim.SGD in float64.

    A step rounds the weight once. The change that it subtracts, here below 1, has at most 10 roundings, those of lr, momentum
    and decay to float32 among them. Over three steps: 3 of the weight, and 30 of at most 1. The weight is the master's nearest.
    """
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]
    ours = [s.clone().requires_grad_() for s in starts]
    theirs = [s.double().requires_grad_() for s in starts]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    master, sgd = fk.MasterSGD(ours, **options), torch.optim.SGD(theirs, **options)
    scale = torch.tensor(8.0, device=device)
    largest = 0.0
    for step in range(4):
        before = [b.detach().clone() for b in theirs]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(len(a), generator=generator).to(device, dtype)
            b.grad = a.grad.double() / 8
        if step == 2:
            ours[-1].grad[-1] = torch.inf  # type: ignore[index]
        else:
            sgd.step()
        with quiet(device) if step else nullcontext():  # the first compiles, and makes the masters
            master.step(loss_scale=scale)
        assert bool(master.overflow == 1) == (step == 2)
        largest = max(largest, *(float((b.detach() - old).abs().max()) for b, old in zip(theirs, before, strict=True)))
    assert 0.1 < largest < 1, "the change that the bound is of"
    shares = {}
    for size, a, b in zip(sizes, ours, theirs, strict=True):
        exact = master.state[a].get("master", a).detach()
        shares[str(size)] = share(exact.double() - b.detach(), roundings(*(U,) * 3) * b.detach().abs() + 30 * U)
        if not (INTERPRETED and dtype == torch.bfloat16):
            assert torch.equal(a.detach(), exact.to(dtype))
    return shares
