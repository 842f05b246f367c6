"""Cross-entropy's further forms, class weights among them: the C of the CPU and the interpreted Triton, against float64.

Oracles: torch.nn.functional.cross_entropy; for mixup's pair and smoothing over the other classes, which it lacks, dense targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks_kernels.losses import _cpu, cross_entropy
from fasttricks_kernels.losses._options import Labels
from lib.interpreter import interpreted
from lib.tables import covering

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
# The interpreter truncates to bfloat16 where the GPU rounds to nearest: one whole step instead of half of one.
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-24}
REDUCTIONS = ("none", "sum", "mean")
Loss = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits take the way of many."""
    monkeypatch.setattr(cross_entropy, "OWN_FROM", 0)


def draw(num_rows: int, num_classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits, two labels of which one and both are ignored in a row, lam, and class weights, the first of them 0."""
    generator = torch.Generator().manual_seed(num_classes)
    logits = (4 * torch.randn(num_rows, num_classes, generator=generator)).to(dtype)
    target, target_b = torch.randint(num_classes, (2, num_rows), generator=generator)
    target[1] = target[2] = target_b[2] = -100
    weight = torch.rand(num_classes, generator=generator)
    weight[0] = 0.0 if num_classes > 1 else 0.5
    return {
        "logits": logits,
        "target": target,
        "target_b": target_b,
        "lam": torch.rand(num_rows, generator=generator),
        "weight": weight,
    }


def value_and_grad(loss: Loss, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach().double(), leaf.grad.double()


def assert_as_good_as_torch(ours: Loss, plain: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """Value and gradient against `plain` in float64, allowed its own error in float32, a sum's roundings and one of the dtype."""
    truth = value_and_grad(plain, logits.double())
    theirs = value_and_grad(lambda z: plain(z.float()), logits)
    for got, its, true, step in zip(
        value_and_grad(ours, logits), theirs, truth, (2**-21, 2 * STEP[logits.dtype]), strict=True
    ):
        allowed = (its - true).abs().max() + step * true.abs().max() + 1e-7
        assert got.shape == true.shape
        assert (got - true).abs().max() <= allowed, (got - true).abs().max() / allowed


# ---------------------------------------------------------------------------------------------------- class weights


def dense_pair(x: dict[str, Tensor], smoothing: float, over: str) -> Callable[[Tensor], Tensor]:
    """(N,) losses of mixup's pair with class weights: -sum_k c_k q_k log p_k, q typed from section 5.2 and the authors' code."""
    num_classes = len(x["weight"])
    even = smoothing / (num_classes if over == "all" else num_classes - 1)
    at_label = 1 - smoothing + (even if over == "all" else 0)

    def targets(label: Tensor) -> Tensor:
        q = torch.full((len(label), num_classes), even, dtype=torch.float64)
        return q.scatter_(1, label.clamp(min=0)[:, None], at_label) * (label >= 0)[:, None]

    def loss(z: Tensor) -> Tensor:
        lam = x["lam"].double()[:, None]
        q = (lam * targets(x["target"]) + (1 - lam) * targets(x["target_b"])) * x["weight"].double()
        return -(q.to(z.dtype) * z.log_softmax(1)).sum(1)

    return loss


def kept_weight(x: dict[str, Tensor]) -> Tensor:
    """The divisor of the pair's mean: the weight of each label that is not ignored, by its share."""
    a, b = (x["weight"].double()[t.clamp(min=0)] * (t >= 0) for t in (x["target"], x["target_b"]))
    return (x["lam"].double() * a + (1 - x["lam"].double()) * b).sum()


def check_class_weights(num_classes: int, dtype: torch.dtype) -> None:
    x = draw(5, num_classes, dtype)
    logits, target, weight = x["logits"], x["target"], x["weight"]
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}
        assert_as_good_as_torch(
            lambda z, o=options: fk.cross_entropy(z, target, weight, **o),
            lambda z, o=options: F.cross_entropy(z, target, weight.to(z.dtype), **o),
            logits,
        )
        pair = {"target_b": x["target_b"], "lam": x["lam"]}
        for over in ("all", "others") if num_classes > 1 else ("all",):
            assert_as_good_as_torch(
                lambda z, o={**options, **pair, "smoothing_over": over}: fk.cross_entropy(z, target, weight, **o),
                dense_pair(x, smoothing, over),
                logits,
            )


@pytest.mark.parametrize(("num_classes", "dtype"), covering([1, 10, 1000, 1001, 4099], FLOATS), ids=str)
@interpreted
def test_class_weights_in_triton(num_classes: int, dtype: torch.dtype) -> None:
    check_class_weights(num_classes, dtype)


@pytest.mark.parametrize("num_classes", [1, 7, 8, 9, 1001, 21843])
def test_class_weights_in_c(num_classes: int) -> None:
    assert fk.losses_compiled()
    check_class_weights(num_classes, torch.float32)


@pytest.mark.parametrize("over", ["all", "others"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_pair_with_class_weights_is_its_formula(reduction: Any, over: Any) -> None:
    """In float64, each reduction; by the function, by the module and in one pass."""
    x = {k: v.double() if v.is_floating_point() else v for k, v in draw(5, 4).items()}
    weight, pair = x["weight"], {"target_b": x["target_b"], "lam": x["lam"]}
    losses = dense_pair(x, 0.2, over)

    def formula(z: Tensor) -> Tensor:
        return {"none": losses(z), "sum": losses(z).sum(), "mean": losses(z).sum() / kept_weight(x)}[reduction]

    module = fk.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.2, smoothing_over=over)
    expected = value_and_grad(formula, x["logits"])
    torch.testing.assert_close(value_and_grad(lambda z: module(z, x["target"], **pair), x["logits"]), expected)
    options: dict[str, Any] = {"reduction": reduction, "smoothing_over": over, "ignore_index": -100}
    got = fk.cross_entropy_loss_and_grad(x["logits"], x["target"], weight=weight, smoothing=0.2, **options, **pair)
    torch.testing.assert_close(got, expected)


def test_threads_change_no_bit_of_class_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x, before, found = draw(9, 1001), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            monkeypatch.setattr(_cpu, "LOGITS_A_THREAD", 1)
            one_pass = fk.cross_entropy_loss_and_grad(
                x["logits"], x["target"], weight=x["weight"], smoothing=0.1, ignore_index=-100
            )
            found.append(one_pass)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize(
    ("words", "error", "weight"),
    [
        (r"one a class, but has shape \(4,\)", ValueError, torch.ones(4)),
        ("weight must be torch.float32 for", TypeError, torch.ones(3, dtype=torch.float64)),
        ("must not require grad", ValueError, torch.ones(3).requires_grad_()),
        ("move one of them", ValueError, torch.ones(3, device="meta")),
        ("weight must be a torch.Tensor", TypeError, [1.0, 1.0, 1.0]),
    ],
)
def test_bad_class_weights_are_named(words: str, error: type[Exception], weight: Any) -> None:
    logits, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=words):
        fk.cross_entropy(logits, target, weight, target_b=target, lam=0.5)
    with pytest.raises(error, match=words):
        fk.cross_entropy_loss_and_grad(logits, target, weight=weight)


# ------------------------------------------------------------------------------------------------ (K,), (N, K, d1, ...)


def last(*shape: int) -> Tensor:
    """Logits whose classes lie side by side in memory."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, k, *pixels = shape
    return torch.randn(n, *pixels, k, generator=generator).movedim(-1, 1)


SHAPES = {"one": (5,), "d": (2, 5, 7), "H, W": (2, 5, 3, 2), "a, b, c": (2, 5, 2, 1, 3), "one pixel": (3, 5, 1, 1)}


def check_rows_of(name: str) -> None:
    """Values, gradients and the gradient's strides; smoothed over all and over the others, weighed, an ignored label."""
    logits = (
        last(*SHAPES[name]) if len(SHAPES[name]) > 1 else torch.randn(5, generator=torch.Generator().manual_seed(0))
    )
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    target = torch.randint(5, shape, generator=torch.Generator().manual_seed(1))
    if target.dim():
        target[(0,) * target.dim()] = -100
    weight = torch.tensor([0.75, 1.0, 2.0, 0.5, 0.25])
    for reduction in REDUCTIONS:
        for smoothing in (0.0, 0.1):
            options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
            assert_as_good_as_torch(
                lambda z, o=options: fk.cross_entropy(z, target, weight, **o),
                lambda z, o=options: F.cross_entropy(z, target, weight.to(z.dtype), **o),
                logits,
            )
    leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    others = fk.cross_entropy(leaf, target, label_smoothing=0.2, smoothing_over="others", reduction="none")
    uniform = 0.2 * 5 / 4  # of all classes: the label has 0.8
    axis = min(1, logits.dim() - 1)
    log_p = logits.log_softmax(axis)
    at_label = log_p.gather(axis, target.clamp(min=0).unsqueeze(axis)).squeeze(axis)
    plain = -(1 - uniform) * at_label - uniform * log_p.mean(axis)
    torch.testing.assert_close(others, torch.where(target == -100, 0, plain))
    others.sum().backward()
    assert leaf.grad is not None and leaf.grad.stride() == logits.stride()


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_other_shapes_in_c(name: str) -> None:
    with mock.patch.object(F, "cross_entropy", side_effect=F.cross_entropy) as torchs:
        check_rows_of(name)
    assert torchs.call_count == 12, "the two that each is compared with"


@pytest.mark.parametrize("name", SHAPES)
@interpreted
def test_rows_of_other_shapes_in_triton(name: str) -> None:
    check_rows_of(name)


# ------------------------------------------------------------------------------------------------------------ planes


def check_planes(num_classes: int, num_pixels: int, dtype: torch.dtype) -> None:
    """Classes that lie apart, with an ignored label on a NaN, class weights of float32, smoothing; each reduction."""
    generator = torch.Generator().manual_seed(num_classes)
    logits = (4 * torch.randn(2, num_classes, num_pixels, generator=generator)).to(dtype)
    target = torch.randint(num_classes, (2, num_pixels), generator=generator)
    target[0, -1] = -100
    weight = torch.rand(num_classes, generator=generator) + 0.1
    spoilt = torch.zeros_like(logits)
    spoilt[0, :, -1] = torch.nan
    for used in (None, weight):
        for smoothing, reduction in ((0.0, "none"), (0.1, "none"), (0.1, "mean")):
            options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
            assert_as_good_as_torch(
                lambda z, w=used, o=options: fk.cross_entropy(z + spoilt if z.dtype == dtype else z, target, w, **o),
                lambda z, w=used, o=options: F.cross_entropy(z, target, None if w is None else w.to(z.dtype), **o),
                logits,
            )
    pixel_by_pixel = fk.cross_entropy(logits.movedim(1, -1).reshape(-1, num_classes), target.flatten(), weight)
    torch.testing.assert_close(fk.cross_entropy(logits, target, weight), pixel_by_pixel, rtol=2e-6, atol=2e-6)


PLANES = [(1, 5), (2, 300), (21, 33), (150, 130), (170, 9)]  # the last too many classes to be held


@pytest.mark.parametrize(("shape", "dtype"), covering(PLANES, FLOATS), ids=str)
@interpreted
def test_planes_in_triton(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_planes(*shape, dtype)


@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_planes_in_c(shape: tuple[int, int]) -> None:
    with mock.patch.object(_cpu, "_by_c", side_effect=_cpu._by_c) as by_c:
        check_planes(*shape, torch.float32)
    assert by_c.call_count == 8


def test_threads_change_no_bit_of_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the place of a pixel among others; nor whether a gradient is wanted that of a loss."""
    generator, before, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    logits, target = torch.randn(3, 19, 333, generator=generator), torch.randint(19, (3, 333), generator=generator)
    weight = torch.rand(19, generator=generator)
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "none"}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            monkeypatch.setattr(_cpu, "LOGITS_A_THREAD", 1)
            found.append(value_and_grad(lambda z: fk.cross_entropy(z, target, weight, **options), logits))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    part = fk.cross_entropy(logits[..., 7:].contiguous(), target[:, 7:], weight, **options)
    assert torch.equal(part.double(), found[0][0][:, 7:])


@pytest.mark.parametrize(
    ("shape", "place"),
    [((2, 5, 4), (1, 2)), ((2, 5, 2, 2), (1, 1, 0)), ((2, 5, 1, 2, 2), (1, 0, 1, 0)), ((5,), ()), ((2, 5), (1,))],
    ids=str,
)
def test_a_bad_label_is_named_by_its_index_in_the_callers_tensor(
    shape: tuple[int, ...], place: tuple[int, ...]
) -> None:
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    target[place] = 5
    named = re.escape(f"target{list(place) if place else ''} is 5, but must lie in [0, 5)")
    layouts = [torch.zeros(shape), last(*shape) if len(shape) > 2 else torch.zeros(shape)]
    for logits in layouts:
        with pytest.raises(IndexError, match=f"^{named}"):
            fk.cross_entropy(logits.requires_grad_(), target, label_smoothing=0.1)
        with pytest.raises(IndexError, match=f"^{named}"):
            torch.func.grad(lambda z: fk.cross_entropy(z, target, label_smoothing=0.1))(logits.detach())


@interpreted
def test_a_bad_label_makes_its_pixel_nan() -> None:
    target = torch.tensor([[0, 1, 2, 5, 0]])
    value, grad = value_and_grad(lambda z: fk.cross_entropy(z, target, reduction="none"), torch.zeros(1, 5, 5))
    assert value.isnan().tolist() == [[False, False, False, True, False]]
    assert torch.equal(grad.isnan().all(1), value.isnan()) and torch.equal(grad.isnan().any(1), value.isnan())


# ----------------------------------------------------------------------------------------------------- dense targets

DENSE = [(5, 1), (5, 10), (4, 1001), (2, 4095), (6,), (2, 5, 3)]


def check_dense(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    """Targets of the logits' dtype and of float32, a row of nothing but zeros, and a logit of -infinity where the target is 0."""
    generator, axis = torch.Generator().manual_seed(sum(shape)), min(1, len(shape) - 1)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randn(shape, generator=generator).softmax(axis)
    if len(shape) > 1:
        target[0] = 0
    if layout == "last":
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.rand(shape[axis], generator=generator)
    for given, used in ((target, None), (target.to(dtype), weight)):
        for smoothing, reduction in ((0.0, "none"), (0.1, "none"), (0.1, "mean")):
            options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
            assert_as_good_as_torch(
                lambda z, t=given, w=used, o=options: fk.cross_entropy(z, t, w, **o),
                lambda z, t=given, w=used, o=options: F.cross_entropy(
                    z, t.to(z.dtype), None if w is None else w.to(z.dtype), **o
                ),
                logits,
            )
    if len(shape) == 2 and shape[1] > 1:
        logits[1, 0], target[1, 0] = -torch.inf, 0
        value, grad = value_and_grad(lambda z: fk.cross_entropy(z, target, reduction="none"), logits)
        left = F.cross_entropy(logits[:, 1:].double(), target[:, 1:].double(), reduction="none")
        torch.testing.assert_close(value[1], left[1], rtol=1e-5, atol=1e-5)
        assert grad[1, 0] == 0 and (value[0], grad[0].abs().sum()) == (0, 0)


@pytest.mark.parametrize(("shape", "dtype"), covering(DENSE[:-1], FLOATS), ids=str)
@interpreted
def test_dense_targets_in_triton(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from fasttricks_kernels.losses import _kernels

    with mock.patch.object(_kernels, "launch_dense", side_effect=_kernels.launch_dense) as launched:
        check_dense(shape, dtype, "first")
    assert launched.call_count >= 12, "forward and backward"


@interpreted
def test_dense_targets_with_class_weights_of_a_long_row_in_triton() -> None:
    """The operator takes what the function leaves to torch's, for on a GPU it spills: rows of several chunks, held or not."""
    from fasttricks_kernels.losses._kernels import launch_dense

    for num_classes in (4099, 12_289):
        generator = torch.Generator().manual_seed(num_classes)
        logits, target = torch.randn(2, 2, num_classes, generator=generator).unbind()
        target, weight = target.softmax(1), torch.rand(num_classes, generator=generator)
        losses, grad = launch_dense(logits, Labels(target, weight_K=weight, uniform=0.1))
        leaf = logits.double().requires_grad_()
        truth = F.cross_entropy(leaf, target.double(), weight.double(), reduction="none", label_smoothing=0.1)
        truth.sum().backward()
        torch.testing.assert_close(losses.double(), truth.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-6, atol=1e-7)


@interpreted
def test_dense_targets_of_channels_last_logits_in_triton() -> None:
    check_dense((2, 5, 3), torch.float16, "last")


@pytest.mark.parametrize(("shape", "layout"), [*((shape, "first") for shape in DENSE), ((2, 5, 3), "last")], ids=str)
def test_dense_targets_in_c(shape: tuple[int, ...], layout: str) -> None:
    with mock.patch.object(_cpu, "_by_c", side_effect=_cpu._by_c) as by_c:
        check_dense(shape, torch.float32, layout)
    assert by_c.call_count >= 6


def derivatives(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The first ones of all leaves that require grad, and the second ones of all pairs, along one direction."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in leaves]
    wanted = [x for x in leaves if x.requires_grad]
    value = loss(*leaves)
    up = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view_as(value)
    plain = torch.autograd.grad(value, wanted, up, retain_graph=True)
    first = torch.autograd.grad(value, wanted, up, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in wanted]
    total = sum(((g * v).sum() for g, v in zip(first, along, strict=True)), start=torch.zeros(()))
    if not total.requires_grad:  # that of the target alone does not depend on it
        return [*plain, *first]
    second = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [*plain, *first, *second]


def check_target_that_requires_grad(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Of the target and the logits, or of the target alone, against torch in float64."""
    generator, axis = torch.Generator().manual_seed(sum(shape)), min(1, len(shape) - 1)
    logits = (2 * torch.randn(shape, generator=generator)).to(dtype)
    if layout == "last":
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    target = torch.randn(shape, generator=generator, dtype=wide).softmax(axis).requires_grad_()
    weight = torch.rand(shape[axis], generator=generator, dtype=wide)
    step = max(2e-5, {torch.float16: 2**-10, torch.bfloat16: 2**-6}.get(dtype, 0))
    for trains, smoothing, reduction, used in (
        (True, 0.1, "mean", None),
        (True, 0.0, "none", weight),
        (False, 0.1, "sum", weight),
    ):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        ours = derivatives(
            lambda z, t, w=used, o=options: fk.cross_entropy(z, t, w, **o), [logits.requires_grad_(trains), target]
        )
        theirs = derivatives(
            lambda z, t, w=used, o=options: F.cross_entropy(z, t, None if w is None else w.double(), **o),
            [logits.detach().double().requires_grad_(trains), target.detach().double().requires_grad_()],
        )
        for got, true in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got.double(), true, rtol=4 * step, atol=4 * step)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        *((shape, "first", torch.float32) for shape in DENSE),
        ((2, 5, 3), "last", torch.float32),
        ((5, 10), "first", torch.float64),
        ((5, 10), "first", torch.float16),
    ],
    ids=str,
)
def test_a_target_that_requires_grad_in_c(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    with mock.patch.object(_cpu, "_loss_and_grad", side_effect=_cpu._loss_and_grad) as own:
        check_target_that_requires_grad(shape, layout, dtype)
    assert own.call_count >= 3


@interpreted
def test_a_target_that_requires_grad_in_triton() -> None:
    from fasttricks_kernels.losses import _kernels

    with mock.patch.object(_kernels, "launch_dense", side_effect=_kernels.launch_dense) as launched:
        for shape, dtype in (((5, 10), torch.float32), ((6,), torch.float16)):
            check_target_that_requires_grad(shape, "first", dtype)
    assert launched.call_count >= 6


def test_a_targets_gradient_is_the_operators_too() -> None:
    """Where torch's dispatcher is needed: gradcheck, and torch.func's grad of the target."""
    logits, target = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    target = target.softmax(1)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return fk.cross_entropy(z, t, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), label_smoothing=0.1)

    leaves = logits.requires_grad_(), target.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for argnums in (0, 1):
        found = torch.func.grad(loss, argnums)(logits.detach(), target.detach())
        torch.testing.assert_close(found, wanted[argnums])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_derivatives_of_the_operator_by_finite_differences() -> None:
    """Those of the logits, of a dense target and all mixed ones; of the target alone."""
    x, t = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.0, 2.0, 0.5, 1.25], dtype=torch.float64)
    options = None, None, weight, 1.0, 0.15, None
    x, t = x.requires_grad_(), t.softmax(1).detach().requires_grad_()

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return torch.ops.fasttricks_kernels.cross_entropy(x, t, *options)[0]

    for logits in (x, x.detach()):
        assert torch.autograd.gradcheck(loss, (logits, t)) and torch.autograd.gradgradcheck(loss, (logits, t))
    torch.library.opcheck(torch.ops.fasttricks_kernels.cross_entropy.default, (x, t, *options))
    torch.library.opcheck(torch.ops.fasttricks_kernels.cross_entropy.default, (x.detach(), t, *options))


@pytest.mark.parametrize(("num_classes", "trains", "torchs"), [(10, False, 1), (10, True, 0), (16, False, 0)])
def test_a_target_alone_of_few_classes_is_torchs(num_classes: int, trains: bool, torchs: int) -> None:
    """Its gradient needs the log_softmax that torch's loss has: 0.8 of torch's speed by ours at 9000 x 10."""
    logits, target = torch.randn(2, 3, num_classes, generator=torch.Generator().manual_seed(0))
    with mock.patch.object(F, "cross_entropy", side_effect=F.cross_entropy) as called:
        fk.cross_entropy(logits.requires_grad_(trains), target.requires_grad_(), label_smoothing=0.1)
    assert called.call_count == torchs


MEANS = ["label", "pair, lam", "pair, lam (N,)", "class weights", "smoothed", "planes", "teacher"]


@pytest.mark.parametrize("name", MEANS)
@interpreted
def test_the_kernel_writes_the_weights_that_divide_a_mean(name: str) -> None:
    """In place of torch's operators: the mean and its gradient by the weights that are typed here, in float64."""
    x = draw(5, 19)
    z, a, b, c = x["logits"], x["target"], x["target_b"], x["weight"]
    lam: Any = 0.3 if name == "pair, lam" else x["lam"]
    options: dict[str, Any] = {"target_b": b, "lam": lam} if name.startswith(("pair", "class", "smoothed")) else {}
    if name in ("class weights", "smoothed", "planes"):
        options["weight"] = c
    if name in ("smoothed", "teacher"):
        options["label_smoothing"] = 0.1
    first, second = ((c.double() if "weight" in options else torch.ones(19))[t.clamp(min=0)] * (t >= 0) for t in (a, b))
    share = torch.as_tensor(lam).double() if "lam" in options else torch.ones(())
    divisor = (share * first + (1 - share) * second).sum()

    def loss(z: Tensor, reduction: Any) -> Tensor:
        if name == "teacher":
            return fk.distillation_loss(z, z.detach().flip(0), a, reduction=reduction, **options)
        if name == "planes":
            planes = z.unflatten(0, (1, 5)).movedim(-1, 1).contiguous()
            return fk.cross_entropy(planes, a[None], reduction=reduction, **options)
        return fk.cross_entropy(z, a, reduction=reduction, **options)

    with mock.patch.object(torch.Tensor, "__ne__", side_effect=AssertionError("a kernel has counted the labels")):
        mean, of_mean = value_and_grad(lambda z: loss(z, "mean"), z)
    total, of_sum = value_and_grad(lambda z: loss(z, "sum"), z)
    torch.testing.assert_close(mean, total / divisor, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_mean, of_sum / divisor, rtol=1e-6, atol=1e-9)


@interpreted
def test_a_bad_label_spoils_no_other_rows_gradient_of_a_mean() -> None:
    x = draw(5, 19)
    bad = x["target"].clone()
    bad[3] = 19
    for weight in (None, x["weight"]):
        mean, grad = value_and_grad(lambda z, w=weight: fk.cross_entropy(z, bad, w), x["logits"])
        assert mean.isnan() and grad.isnan().all(1).tolist() == [False, False, False, True, False]


def check_ignored() -> None:
    """Rows of NaN and infinity that are ignored have the loss and gradient 0, and spoil no other."""
    x = draw(5, 19)
    x["logits"][2] = torch.tensor([torch.nan, torch.inf, *[0.0] * 17])
    for smoothing in (0.0, 0.1):
        for pair in ({}, {"target_b": x["target_b"], "lam": x["lam"]}):
            options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none", **pair}
            value, grad = value_and_grad(
                lambda z, o=options: fk.cross_entropy(z, x["target"], x["weight"], **o), x["logits"]
            )
            assert value[2] == 0 and (grad[2] == 0).all() and value.isfinite().all() and grad.isfinite().all()


def test_ignored_rows_in_c() -> None:
    check_ignored()


@interpreted
def test_ignored_rows_in_triton() -> None:
    check_ignored()
