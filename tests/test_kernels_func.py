"""torch.func's transforms and forward-mode AD over losses and mixup: as over plain torch in float64, or refused by name.

An operator that a transform passes by has the derivative 0, without a word: so each transform is compared, of each function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks_kernels.losses import cross_entropy

# torch's own, at the first jvp of a process
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")

N, K = 4, 3
Function = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, TEACHER, DIRECTION = (torch.randn(N, K, dtype=torch.float64, generator=GENERATOR) for _ in range(3))
TARGET, TARGET_B = torch.tensor([0, 1, 2, -100]), torch.tensor([2, 1, 0, 1])
LAM = torch.rand(N, dtype=torch.float64, generator=GENERATOR)
IMAGES = torch.rand(N, 2, 3, 1, dtype=torch.float64, generator=GENERATOR)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
TWO = torch.tensor([1.0, -0.5], dtype=torch.float64)
CYCLE = torch.tensor([1, 2, 3, 0])


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One label too takes the way of the many logits."""
    monkeypatch.setattr(cross_entropy, "OWN_FROM", 0)


def plain(target: Tensor, target_b: Tensor, lam: Any, smoothing: float, weight: Tensor | None = None) -> Function:
    """The mean loss of mixup's pair, by torch alone."""
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}
    of_class = torch.ones(K, dtype=torch.float64) if weight is None else weight
    kept, kept_b = (of_class[t.clamp(min=0)] * (t != -100) for t in (target, target_b))

    def loss(z: Tensor) -> Tensor:
        a, b = (F.cross_entropy(z, t, weight, **options) for t in (target, target_b))
        return (lam * a + (1 - lam) * b).sum() / (lam * kept + (1 - lam) * kept_b).sum()

    return loss


def plain_distilled(z: Tensor) -> Tensor:
    kept = TARGET != -100
    soft = F.cross_entropy(z / 2, (TEACHER / 2).softmax(1), reduction="none")
    return F.cross_entropy(z, TARGET, label_smoothing=0.1) + 0.5 * 4 * (kept * soft).sum() / kept.sum()


def of_images(function: Callable[[Tensor], Tensor]) -> Function:
    """A number of images that the logits are an image's pixels of, by a function whose derivatives are not constant."""
    return lambda z: (function(z.reshape(N, 1, K, 1) * IMAGES[:, :1]) ** 3).sum()


def plain_mixup(x: Tensor) -> Tensor:
    share = LAM[:, None, None, None]
    return share * x + (1 - share) * x[CYCLE]


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "one label": (
        lambda z: fk.cross_entropy(z, TARGET, label_smoothing=0.1),
        lambda z: F.cross_entropy(z, TARGET, label_smoothing=0.1),
    ),
    "pair": (
        lambda z: fk.cross_entropy(z, TARGET, target_b=TARGET_B, lam=LAM, label_smoothing=0.1),
        plain(TARGET, TARGET_B, LAM, 0.1),
    ),
    "pair, one lam": (
        lambda z: fk.cross_entropy(z, TARGET, target_b=TARGET_B, lam=0.25),
        plain(TARGET, TARGET_B, 0.25, 0.0),
    ),
    "dense": (
        lambda z: fk.cross_entropy(z, TEACHER.softmax(1), CLASS_WEIGHTS, label_smoothing=0.1),
        lambda z: F.cross_entropy(z, TEACHER.softmax(1), CLASS_WEIGHTS, label_smoothing=0.1),
    ),
    "dense targets of the logits": (
        lambda z: fk.cross_entropy(TEACHER * z, z.flip(0).softmax(1), CLASS_WEIGHTS, label_smoothing=0.1),
        lambda z: F.cross_entropy(TEACHER * z, z.flip(0).softmax(1), CLASS_WEIGHTS, label_smoothing=0.1),
    ),
    "planes": (
        lambda z: fk.cross_entropy(z.unsqueeze(2) * TWO, torch.stack([TARGET, TARGET_B], 1), CLASS_WEIGHTS),
        lambda z: F.cross_entropy(z.unsqueeze(2) * TWO, torch.stack([TARGET, TARGET_B], 1), CLASS_WEIGHTS),
    ),
    "class weights": (
        lambda z: fk.cross_entropy(z, TARGET, CLASS_WEIGHTS, target_b=TARGET_B, lam=LAM, label_smoothing=0.1),
        plain(TARGET, TARGET_B, LAM, 0.1, CLASS_WEIGHTS),
    ),
    "distillation": (
        lambda z: fk.distillation_loss(z, TEACHER, TARGET, label_smoothing=0.1, temperature=2.0, soft_weight=0.5),
        plain_distilled,
    ),
    "mixup": (of_images(lambda x: fk.mixup(x, CYCLE, LAM)), of_images(plain_mixup)),
}


def dual(function: Function) -> Callable[[Tensor], Tensor]:
    def tangent(z: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(z, DIRECTION))).tangent

    return tangent


def batched_gradients(function: Function) -> Callable[[Tensor], Tensor]:
    """One backward pass for several gradients of the output, twice: the first must leave the second its memory."""

    def gradients(z: Tensor) -> Tensor:
        leaf = z.clone().requires_grad_()
        loss, scales = function(leaf), torch.tensor([1.0, -2.0], dtype=z.dtype)
        first, second = (
            torch.autograd.grad(loss, leaf, scales, is_grads_batched=True, retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second)
        (alone,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(first, scales[:, None, None] * alone)
        return vmap(lambda v: torch.autograd.grad(loss, leaf, v, retain_graph=True)[0])(scales)

    return gradients


def twice(z: Tensor) -> Tensor:
    return torch.stack([z, -z])


ahead = torch.autograd.functional
TRANSFORMS: dict[str, Callable[[Function], Callable[[Tensor], Any]]] = {
    "grad": grad,
    "vjp": lambda f: lambda z: vjp(f, z)[1](torch.tensor(2.0, dtype=z.dtype)),
    "vmap": lambda f: lambda z: vmap(f)(twice(z)),
    "vmap of grad": lambda f: lambda z: vmap(grad(f))(twice(z)),
    "jvp": lambda f: lambda z: jvp(f, (z,), (DIRECTION,)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "forward-mode dual": dual,
    "batched gradients": batched_gradients,
    "jacobian": lambda f: lambda z: ahead.jacobian(f, z, vectorize=True),
    "jacobian, forward": lambda f: lambda z: ahead.jacobian(f, z, vectorize=True, strategy="forward-mode"),
    "jvp by double backward": lambda f: lambda z: ahead.jvp(f, z, DIRECTION),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_are_those_of_plain_torch(name: str, transform: str) -> None:
    ours, theirs = (TRANSFORMS[transform](f)(LOGITS.clone()) for f in FUNCTIONS[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours[-1] if isinstance(ours, tuple) else ours).abs().max() > 1e-3, "a comparison of zeros"


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_compile(name: str, transform: str) -> None:
    torch._dynamo.reset()
    ours, theirs = FUNCTIONS[name]
    compiled = torch.compile(TRANSFORMS[transform](ours), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS), TRANSFORMS[transform](theirs)(LOGITS), rtol=1e-12, atol=1e-12)


def test_vmap_over_labels_lam_and_permutations() -> None:
    """Per-sample gradients, and a batch of each other argument, at any dimension."""
    z, z2 = LOGITS, LOGITS.flip(0)
    labels = torch.stack([TARGET, TARGET.flip(0)], 1)
    lams = torch.stack([LAM, 1 - LAM])

    def loss(z: Tensor, t: Tensor, lam: Tensor) -> Tensor:
        return fk.cross_entropy(z, t, target_b=TARGET_B, lam=lam, label_smoothing=0.1)

    got = vmap(loss, in_dims=(0, 1, 0))(torch.stack([z, z2]), labels, lams)
    pairs = zip((z, z2), labels.T, lams, strict=True)
    torch.testing.assert_close(got, torch.stack([plain(t, TARGET_B, lam, 0.1)(x) for x, t, lam in pairs]))
    samples = vmap(grad(lambda x, t: fk.cross_entropy(x[None], t[None], label_smoothing=0.1)))(z[:3], TARGET[:3])
    leaf = z[:3].clone().requires_grad_()
    F.cross_entropy(leaf, TARGET[:3], label_smoothing=0.1, reduction="sum").backward()
    torch.testing.assert_close(samples, leaf.grad)
    cycles = torch.stack([CYCLE, CYCLE.flip(0)], 1)
    mixed = vmap(fk.mixup, in_dims=(None, 1, 0))(IMAGES, cycles, lams)
    torch.testing.assert_close(mixed[1], fk.mixup(IMAGES, CYCLE.flip(0), lams[1]))
    mixed = vmap(lambda lam: fk.mixup(IMAGES, CYCLE, lam))(torch.tensor([0.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(mixed[1], fk.mixup(IMAGES, CYCLE, 0.25))


def test_lam_and_a_colour_matrix_have_derivatives_under_the_transforms() -> None:
    slope = grad(lambda lam: fk.cross_entropy(LOGITS, TARGET_B, target_b=TARGET.clamp(min=0), lam=lam))(LAM)
    losses = [F.cross_entropy(LOGITS, t, reduction="none") for t in (TARGET_B, TARGET.clamp(min=0))]
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / N)
    raw = torch.randint(256, (N, 2, 2, 3), dtype=torch.uint8, generator=GENERATOR)
    matrix, change = torch.rand(2, N, 3, 4, generator=GENERATOR)

    def augmented(matrix: Tensor) -> Tensor:
        return fk.augment(raw, matrix, permutation=CYCLE, lam=0.25, dtype=torch.float32)

    value, tangent = jvp(augmented, (matrix,), (change,))
    torch.testing.assert_close((value, tangent), (augmented(matrix), augmented(change)))
    torch.testing.assert_close(vmap(augmented)(torch.stack([matrix, change]))[1], augmented(change))


@pytest.mark.parametrize("distil", [False, True])
def test_loss_and_grad_is_mapped_and_not_differentiated(distil: bool) -> None:
    """Neither result is part of a graph: a transform that differentiates would find 0, and is refused."""

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        pair: dict[str, Any] = {"target_b": TARGET_B, "lam": LAM, "ignore_index": -100, "loss_scale": 8.0}
        if distil:
            return fk.distillation_loss_and_grad(z, TEACHER, TARGET, **pair)
        return fk.cross_entropy_loss_and_grad(z, TARGET, **pair)

    got = vmap(run)(twice(LOGITS))
    for i, z in enumerate(twice(LOGITS)):
        torch.testing.assert_close([x[i] for x in got], list(run(z)))
    refused: list[Callable[[], Any]] = [
        lambda: grad(lambda z: run(z)[0])(LOGITS),
        lambda: vmap(grad(lambda z: run(z)[0]))(twice(LOGITS)),
        lambda: jvp(run, (LOGITS,), (DIRECTION,)),
        lambda: jacfwd(run)(LOGITS),
        lambda: dual(lambda z: run(z)[0])(LOGITS),
    ]
    for call in refused:
        with pytest.raises(RuntimeError, match=r"_loss_and_grad\(\) returns no part of a graph"):
            call()


@pytest.mark.parametrize("name", ["one label", "pair"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_ignored_row_has_no_gradient_though_it_be_not_finite(name: str, bad: float) -> None:
    z = LOGITS.clone()
    z[3] = bad
    pair: dict[str, Any] = {"target_b": TARGET, "lam": LAM} if name == "pair" else {}

    def loss(z: Tensor) -> Tensor:
        return fk.cross_entropy(z, TARGET, label_smoothing=0.1, reduction="sum", **pair)

    for transform in (grad, jacfwd):
        got = transform(loss)(z)
        torch.testing.assert_close(got[:3], grad(loss)(LOGITS)[:3])
        assert (got[3] == 0).all()


BAD: dict[str, tuple[type[Exception], str, Callable[[Tensor], Any]]] = {
    "label": (
        IndexError,
        "-7",
        lambda z: fk.cross_entropy(z, TARGET - 7, target_b=TARGET_B, lam=LAM, ignore_index=-107),
    ),
    "second": (IndexError, "target_b", lambda z: fk.cross_entropy(z, TARGET, target_b=TARGET_B + 1, lam=LAM)),
    "lam": (ValueError, "lam must lie", lambda z: fk.cross_entropy(z, TARGET, target_b=TARGET_B, lam=LAM + 1)),
    "blend": (ValueError, "lam must lie", lambda z: fk.mixup(z.view(N, 1, K, 1), CYCLE, LAM - 1).sum()),
    "partner": (ValueError, "each of 0 .. 3 once", lambda z: fk.mixup(z.view(N, 1, K, 1), TARGET_B, LAM).sum()),
    "pairs": (ValueError, "own inverse", lambda z: fk.mixup(z.view(N, 1, K, 1), CYCLE, LAM, pairs=True).sum()),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named_under_the_transforms_too(name: str) -> None:
    error, words, loss = BAD[name]
    calls: list[Callable[[], Any]] = [
        lambda: grad(loss)(LOGITS),
        lambda: vmap(loss)(twice(LOGITS)),
        lambda: jvp(loss, (LOGITS,), (DIRECTION,)),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()
