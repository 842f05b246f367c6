"""The kernels on a GPU: values against float64, and no wait for the device. Skipped, aloud, where there is none.

Time is bench.kernels' business; what can be known without a card is in the other test_kernels files.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import fasttricks_kernels as fk
from bench.no_sync import no_sync
from fasttricks_kernels import reference

pytestmark = pytest.mark.gpu
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
DTYPES = pytest.mark.parametrize("dtype", list(STEP), ids=str)


@DTYPES
@pytest.mark.parametrize("num_classes", [10, 1000, 1001, 21843])
def test_losses(num_classes: int, dtype: torch.dtype) -> None:
    """Loss and gradient of both losses under mixup, smoothing and a loss scale on the device."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 65, num_classes, generator=generator)).to("cuda", dtype).unbind()
    target, target_b = torch.randint(num_classes, (2, 65), generator=generator).cuda().unbind()
    pair = {"target_b": target_b, "lam": torch.rand(65, generator=generator).cuda()}
    scale = torch.tensor(64.0, device="cuda")
    z, t, lam = logits.double().requires_grad_(), teacher.double(), pair["lam"].double()
    hard, hard_b = (F.cross_entropy(z, y, label_smoothing=0.1, reduction="none") for y in (target, target_b))
    mixed = lam * hard + (1 - lam) * hard_b
    soft = F.cross_entropy(z / 20, (t / 20).softmax(1), reduction="none")
    for truth, one_pass in (
        (mixed, lambda: fk.cross_entropy_loss_and_grad(logits, target, smoothing=0.1, loss_scale=scale, **pair)),
        (
            mixed + 400 * soft,
            lambda: fk.distillation_loss_and_grad(logits, teacher, target, smoothing=0.1, loss_scale=scale, **pair),
        ),
    ):
        (grad,) = torch.autograd.grad(64 * truth.mean(), z, retain_graph=True)
        one_pass()  # compiles
        with no_sync():
            loss, ours = one_pass()
        torch.testing.assert_close(loss.double(), truth.mean().detach(), rtol=1e-5, atol=1e-5)
        terms = 64 * 21 / 65 * 2**-22  # float32's rounding of what the gradient is a difference of
        assert ((ours.double() - grad).abs() <= 2 * STEP[dtype] * grad.abs() + terms + 2**-25).all()
        assert torch.equal(one_pass()[1], ours)  # bit for bit


@DTYPES
def test_images(dtype: torch.dtype) -> None:
    """augment, alone and with the partner in the same pass, and mixup by pairs, at ImageNet's size."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (6, 224, 224, 3), dtype=torch.uint8, generator=generator).cuda()
    matrix = (torch.rand(6, 3, 4, generator=generator) / 255).cuda()
    reverse, lam = torch.arange(6).flip(0).cuda(), torch.rand(6, generator=generator).cuda()
    plain = reference.augment(raw, matrix.double(), None, None, 1.0, torch.float64)
    mixed = reference.mixup(plain, reverse, lam.double())

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        alone = fk.augment(raw, matrix, dtype=dtype)
        both = fk.augment(raw, matrix, permutation=reverse, lam=lam, pairs=True, dtype=dtype)
        return alone, both, fk.mixup(alone, reverse, lam, pairs=True)

    run()
    with no_sync():
        results = run()
    for ours, truth, roundings in zip(results, (plain, mixed, mixed), (2, 2, 4), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert ((ours.double() - truth).abs() <= roundings * STEP[dtype] * truth.abs().clamp(min=1)).all()


@DTYPES
def test_sgd(dtype: torch.dtype) -> None:
    """Steps and a skipped one, tails included, against torch.optim.SGD in float64."""
    starts = [torch.randn(n, device="cuda").to(dtype) for n in (1, 17, 1024, 100_003)]
    ours = [s.clone().requires_grad_() for s in starts]
    theirs = [s.double().requires_grad_() for s in starts]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    master, sgd = fk.MasterSGD(ours, **options), torch.optim.SGD(theirs, **options)
    scale = torch.tensor(8.0, device="cuda")
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(len(a), device="cuda").to(dtype)
            b.grad = a.grad.double() / 8
        if step == 2:
            ours[-1].grad[-1] = torch.inf
        else:
            sgd.step()
        if step:
            with no_sync():
                master.step(loss_scale=scale)
        else:
            master.step(loss_scale=scale)  # compiles, makes the masters
        assert bool(master.overflow == 1) == (step == 2)
    for a, b in zip(ours, theirs, strict=True):
        exact = master.state[a].get("master", a).detach()
        torch.testing.assert_close(exact.double(), b.detach(), rtol=1e-5, atol=1e-6)


def test_a_bad_label_is_a_row_of_nan_and_no_error() -> None:
    logits = torch.randn(3, 10, device="cuda", dtype=torch.float16)
    loss = fk.cross_entropy(logits, torch.tensor([0, 10, -1], device="cuda"), ignore_index=None, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
