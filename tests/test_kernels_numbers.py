"""The losses at the edges of their numbers: integers about every boundary, rows that are not finite, the precision of lam.

Each of the ways that a loss is computed: torch's operator, C, plain PyTorch in float64, and the kernels under the interpreter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks_kernels import reference
from fasttricks_kernels.losses import cross_entropy
from fasttricks_kernels.proof.host import host_times
from lib.interpreter import interpreted

N, K = 4, 3
EDGES = [s * 2**b + d for b in (8, 16, 31, 32, 63) for s in (1, -1) for d in (-1, 0, 1)]
WHOLE = sorted({x for x in (*EDGES, -100, -2, -1, K, K + 1) if -(2**63) <= x < 2**63})
"""Numbers that are no label of K classes, about where each width of an integer ends."""
PAIR = torch.tensor([1, 0, 2, 1])


def labels_with(number: int, dtype: torch.dtype) -> Tensor | None:
    """Labels of which one is the number; None where the dtype has no such number."""
    info = torch.iinfo(dtype)
    return torch.tensor([0, number, 2, 1], dtype=dtype) if info.min <= number <= info.max else None


def calls(ignore_index: int | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """(N,) losses of logits and labels, by each function that takes labels, also as the second of a pair."""
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "none", "label_smoothing": 0.1}
    return {
        "one": lambda z, t: fk.cross_entropy(z, t, **options),
        "pair": lambda z, t: fk.cross_entropy(z, t, target_b=PAIR, lam=0.5, **options),
        "second": lambda z, t: fk.cross_entropy(z, PAIR, target_b=t, lam=0.5, **options),
        "one pass": lambda z, t: fk.cross_entropy_loss_and_grad(z, t, **options)[0],
        "distillation": lambda z, t: fk.distillation_loss(z, z.detach(), t, **options),
    }


@pytest.fixture(params=["torch", "C", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of the logits, where a loss is computed by torch's operator, by C, or by plain PyTorch."""
    monkeypatch.setattr(cross_entropy, "OWN_FROM", 10**9 if request.param == "torch" else 0)
    return torch.float64 if request.param == "plain" else torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_label_out_of_range_is_an_error_at_every_boundary(way: torch.dtype, dtype: torch.dtype) -> None:
    """Also where the label that is ignored is another, of the same lower bits."""
    z = torch.zeros(N, K, dtype=way, requires_grad=True)
    for number in WHOLE:
        labels = labels_with(number, dtype)
        for ignored in [None, *{-100, number ^ 2**31, number % 2**32} - {number}]:
            if labels is None or not (ignored is None or -(2**63) <= ignored < 2**63) or ignored in (0, 1, 2):
                continue
            for name, call in calls(ignored).items():
                with pytest.raises(IndexError):
                    pytest.fail(f"{name} took {number}, ignoring {ignored}: {call(z, labels)}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_label_of_every_boundary_can_be_the_ignored_one(way: torch.dtype, dtype: torch.dtype) -> None:
    z = torch.arange(N * K, dtype=way).view(N, K).requires_grad_()
    for number in WHOLE:
        labels = labels_with(number, dtype)
        if labels is None:
            continue
        for name, call in calls(number).items():
            if name == "one pass":
                continue
            losses = call(z, labels)
            (grad,) = torch.autograd.grad(losses.sum(), z)
            gone = losses[1] == 0 and bool((grad[1] == 0).all())
            assert gone == (name not in ("pair", "second")) and bool(losses.isfinite().all()), (name, number)


@interpreted
def test_kernels_at_every_boundary() -> None:
    """A bad label makes its row NaN, and no other; an ignored one makes it 0; the two do not meet in 32 bits."""
    z = torch.zeros(N, K)
    for dtype in (torch.int64, torch.int32):
        for number in (-(2**31), 2**31 - 1, 2**31, 2**32, -(2**63), 2**63 - 1, -1, K):
            labels = labels_with(number, dtype)
            for ignored in [] if labels is None else [number, number ^ 2**31, number % 2**32]:
                if ignored in (0, 1, 2) or not -(2**63) <= ignored < 2**63:
                    continue
                options: dict[str, Any] = {"ignore_index": ignored, "reduction": "none"}
                losses, grad = fk.cross_entropy_loss_and_grad(z, labels, **options)
                for value in (losses[:, None], grad):
                    assert value[[0, 2, 3]].isfinite().all()
                    assert (value[1] == 0).all() if ignored == number else value[1].isnan().all(), (number, ignored)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_that_are_not_finite_change_nothing(way: torch.dtype, bad: float) -> None:
    """Loss, gradient and second derivative are those of the other rows alone; torch gives NaN there."""
    good = torch.randn(N, K, dtype=way, generator=torch.Generator().manual_seed(0))
    kept, labels, labels_b = [0, 2, 3], torch.tensor([0, -100, 2, 1]), torch.tensor([1, -100, -100, 0])
    functions: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda z, t, b: fk.cross_entropy(z, t, label_smoothing=0.1),
        lambda z, t, b: fk.cross_entropy(z, t, target_b=b, lam=0.25, label_smoothing=0.1),
        lambda z, t, b: fk.distillation_loss(z, z.detach(), t, label_smoothing=0.1),
    ]
    for function in functions:
        results = []
        for rows in ([0, 1, 2, 3], kept):
            z = good.clone()
            z[1] = bad
            z = z[rows].requires_grad_()
            loss = function(z, labels[rows], labels_b[rows])
            (grad,) = torch.autograd.grad(loss, z, create_graph=True)
            (second,) = torch.autograd.grad((grad[[0, -1]] ** 2).sum(), z)
            results.append([loss.detach(), grad.detach(), second])
        for whole, part in zip(*results, strict=True):
            if whole.dim():
                assert (whole[1] == 0).all()
                whole = whole[kept]
            torch.testing.assert_close(whole, part)


@pytest.mark.parametrize("kind", ["number", "float64", "()", "float16"])
def test_lam_is_as_exact_as_the_loss_and_does_not_widen_it(kind: str) -> None:
    lam: Any = 0.1
    if kind != "number":
        dtype = torch.float16 if kind == "float16" else torch.float64
        lam = torch.tensor(0.1 if kind == "()" else [0.1, 0.3, 0.7, 1.0], dtype=dtype)
    share = lam.double() if isinstance(lam, Tensor) else lam
    z, t = (
        torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, -100, 2, 1]),
    )
    b = F.cross_entropy(z, PAIR, label_smoothing=0.1, reduction="none")
    for ignore_index, weight in (
        (-100, share * (t != -100).double() + (1 - share) * torch.ones(N).double()),
        (None, None),
    ):
        target = t if ignore_index else t.clamp(min=0)
        a = F.cross_entropy(z, target, label_smoothing=0.1, reduction="none")
        mixed = share * a + (1 - share) * b
        true = mixed.sum() / (N if weight is None else weight.sum())
        options: dict[str, Any] = {"target_b": PAIR, "lam": lam, "ignore_index": ignore_index, "label_smoothing": 0.1}
        for got in (fk.cross_entropy(z, target, **options), fk.cross_entropy_loss_and_grad(z, target, **options)[0]):
            torch.testing.assert_close(got, true, rtol=1e-14, atol=1e-14)
        for narrow in (torch.float32, torch.float16):
            leaf = z.to(narrow).requires_grad_()
            loss, grad = fk.cross_entropy_loss_and_grad(leaf, target, **options)
            soft = fk.distillation_loss(leaf, z.to(narrow), target, **options)
            assert loss.dtype == soft.dtype == fk.cross_entropy(leaf, target, **options).dtype == torch.float32
            assert grad.dtype == narrow


def test_a_16_bit_lam_is_subtracted_from_1_in_float32() -> None:
    lam = torch.tensor([0.1, 0.3, 0.7, 1.0], dtype=torch.float16)
    z = torch.randn(N, K, dtype=torch.float32)
    plain = reference.cross_entropy(z, PAIR, PAIR.flip(0), lam)
    torch.testing.assert_close(plain, reference.cross_entropy(z, PAIR, PAIR.flip(0), lam.float()), rtol=0, atol=0)


NUMPY = {
    "logits": lambda: fk.cross_entropy(np.zeros((N, K)), PAIR, target_b=PAIR, lam=0.5),  # type: ignore[arg-type]
    "labels": lambda: fk.cross_entropy(torch.zeros(N, K), PAIR.numpy(), target_b=PAIR, lam=0.5),
    "second labels": lambda: fk.cross_entropy(torch.zeros(N, K), PAIR, target_b=PAIR.numpy(), lam=0.5),
    "lam": lambda: fk.cross_entropy(torch.zeros(N, K), PAIR, target_b=PAIR, lam=np.ones(N)),
    "torch's logits": lambda: fk.cross_entropy(np.zeros((N, K)), PAIR),
    "torch's labels": lambda: fk.cross_entropy(torch.zeros(N, K), PAIR.numpy()),
    "one pass": lambda: fk.cross_entropy_loss_and_grad(np.zeros((N, K)), PAIR),
    "teacher": lambda: fk.distillation_loss(torch.zeros(N, K), np.zeros((N, K)), PAIR),
    "student": lambda: fk.distillation_loss(np.zeros((N, K)), torch.zeros(N, K), PAIR),
    "distilled labels": lambda: fk.distillation_loss_and_grad(torch.zeros(N, K), torch.zeros(N, K), PAIR.numpy()),
    "images": lambda: fk.mixup(np.zeros((N, 1, 1, 1)), PAIR, 0.5),
    "permutation": lambda: fk.mixup(torch.zeros(N, 1, 1, 1), np.arange(N), 0.5),
    "share": lambda: fk.mixup(torch.zeros(N, 1, 1, 1), torch.arange(N), np.ones(N)),
    "raw images": lambda: fk.augment(np.zeros((N, 1, 1, 3), np.uint8), torch.zeros(N, 3, 4)),
    "matrix": lambda: fk.augment(torch.zeros(N, 1, 1, 3, dtype=torch.uint8), fk.color_matrix([1.0] * N)),
    "flip": lambda: fk.augment(
        torch.zeros(N, 1, 1, 3, dtype=torch.uint8), torch.zeros(N, 3, 4), flip=np.zeros(N, bool)
    ),
    "gradients": lambda: fk.overflow([np.zeros(3)]),
    "weights": lambda: fk.sgd_step([np.zeros(3)], [torch.zeros(3)], [], [], lr=0.1),
}


@pytest.mark.parametrize("name", NUMPY)
def test_numpys_arrays_are_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=r"must be .*(Tensor|number).* not (numpy\.)?ndarray"):
        NUMPY[name]()


@pytest.mark.parametrize("bad", [2**63, -(2**63) - 1, 1.0, "0"])
def test_an_ignore_index_that_is_no_int64_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="ignore_index must be None or an int64"):
        fk.cross_entropy_loss_and_grad(torch.zeros(N, K), PAIR, ignore_index=bad)


COUNTS: dict[str, Callable[[Any], object]] = {
    "num_images": lambda n: fk.random_color_matrix(n, np.random.default_rng(0)),
    "turns": host_times,
}
"""Every argument of a public function, and of `proof`, that counts."""


def test_no_other_public_argument_counts() -> None:
    """Found by its annotation."""
    functions = [getattr(fk, name) for name in fk.__all__]
    found = {
        parameter.name
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.annotation in (int, "int")
    }
    assert found == {"num_images"}


@pytest.mark.parametrize("bad", [-1, -(10**30), 2**31, 10**30, True, False, 2.0, "2", None, np.float64(2)], ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_a_bad_count_is_named(name: str, bad: Any) -> None:
    whole = isinstance(bad, int) and not isinstance(bad, bool)
    words = rf"{name} must lie in \[[01], 2147483647\], but is {bad}" if whole else f"{name} must be an int, not "
    with pytest.raises(ValueError if whole else TypeError, match=words):
        COUNTS[name](bad)


def test_no_images_have_no_matrices_and_no_turns_no_median() -> None:
    assert fk.random_color_matrix(0, np.random.default_rng(0)).shape == (0, 3, 4)
    assert fk.random_color_matrix(np.int64(2), np.random.default_rng(0)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"turns must lie in \[1, "):
        host_times(0)


@pytest.mark.parametrize("distil", [False, True])
def test_a_loss_scale_on_another_device_is_refused(distil: bool) -> None:
    z, scale = torch.zeros(N, K), torch.ones((), device="meta")
    call = fk.distillation_loss_and_grad if distil else fk.cross_entropy_loss_and_grad
    rows = (z, z) if distil else (z,)
    with pytest.raises(ValueError, match="loss_scale is on meta, but logits on cpu; move one of them"):
        call(*rows, PAIR, loss_scale=scale)  # type: ignore[operator]
