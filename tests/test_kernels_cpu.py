"""The losses on the CPU in C: against torch in float64, at the edges of float32, by threads, and what is done without C."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks_kernels.losses import _cpu, cross_entropy
from fasttricks_kernels.losses._options import Labels, Weights

GUARD = 777.0


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One label too takes the way of the many logits."""
    monkeypatch.setattr(cross_entropy, "OWN_FROM", 0)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", "no-such-compiler")
    _cpu.compiled.cache_clear()
    yield
    _cpu.compiled.cache_clear()


def draw(num_rows: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, two labels, lam of a sample; a seventh of the first labels is ignored, and both of the last row's."""
    generator = torch.Generator().manual_seed(num_classes + 100_000 * seed)
    logits = 4 * torch.randn(num_rows, num_classes, generator=generator)
    target, target_b = torch.randint(num_classes, (2, num_rows), generator=generator)
    target[::7] = target[-1] = target_b[-1] = -100
    return logits, target, target_b, torch.rand(num_rows, generator=generator)


def by_torch(logits: Tensor, pairs: list[tuple[Tensor, Any]], smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and gradient of their sum by torch's own loss, in the logits' dtype."""
    leaf = logits.detach().clone().requires_grad_()
    loss = sum(w * F.cross_entropy(leaf, t, label_smoothing=smoothing, reduction="none") for t, w in pairs)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_classes", [1, 7, 8, 9, 16, 100, 1000, 1001, 21843])
def test_errors_are_at_most_torchs(num_classes: int, smoothing: float) -> None:
    """Losses and gradients, hard labels and mixed ones, a seventh ignored: against float64, beside float32 in torch."""
    assert fk.losses_compiled()
    logits, target, target_b, lam = draw(15, num_classes)
    for target_b_, share in ((None, None), (target_b, 0.3), (target_b, torch.tensor(0.3)), (target_b, lam)):
        weight = 1.0 if share is None else torch.as_tensor(share).double()
        pairs = [(target, weight)] + ([] if target_b_ is None else [(target_b_, 1 - weight)])
        exact = by_torch(logits.double(), pairs, smoothing)
        theirs = by_torch(logits, [(t, torch.as_tensor(w).float()) for t, w in pairs], smoothing)
        leaf = logits.clone().requires_grad_()
        loss = fk.cross_entropy(
            leaf, target, smoothing=smoothing, target_b=target_b_, lam=share, reduction="none", ignore_index=-100
        )
        loss.sum().backward()
        # half an ulp of what the sums are of, logits of up to 20 and, smoothed, the mean of K of them; and of a probability
        # of 1 two ulps of its exponential, a rounding of its quotient and one of the product
        for got, its, true, slack in zip((loss.detach(), leaf.grad), theirs, exact, (4e-6, 6 * 2**-24), strict=True):
            assert (got - true).abs().max() <= (its - true).abs().max() + slack, (share, num_classes)


@pytest.mark.parametrize("num_classes", [7, 100, 1000, 1001])
def test_the_errors_of_many_draws_are_below_torchs(num_classes: int) -> None:
    """The root mean square of the gradients' errors: the largest of one draw depends on the draw, and has room above."""
    squares = []
    for seed in range(40):
        logits, target, _, _ = draw(15, num_classes, seed)
        (_, exact), (_, theirs) = (by_torch(x, [(target, 1.0)], 0.1) for x in (logits.double(), logits))
        leaf = logits.clone().requires_grad_()
        fk.cross_entropy(leaf, target, label_smoothing=0.1, reduction="none").sum().backward()
        squares.append(torch.stack([(grad - exact).square().mean() for grad in (leaf.grad, theirs)]))
    ours, its = torch.stack(squares).mean(0)
    assert 0 < ours < its


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("num_classes", [1, 7, 9, 100, 1000, 21843])
def test_distillations_errors_are_at_most_torchs(num_classes: int, temperature: float) -> None:
    """Both terms, weighted, of mixed labels: against float64, beside the same of torch's losses in float32."""
    logits, target, target_b, lam = draw(15, num_classes)
    teacher = 4 * torch.randn(15, num_classes, generator=torch.Generator().manual_seed(1))

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf, share = logits.to(dtype, copy=True).requires_grad_(), lam.to(dtype)
        a, b = (F.cross_entropy(leaf, t, label_smoothing=0.1, reduction="none") for t in (target, target_b))
        q = (teacher.to(dtype) / temperature).softmax(1)
        soft = F.cross_entropy(leaf / temperature, q, reduction="none")
        kept = share * (target != -100) + (1 - share) * (target_b != -100)
        loss = 0.3 * (share * a + (1 - share) * b) + 0.6 * kept * temperature**2 * soft
        loss.sum().backward()
        return loss.detach(), leaf.grad

    exact, theirs = plain(torch.float64), plain(torch.float32)
    leaf = logits.clone().requires_grad_()
    weights = {"temperature": temperature, "hard_weight": 0.3, "soft_weight": 0.6}
    pair: dict[str, Any] = {"target_b": target_b, "lam": lam, "smoothing": 0.1, "ignore_index": -100}
    loss = fk.distillation_loss(leaf, teacher, target, reduction="none", **weights, **pair)
    loss.sum().backward()
    for got, its, true in zip((loss.detach(), leaf.grad), theirs, exact, strict=True):
        slack = 1e-7 + 2**-23 * true.abs().max()  # an ulp, and one of the 1 that the gradient takes away
        assert (got - true).abs().max() <= (its - true).abs().max() + slack


def test_exp_is_within_two_ulp_over_its_range() -> None:
    """The gradient at K = 2 is exp(d) / (1 + exp(d)): for d from 0 to where a float32 ends."""
    d = torch.linspace(-86.9, 0, 200_001)
    grad = _cpu.cross_entropy(torch.stack([torch.zeros_like(d), d], 1), Labels(torch.zeros(len(d), dtype=torch.int64)))[
        1
    ]
    exact = d.double().exp() / (1 + d.double().exp())
    assert ((grad[:, 1] - exact).abs() / exact).max() < 4 * 2**-24
    below = _cpu.cross_entropy(torch.tensor([[0.0, -88.0, -104.0, -math.inf]]), Labels(torch.tensor([0])))[1]
    assert below.tolist() == [[0.0, 0.0, 0.0, 0.0]], "below 1e-38: 0"


@pytest.mark.parametrize(
    "row",
    [
        [math.nan, 0.0, 1.0],
        [math.inf, 0.0, 1.0],
        [-math.inf] * 3,
        [-math.inf, 0.0, 1.0],
        [0.0, -math.inf, 1.0],
        [6e4, -6e4, 5.9e4],
        [3e38, -3e38, 0.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("width", [3, 40])
def test_what_is_not_finite_comes_out_as_torchs(row: list[float], smoothing: float, width: int) -> None:
    logits, target = torch.zeros(2, width), torch.tensor([0, 1])
    logits[0, :3] = torch.tensor(row)
    leaf, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = fk.cross_entropy(leaf, target, smoothing=smoothing, reduction="none")
    expected = F.cross_entropy(theirs, target, label_smoothing=smoothing, reduction="none")
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, theirs.grad, equal_nan=True, rtol=1e-6, atol=1e-6)
    if any(1e38 < abs(x) < math.inf for x in row):
        return  # a float32 has no room for x - max there, which torch halves by dividing by T first
    for teacher in (torch.zeros(2, width), logits):
        got = fk.distillation_loss_and_grad(logits, teacher, target, smoothing=smoothing, reduction="none")
        wide = (x.double() for x in (logits, teacher))
        exact = fk.distillation_loss_and_grad(*wide, target, smoothing=smoothing, reduction="none")
        torch.testing.assert_close(got, exact, equal_nan=True, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("num_classes", [5, 8, 19])
def test_nothing_is_written_beside_the_outputs(num_classes: int, distill: bool) -> None:
    function = _cpu.compiled()
    assert function is not None
    logits, target, _, _ = draw(3, num_classes)
    loss, grad = (torch.full((n + 16,), GUARD) for n in (3, 3 * num_classes))
    teacher = logits.flip(0).contiguous()

    def status(**more: int) -> int:
        rows = {
            "N": 3,
            "K": num_classes,
            "logits": logits.data_ptr(),
            "stride": num_classes,
            "target": target.data_ptr(),
            "target_bytes": 8,
        }
        rows |= {"loss": loss[8:].data_ptr(), "grad": grad[8:].data_ptr(), "chunk": 2}
        rows |= {"teacher": teacher.data_ptr()} if distill else {}
        return function(_cpu.Batch(**rows, uniform=0.1, temperature=20.0, hard=1.0, soft=1.0, **more), 1)

    assert status(ignore=-100, has_ignore=1) == 0
    for buffer in (loss, grad):
        assert (buffer[:8] == GUARD).all() and (buffer[-8:] == GUARD).all() and (buffer[8:-8] != GUARD).all()
    for bad in (-1, num_classes, -100, 2**40):
        target[1] = bad
        assert status() == 1, bad


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, target_b, lam = draw(7, 1001)
    labels, found = Labels(target, target_b, lam, uniform=0.1, ignore_index=-100), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            monkeypatch.setattr(_cpu, "LOGITS_A_THREAD", 1)
            of_teacher = _cpu.distillation(logits, logits.flip(0), labels, Weights(20.0, 1.0, 1.0))
            found.append((*_cpu.cross_entropy(logits, labels)[:2], *of_teacher[:2]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    target[:] = 0
    target[6] = 1001
    with pytest.raises(IndexError, match=r"target\[6\] is 1001"):
        _cpu.cross_entropy(logits, labels)


def test_views_and_other_dtypes() -> None:
    """Strided rows, columns that are not contiguous, int32 labels and an expanded lam; 16 bits are rounded once."""
    logits, target, target_b, _ = draw(12, 20)
    whole = torch.randn(12, 40)
    whole[:, :20] = logits
    pair: dict[str, Any] = {"target_b": target_b, "lam": torch.tensor([0.3]).expand(12), "smoothing": 0.1}
    expected = fk.cross_entropy_loss_and_grad(logits, target, ignore_index=-100, **pair)
    pair["target_b"] = target_b.int()
    for view in (whole[:, :20], logits.t().contiguous().t()):
        got = fk.cross_entropy_loss_and_grad(view, target.int(), ignore_index=-100, **pair)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for dtype in (torch.float16, torch.bfloat16):
        exact = fk.cross_entropy_loss_and_grad(logits.to(dtype).float(), target, ignore_index=-100, **pair)
        loss, grad = fk.cross_entropy_loss_and_grad(logits.to(dtype), target, ignore_index=-100, **pair)
        assert torch.equal(loss, exact[0]) and torch.equal(grad, exact[1].to(dtype))


@pytest.mark.parametrize("distill", [False, True])
def test_a_second_backward_gives_the_same_and_leaves_the_first_alone(distill: bool) -> None:
    """The first is made in the memory of what forward kept; ignored rows stay 0 under an infinite scale."""
    logits, target, target_b, lam = draw(9, 33)
    leaf = logits.clone().requires_grad_()
    pair: dict[str, Any] = {"target_b": target_b, "lam": lam, "smoothing": 0.1, "reduction": "none"}
    loss = functools.partial(fk.distillation_loss, teacher_logits=logits.flip(0)) if distill else fk.cross_entropy
    losses = loss(leaf, target=target, **pair)
    (first,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * losses.sum(), leaf, retain_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 3 * first)
    (with_graph,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    assert torch.equal(with_graph, first)
    (third,) = torch.autograd.grad(losses, leaf, torch.full_like(losses, math.inf), create_graph=True)
    assert (third[-1] == 0).all() and not third[0].isfinite().all()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_says_so_once_and_gives_the_same() -> None:
    logits, target, target_b, lam = draw(9, 33)
    arguments: dict[str, Any] = {"target_b": target_b, "lam": lam, "smoothing": 0.1, "ignore_index": -100}
    rule = r"losses on the CPU are slower than they might be: no C compiler \(CC=no-such-compiler\); install gcc"
    with pytest.warns(RuntimeWarning, match=rule):
        got = fk.cross_entropy_loss_and_grad(logits, target, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.cross_entropy_loss_and_grad(logits, target, **arguments)
        assert not fk.losses_compiled()
    exact = fk.cross_entropy_loss_and_grad(logits.double(), target, **arguments)
    torch.testing.assert_close(got, exact, check_dtype=False, rtol=1e-5, atol=1e-6)
    got = fk.distillation_loss_and_grad(logits, logits.flip(0), target, **arguments)
    exact = fk.distillation_loss_and_grad(logits.double(), logits.flip(0).double(), target, **arguments)
    torch.testing.assert_close(got, exact, check_dtype=False, rtol=1e-5, atol=1e-5)
