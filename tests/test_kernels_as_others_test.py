"""The cases by which other projects test their cross-entropy, put to ours, with their classes, scales and tolerances.

Liger-Kernel: test/transformers/test_cross_entropy.py. Cut Cross-Entropy (Apple): tests/test_cce_loss_forward.py and
test_cce_loss_backward.py. They have up to 8,192 rows, here 8 or 256: each row is on its own. They compare with torch in the same
dtype or in float32; here it is torch in float64. Left out: Liger's z-loss, accuracies and predictions, which our loss lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttricks_kernels import CrossEntropyLoss, cross_entropy, cross_entropy_loss_and_grad

LIGER = {torch.float32: (1e-8, 1e-6), torch.bfloat16: (1e-8, 5e-2)}
"""dtype -> its atol and rtol of losses and gradients."""
APPLE_LOSS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
APPLE_GRAD = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""dtype -> the error above that of torch in float32, from logits in this dtype."""
ROWS = 8
CLASSES = 32000  # of Llama


def logits_and_labels(dtype: torch.dtype, rows: int = ROWS, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).to(dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


def graded(
    loss: Callable[..., Tensor], logits: Tensor, *args: Tensor, chain: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the logits under ones."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(chain(logits), *args)
    torch.autograd.backward(value, torch.ones_like(value))
    assert logits.grad is not None
    return value.detach(), logits.grad


def close(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    atol, rtol = LIGER[dtype]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=rtol)


FORMS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "none": {"reduction": "none"},
    "ignore_index 2": {"ignore_index": 2},
    "ignore_index -123, sum": {"ignore_index": -123, "reduction": "sum"},
    "ignore_index 42, none": {"ignore_index": 42, "reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, ignore_index 1": {"label_smoothing": 0.1, "ignore_index": 1},
    "smoothing, ignore_index -300": {"label_smoothing": 0.2, "ignore_index": -300},
}


@pytest.mark.parametrize("dtype", LIGER)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_ligers_forms(form: str, dtype: torch.dtype, softcap: float | None) -> None:
    """softcap: of the logits before the loss, so that the gradient that arrives there goes on through it."""
    logits, labels = logits_and_labels(dtype)
    if ignored := FORMS[form].get("ignore_index"):
        labels[::3] = int(ignored)
    chain: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if softcap is not None:
        chain = lambda x: softcap * torch.tanh(x / softcap)  # noqa: E731
    right = graded(torch.nn.CrossEntropyLoss(**FORMS[form]), logits.double(), labels, chain=chain)
    close(graded(CrossEntropyLoss(**FORMS[form]), logits, labels, chain=chain), right, dtype)


@pytest.mark.parametrize("dtype", LIGER)
@pytest.mark.parametrize("form", [form for form in FORMS if "none" not in form])
def test_ligers_forms_in_one_pass(form: str, dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(dtype)
    if ignored := FORMS[form].get("ignore_index"):
        labels[::3] = int(ignored)
    right = graded(torch.nn.CrossEntropyLoss(**FORMS[form]), logits.double(), labels)
    close(cross_entropy_loss_and_grad(logits, labels, **FORMS[form]), right, dtype)


@pytest.mark.parametrize("dtype", LIGER)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_ligers_weights(dtype: torch.dtype, reduction: Any) -> None:
    logits, labels = logits_and_labels(dtype)
    weight = torch.rand(CLASSES, generator=torch.Generator().manual_seed(1))
    right = graded(torch.nn.CrossEntropyLoss(weight.double(), reduction=reduction), logits.double(), labels)
    close(graded(CrossEntropyLoss(weight, reduction=reduction), logits, labels), right, dtype)


@pytest.mark.parametrize("dtype", LIGER)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_that_is_not_the_last_layer(dtype: torch.dtype, reduction: Any) -> None:
    """Three times the loss, as a weight in a sum of losses."""
    logits, labels = logits_and_labels(dtype)
    ours, torchs = CrossEntropyLoss(reduction=reduction), torch.nn.CrossEntropyLoss(reduction=reduction)
    right = graded(lambda x, y: 3 * torchs(x, y), logits.double(), labels)
    close(graded(lambda x, y: 3 * ours(x, y), logits, labels), right, dtype)


@pytest.mark.parametrize(("rows", "classes"), [(4, 8), (63, 41)])
@pytest.mark.parametrize("dtype", LIGER)
def test_the_function_of_small_and_odd_shapes(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(dtype, rows, classes)
    close(graded(cross_entropy, logits, labels), graded(F.cross_entropy, logits.double(), labels), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-2)])
def test_without_a_gradient(reduction: Any, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels = logits_and_labels(dtype)
    with torch.no_grad():
        found = CrossEntropyLoss(reduction=reduction)(logits, labels)
        right = F.cross_entropy(logits.double(), labels, reduction=reduction)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), right, atol=tolerance, rtol=tolerance)


def test_labels_out_of_range_beside_ignored_ones() -> None:
    logits, labels = logits_and_labels(torch.bfloat16)
    labels[::4], labels[1::4] = -123, CLASSES + 5
    with pytest.raises(IndexError, match=rf"{CLASSES + 5}"):
        CrossEntropyLoss(ignore_index=-123)(logits, labels)


def test_16_bits_are_widened_before_the_softmax() -> None:
    """At 128,256 classes (Llama 3), where a sum in bfloat16 ends at 256."""
    logits, labels = logits_and_labels(torch.bfloat16, 4, 128_256)
    loss, grad = graded(cross_entropy, logits, labels)
    wide_loss, wide_grad = graded(cross_entropy, logits.float(), labels)
    assert torch.equal(loss, wide_loss) and torch.equal(grad, wide_grad.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_labels_gradient_where_the_network_is_sure(
    dtype: torch.dtype, label_smoothing: float, reduction: str
) -> None:
    """softmax - (1 - smoothing) cancels there, so it must be taken before it is rounded. Liger allows 4 times torch's error.

    Ours is at most torch's, which is that of the rounding.
    """
    logits, labels = logits_and_labels(torch.float32, 128, 4096)
    rows = torch.arange(len(labels))
    logits[rows, labels] = logits.amax(1) + 10
    logits = logits.to(dtype)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
    right, torchs, ours = (
        graded(loss(**options), x, labels)[1][rows, labels].double()
        for loss, x in (
            (torch.nn.CrossEntropyLoss, logits.double()),
            (torch.nn.CrossEntropyLoss, logits),
            (CrossEntropyLoss, logits),
        )
    )
    assert (ours - right).abs().max() <= max((torchs - right).abs().max().item(), torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", APPLE_LOSS)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("shape", [(256, 512, 128), (252, 507, 123)], ids=str)
def test_apples_cases(dtype: torch.dtype, softcap: float | None, invalid: bool, shape: tuple[int, int, int]) -> None:
    """The loss on a product of features and a classifier, half of whose rows are the features themselves."""
    samples, classes, size = shape
    generator = torch.Generator().manual_seed(0)
    features = (torch.randn(samples, size, generator=generator) / size**0.5).to(dtype)
    classifier = torch.randn(classes, size, generator=generator).to(dtype)
    classifier[: samples // 2] = features[: samples // 2]
    labels = torch.randint(classes, (samples,), generator=generator)
    if invalid:
        labels[torch.randperm(samples, generator=generator)[: samples // 5]] = -100

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        e, c = (x.to(dtype).requires_grad_() for x in (features.clone(), classifier.clone()))
        logits = e @ c.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        each = loss(logits, labels, reduction="none")
        torch.autograd.backward(each.mean())
        assert e.grad is not None and c.grad is not None
        return [x.detach().double() for x in (each, e.grad, c.grad)]

    def in_float32(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """As Apple takes torch's, after a product in `dtype`."""
        return F.cross_entropy(logits.float(), labels, reduction=reduction)

    right, torchs, ours = run(F.cross_entropy, torch.float64), run(in_float32, dtype), run(cross_entropy, dtype)
    for allowed, *three in zip(
        (APPLE_LOSS[dtype], APPLE_GRAD[dtype], APPLE_GRAD[dtype]), right, torchs, ours, strict=True
    ):
        exact, theirs, found = three
        assert bool(((found - exact).abs() <= (theirs - exact).abs() + allowed).all())
