"""The Triton kernels' numerics, under the interpreter, against float64.

A kernel may be as wrong as the plain torch code that it replaces, in the same dtype, and a rounding more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks_kernels import reference
from lib.interpreter import interpreted
from lib.tables import covering

# One class; a part of one program's tile; a tile of several rows; 16-byte rows; none; a row of several chunks.
CLASSES = [1, 10, 100, 1000, 1001, 4099]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
SAMPLE = [torch.float16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in FLOATS[1:])]
"""One dtype, and the others among the slow tests."""
# The interpreter truncates to bfloat16 where the GPU rounds to nearest: one whole step instead of half of one.
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-24}


def draw(num_rows: int, num_classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, two labels and lam."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, num_classes, generator=generator)).to(dtype)
    target, target_b = torch.randint(num_classes, (2, num_rows), generator=generator)
    return logits, target, target_b, torch.rand(num_rows, generator=generator)


def loss_and_grad(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    losses = loss(leaf)
    losses.sum().backward()
    return losses.detach().double(), leaf.grad.double()


def assert_as_good_as_torch(ours: Callable, plain: Callable, logits: Tensor, terms: float = 0.0) -> None:
    """Losses and gradients of `ours` against `plain` in float64, allowed plain's own error in the logits' dtype.

    terms: size of what the gradient is a difference of, where that is larger than the gradient; float32 rounds it.
    """
    untouched = logits.clone()
    truth = loss_and_grad(plain, logits.double())
    theirs = loss_and_grad(lambda z: plain(z.float()), logits)
    # A loss is one sum over the row: its largest term is rounded again at each of the about 8 levels of the sum.
    steps = (8 * STEP[torch.float32], 2 * STEP[logits.dtype])
    for value, their_value, true_value, step in zip(loss_and_grad(ours, logits), theirs, truth, steps, strict=True):
        allowed = (their_value - true_value).abs().max() + step * true_value.abs().max() + terms * 2**-23
        assert (value - true_value).abs().max() <= allowed, (value - true_value).abs().max() / allowed
    assert torch.equal(logits, untouched)


def torch_pair(target: Tensor, target_b: Tensor, lam: Tensor, smoothing: float) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        a, b = (F.cross_entropy(z, t, label_smoothing=smoothing, reduction="none") for t in (target, target_b))
        return lam * a + (1 - lam) * b

    return loss


@pytest.mark.parametrize(("num_classes", "dtype"), covering(CLASSES, FLOATS), ids=str)
@interpreted
def test_cross_entropy(num_classes: int, dtype: torch.dtype) -> None:
    logits, target, target_b, lam = draw(5, num_classes, dtype)
    for smoothing in (0.0, 0.1):
        assert_as_good_as_torch(
            lambda z, s=smoothing: fk.cross_entropy(z, target, smoothing=s, reduction="none"),
            lambda z, s=smoothing: F.cross_entropy(z, target, label_smoothing=s, reduction="none"),
            logits,
        )
    assert_as_good_as_torch(
        lambda z: fk.cross_entropy(z, target, smoothing=0.1, target_b=target_b, lam=lam, reduction="none"),
        torch_pair(target, target_b, lam, 0.1),
        logits,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [21843, 40003])  # ImageNet-21k; a row too long for registers, read again
@interpreted
def test_cross_entropy_of_long_rows(num_classes: int) -> None:
    logits, target, _, _ = draw(3, num_classes, torch.float16)
    logits[0, :4096] = -torch.inf  # a first chunk with nothing in it
    target[0] = num_classes - 1
    assert_as_good_as_torch(
        lambda z: fk.cross_entropy(z, target, reduction="none"),
        lambda z: F.cross_entropy(z, target, reduction="none"),
        logits,
    )


@pytest.mark.parametrize(("num_classes", "dtype"), covering([1, 10, 1000, 1001, 4099], FLOATS), ids=str)
@interpreted
def test_distillation(num_classes: int, dtype: torch.dtype) -> None:
    logits, target, target_b, lam = draw(4, num_classes, dtype)
    teacher = draw(4, num_classes, dtype, seed=1)[0]

    def plain(z: Tensor) -> Tensor:
        soft = F.cross_entropy(z / 20, (teacher.to(z.dtype) / 20).softmax(1), reduction="none")
        return 0.7 * torch_pair(target, target_b, lam, 0.1)(z) + 0.4 * 20**2 * soft

    assert_as_good_as_torch(
        lambda z: fk.distillation_loss(
            z,
            teacher,
            target,
            hard_weight=0.7,
            soft_weight=0.4,
            smoothing=0.1,
            target_b=target_b,
            lam=lam,
            reduction="none",
        ),
        plain,
        logits,
        terms=0.4 * 20,
    )


@pytest.mark.parametrize("num_classes", [10, 1000, 1001])
@interpreted
def test_loss_scale_multiplies_before_rounding(num_classes: int) -> None:
    """At batch 2048 a mean's gradient rounded to FP16 first, then scaled, is up to 36 % off, or 0; ours 0.05 %."""
    logits, target, _, _ = draw(8, num_classes, torch.float16)
    batch, scale = 2048, 2.0**15
    wide = logits.double().requires_grad_()
    (F.cross_entropy(wide, target, label_smoothing=0.1, reduction="sum") / batch * scale).backward()
    truth = wide.grad
    off_target = torch.ones_like(truth, dtype=torch.bool).scatter_(1, target[:, None], False)
    for make in ("float", "tensor"):
        loss_scale = scale / batch if make == "float" else torch.tensor(scale / batch)
        loss, grad = fk.cross_entropy_loss_and_grad(
            logits, target, smoothing=0.1, reduction="sum", loss_scale=loss_scale
        )
        error = ((grad.double() - truth) / truth).abs()[off_target & (truth.abs() > 2**-14)]
        assert error.max() <= 5e-4
        assert (grad == 0).sum() <= (truth.abs() < 2**-25).sum()
    rounded_first = (truth / scale).half().double() * scale  # what the figures in the docstring are of
    assert ((rounded_first - truth) / truth).abs()[off_target].max() > 0.05
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target, label_smoothing=0.1, reduction="sum"))


@interpreted
def test_loss_and_grad_is_the_autograd_pair_in_one_pass() -> None:
    logits, target, target_b, lam = draw(6, 37, torch.float32)
    teacher = draw(6, 37, torch.float32, seed=1)[0]
    target[2] = -100
    target_b[2] = target_b[4] = -100
    options: dict[str, Any] = {
        "target_b": target_b,
        "lam": lam,
        "smoothing": 0.1,
        "smoothing_over": "others",
        "ignore_index": -100,
    }
    for reduction in ("mean", "sum"):
        for pair, one_pass in (
            (fk.cross_entropy, fk.cross_entropy_loss_and_grad),
            (
                lambda z, t, **o: fk.distillation_loss(z, teacher, t, temperature=3, **o),
                lambda z, t, **o: fk.distillation_loss_and_grad(z, teacher, t, temperature=3, **o),
            ),
        ):
            leaf = logits.clone().requires_grad_()
            expected = pair(leaf, target, reduction=reduction, **options)
            expected.backward()
            loss, grad = one_pass(logits, target, reduction=reduction, loss_scale=torch.tensor(8.0), **options)
            torch.testing.assert_close(loss, expected.detach())
            torch.testing.assert_close(grad, 8 * leaf.grad)


@pytest.mark.parametrize("num_classes", [7, 1001])
@interpreted
def test_hard_rows(num_classes: int) -> None:
    """Rows of -inf, of one value, of 6e4, of NaN; labels that are ignored or wrong. A bad row spoils no other."""
    logits, target, _, _ = draw(9, num_classes, torch.float16)
    logits[0, 1:] = -torch.inf
    target[0] = 0
    logits[1, 0] = -torch.inf
    target[1] = 0
    logits[2] = 1.5
    logits[3] = 6e4
    logits[4] = torch.linspace(-6e4, 6e4, num_classes)
    logits[5], target[5] = torch.nan, -100
    logits[6] = -torch.inf
    target[7] = num_classes
    target[8] = -1
    leaf = logits.clone().requires_grad_()
    losses = fk.cross_entropy(leaf, target, reduction="none")
    losses.sum().backward()
    wide = logits[:5].double().requires_grad_()
    expected = F.cross_entropy(wide, target[:5], reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses[:5].double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:5].double(), wide.grad, rtol=2**-10, atol=1e-7)
    assert losses[5] == 0 and (leaf.grad[5] == 0).all()
    assert losses[6:].isnan().all() and leaf.grad[6:].isnan().all()


@interpreted
def test_smoothed_large_logits_keep_their_digits() -> None:
    logits = (6e4 + 8 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))).clamp(max=65000).half()
    target = torch.arange(4)
    assert_as_good_as_torch(
        lambda z: fk.cross_entropy(z, target, smoothing=0.1, reduction="none"),
        lambda z: F.cross_entropy(z, target, label_smoothing=0.1, reduction="none"),
        logits,
    )


@interpreted
def test_pairs_at_the_ends_of_lam() -> None:
    logits, target, target_b, _ = draw(5, 1001, torch.float32)
    alone = [fk.cross_entropy(logits, t, reduction="none") for t in (target, target_b)]
    for lam, expected in ((1.0, alone[0]), (0.0, alone[1]), (torch.tensor(1.0), alone[0])):
        torch.testing.assert_close(
            fk.cross_entropy(logits, target, target_b=target_b, lam=lam, reduction="none"), expected
        )
    same = fk.cross_entropy(logits, target, target_b=target, lam=0.3, reduction="none")
    torch.testing.assert_close(same, alone[0])
    outside = torch.tensor([0.5, 1.5, -0.1, float("nan"), 1.0])
    nan = fk.cross_entropy(logits, target, target_b=target_b, lam=outside, reduction="none").isnan()
    assert nan.tolist() == [False, True, True, True, False]


@interpreted
def test_views_and_empty_batches() -> None:
    """Sliced and misaligned logits, strided labels, int32 labels, a class stride that is not 1, no rows at all."""
    wide, labels, _, _ = draw(6, 1024, torch.float16)
    labels = labels % 900
    strided = torch.stack([labels, labels], 1)[:, 0]
    views = (
        wide[:, 3:1004],
        wide[::2, 8:1008],
        wide[1:, :1000],
        wide.t().contiguous().t()[:, :1001],
        wide.flatten()[1:5001].view(5, 1000),
        wide[:1, :1000].expand(4, 1000),
    )
    for logits in views:
        target = strided[: len(logits)].int()
        assert_as_good_as_torch(
            lambda z, t=target: fk.cross_entropy(z, t, reduction="none"),
            lambda z, t=target: F.cross_entropy(z, t.long(), reduction="none"),
            logits,
        )
        teacher = logits.flip(1)
        got = fk.distillation_loss(logits, teacher, target, reduction="none")
        whole = fk.distillation_loss(logits.contiguous(), teacher.contiguous(), target, reduction="none")
        # rows of another stride may be cut in other places, so their sums in another order
        torch.testing.assert_close(got, whole, rtol=8 * STEP[torch.float32], atol=0)
    empty, none = wide[:0, :1000], labels[:0]
    assert fk.cross_entropy(empty, none, reduction="none").shape == (0,)
    assert fk.cross_entropy(empty, none).isnan()
    loss, grad = fk.cross_entropy_loss_and_grad(empty, none)
    assert loss.isnan() and grad.shape == (0, 1000)
    assert fk.distillation_loss(empty, empty, none, reduction="sum") == 0
    assert fk.mixup(torch.zeros(0, 3, 4, 4), none, 0.5).shape == (0, 3, 4, 4)


@interpreted
def test_reads_and_writes_stay_inside_the_tensors() -> None:
    """Neighbours on both sides of the logits and of nothing else are read; a wild store would show in them."""
    from fasttricks_kernels.proof.ledger import ledger

    for num_classes in (10, 1001):
        around = torch.zeros(3 + 2 * 1024, num_classes, dtype=torch.float16)
        logits = around[1024:1027]
        with ledger() as book:
            fk.cross_entropy(logits, torch.arange(3), reduction="none")
        addresses = torch.from_numpy(__import__("numpy").concatenate(book.load_spans))
        start, end = logits.data_ptr(), logits.data_ptr() + 3 * num_classes * 2
        of_logits = addresses[(addresses >= around.data_ptr()) & (addresses < around[-1].data_ptr())]
        assert len(of_logits) == end - start
        assert of_logits.min() == start and of_logits.max() == end - 1


@interpreted
def test_twice_differentiable_and_reusable() -> None:
    logits, target, _, _ = draw(4, 12, torch.float32)
    leaf = logits.clone().requires_grad_()
    loss = fk.cross_entropy(leaf, target, smoothing=0.1)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    first.square().sum().backward()
    wide = logits.double().requires_grad_()
    (wide_first,) = torch.autograd.grad(F.cross_entropy(wide, target, label_smoothing=0.1), wide, create_graph=True)
    wide_first.square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)
    again = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    both = torch.autograd.grad(loss + fk.cross_entropy(leaf, target), leaf)[0]
    torch.testing.assert_close(again, first.detach())
    assert torch.equal(leaf.detach(), logits) and not torch.equal(both, again)


@pytest.mark.parametrize("dtype", SAMPLE, ids=str)
@interpreted
def test_mixup(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    flip = torch.arange(5).flip(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.rand(5, 3, 29, 31, generator=generator).to(dtype).contiguous(memory_format=layout)
        before = images.clone()
        for permutation, pairs in ((flip, True), (flip, False), (torch.tensor([1, 2, 0, 4, 3]).int(), False)):
            for lam in (0.3, torch.tensor(0.3), torch.rand(5, generator=generator)):
                share = lam.double()[:, None, None, None] if isinstance(lam, Tensor) and lam.dim() else float(lam)
                truth = share * images.double() + (1 - share) * images.double()[permutation.long()]
                mixed = fk.mixup(images, permutation, lam, pairs=pairs)
                assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=layout)
                assert ((mixed.double() - truth).abs() <= STEP[dtype] * 2 + 1e-7).all()
        assert torch.equal(images, before)


@interpreted
def test_mixup_marks_what_it_cannot_blend() -> None:
    images = torch.ones(4, 3, 4, 4)
    bad = fk.mixup(images, torch.tensor([0, 9, 2, -1]), 0.5).isnan().flatten(1).all(1)
    assert bad.tolist() == [False, True, False, True]
    bad = fk.mixup(images, torch.tensor([0, 9, 2, -1]), 0.5, pairs=True).isnan().flatten(1).all(1)
    assert bad.tolist() == [False, True, False, True]
    cycle = fk.mixup(images, torch.tensor([1, 2, 0, 3]), 0.5, pairs=True).isnan().flatten(1).all(1)
    assert cycle.tolist() == [True, True, True, False]
    assert fk.mixup(images, torch.arange(4), torch.tensor([0.5, 2, 1, 0])).isnan().flatten(1).all(1).tolist() == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("dtype", SAMPLE, ids=str)
@interpreted
def test_augment(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 37, 61, 3), dtype=torch.uint8, generator=generator)
    matrix = torch.rand(4, 3, 4, generator=generator) / 255
    flip = torch.tensor([True, False, False, True])
    reverse = torch.arange(4).flip(0)
    lam = torch.rand(4, generator=generator)
    for options in (
        {},
        {"flip": flip},
        {"permutation": torch.tensor([1, 2, 3, 0]), "lam": 0.3, "flip": flip},
        {"permutation": reverse, "lam": lam, "flip": flip, "pairs": True},
        {"permutation": reverse, "lam": lam},
    ):
        options = {"flip": None, "permutation": None, "lam": None, **options}
        truth = reference.augment(
            images, matrix.double(), options["flip"], options["permutation"], options["lam"], torch.float64
        )
        out = fk.augment(images, matrix, dtype=dtype, **options)
        assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
        assert ((out.double() - truth).abs() <= STEP[dtype] * 4 * truth.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", SAMPLE, ids=str)
@interpreted
def test_sgd_follows_torch(dtype: torch.dtype) -> None:
    """Three steps, one skipped, on every tail from 1 to 17 and over a block's end, against torch.optim.SGD."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(n, generator=generator).to(dtype) for n in (*range(1, 18), 1023, 1024, 2049)]
    for options in ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "maximize": True}, {}):
        theirs = [s.float().clone().requires_grad_() for s in starts]
        ours = [s.clone().requires_grad_() for s in starts]
        sgd = torch.optim.SGD(theirs, lr=0.1, weight_decay=1e-2, **options)
        master = fk.MasterSGD(ours, lr=0.1, weight_decay=1e-2, **options)
        for step in range(4):
            grads = [torch.randn(s.shape, generator=generator).to(dtype) for s in starts]
            for a, b, grad in zip(theirs, ours, grads, strict=True):
                a.grad, b.grad = grad.float() / 8, grad.clone()
            if step == 2:
                ours[step].grad[-1] = torch.inf
            else:
                sgd.step()
            before = [p.detach().clone() for p in ours]
            master.param_groups[0]["lr"] = torch.tensor(0.1) if step % 2 else 0.1  # read on the device, or by the host
            master.step(loss_scale=torch.tensor(8.0))
            assert master.overflow == (step == 2)
            assert step != 2 or all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
        for a, b in zip(theirs, ours, strict=True):
            exact = master.state[b].get("master", b).detach()
            torch.testing.assert_close(exact, a.detach(), rtol=1e-6, atol=1e-6)
            assert dtype == torch.float32 or ((b.float() - exact).abs() <= 2 * STEP[dtype] * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@interpreted
def test_sgd_on_misaligned_views(dtype: torch.dtype) -> None:
    """Gradients inside one bucket, as DistributedDataParallel's, one where 16 does not divide the address: no bit changes."""
    generator = torch.Generator().manual_seed(0)
    counts, drawn = (10, 2049, 5000), []
    bucket = torch.randn(sum(counts) + 6, generator=generator).to(dtype)
    starts = [torch.randn(n, generator=generator).to(dtype) for n in counts]
    views = [bucket[:10], bucket[10:2059], bucket[2064:7064]]
    assert [view.data_ptr() % 16 > 0 for view in views] == [False, True, False]
    for grads in (views, [view.clone() for view in views]):
        weights = [start.clone().requires_grad_() for start in starts]
        optimizer = fk.MasterSGD(weights, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        for _ in range(2):
            optimizer.step(loss_scale=torch.tensor(8.0))
            assert optimizer.overflow == 0
        drawn.append(
            [x for w in weights for x in (w.detach(), optimizer.master_of(w), optimizer.state[w]["momentum_buffer"])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    for place in (10, 1100, 2058):
        bucket[place], kept = torch.nan, bucket[place].clone()
        assert fk.overflow(views) == 1
        bucket[place] = kept


@interpreted
def test_sgd_on_weights_and_gradients_of_every_layout() -> None:
    """Slices, transposes, expanded and sparse gradients, and dampening, which a first step has not: torch.optim.SGD's."""
    results = []
    for kind in (fk.MasterSGD, torch.optim.SGD):
        params = [torch.ones(4, 6, 2)[..., 0].requires_grad_(), torch.ones(4, 6).t().requires_grad_()]
        optimizer = kind([*params, last := torch.ones(3, 2, 1, 5, requires_grad=True)], momentum=0.9, dampening=0.5)
        for step in range(3):
            draw = torch.arange(48.0).view(4, 12) + step
            params[0].grad, params[1].grad = draw[:, ::2], draw.t()[:6].contiguous()
            last.grad = torch.ones(1).expand(3, 2, 1, 5) if step else None
            optimizer.step()
        results.append([p.detach() for p in (*params, last)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6, check_stride=False)
    grad = torch.full((4, 6), torch.nan)
    grad[:, ::2] = 1.0
    assert fk.overflow([grad[:, ::2], grad[:, ::2].contiguous().to_sparse()]) == 0
