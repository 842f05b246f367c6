"""The loss of a recipe against torch in float64 with dense targets, mixup against NumPy, lambda against its distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttricks.config import DistillConfig, LossConfig
from fasttricks.learning.numbers import draw_lam
from fasttricks.tasks.losses import Targets, mix_batch, training_loss

N, K = 6, 3  # three classes: a thousand would hide whether smoothing goes to K or to K - 1 of them


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, labels_b) with every pair of labels, equal ones too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, K, generator=generator).mul(3).to(dtype)
    return logits, torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 2, 1, 1, 1, 0])


def smoothed(labels: Tensor, smoothing: float, over: str) -> Tensor:
    """(N, K) float64 targets, typed from section 5.2 and from the authors' code."""
    targets = torch.full((len(labels), K), smoothing / (K - 1 if over == "others" else K), dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        targets[row, label] = 1 - smoothing + (0 if over == "others" else smoothing / K)
    return targets


def close(got: Tensor, want: Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol)


# ---------------------------------------------------------------------------------------------------------- loss
WEIGHTS = torch.tensor([0.5, 0.0, 2.5])
TEACHER = torch.randn(N, K, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lam", [None, 0.0, 0.3, 1.0])
def test_class_weights_are_torchs_weight(lam: float | None) -> None:
    """Mixed too: torch weighs a target of two classes by the class of each term."""
    logits, labels, labels_b = batch()
    dense, targets = smoothed(labels, 0, "all"), Targets(labels)
    if lam is not None:
        dense, targets = lam * dense + (1 - lam) * smoothed(labels_b, 0, "all"), Targets(labels, labels_b, lam)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = training_loss(ours, targets, LossConfig(), class_weights=WEIGHTS)
    want = F.cross_entropy(theirs, dense, weight=WEIGHTS.double(), reduction="sum")
    close(loss, want.detach())
    loss.backward()  # type: ignore[no-untyped-call]
    want.backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None and theirs.grad is not None
    close(ours.grad, theirs.grad)


@pytest.mark.parametrize("teacher", [None, TEACHER])
@pytest.mark.parametrize("lam", [None, 0.3])
def test_an_image_has_the_weight_of_its_label(lam: float | None, teacher: Tensor | None) -> None:
    """Its smoothing, its teacher and its auxiliary head too: each image alone, times its weight; a mixed one as its two parts."""
    logits, labels, labels_b = batch()
    auxiliary, config, distill = (
        logits.flip(0) / 2,
        LossConfig(smoothing=0.2, aux_weight=0.3),
        DistillConfig(temperature=3),
    )
    targets = Targets(labels, labels_b if lam else None, lam, teacher)
    got = training_loss((logits, auxiliary), targets, config, distill, WEIGHTS)
    total = torch.zeros(())
    for row in range(N):
        one, judged = slice(row, row + 1), None if teacher is None else teacher[row : row + 1]
        for own, share in ((labels, 1.0 if lam is None else lam), (labels_b, 0.0 if lam is None else 1 - lam)):
            alone = training_loss(
                (logits[one], auxiliary[one]), Targets(own[one], teacher_logits=judged), config, distill
            )
            total += share * WEIGHTS[own[row]] * alone
    close(got, total.double())
    alike = training_loss((logits, auxiliary), targets, config, distill, torch.ones(K))
    close(alike, training_loss((logits, auxiliary), targets, config, distill).double())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothing_over_all_is_torchs(smoothing: float) -> None:
    logits, labels, _ = batch()
    got = training_loss(logits, Targets(labels), LossConfig(smoothing=smoothing, smoothing_over="all"))
    close(got, F.cross_entropy(logits.double(), labels, reduction="sum", label_smoothing=smoothing))
    assert got.dtype == torch.float32
    assert got.shape == ()


@pytest.mark.parametrize("over", ["others", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("lam", [None, 0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_dense_targets_in_float64(
    lam: float | None, smoothing: float, over: str
) -> None:
    logits, labels, labels_b = batch()
    config = LossConfig(smoothing=smoothing, smoothing_over=over)  # type: ignore[arg-type]
    dense = smoothed(labels, smoothing, over)
    targets = Targets(labels)
    if lam is not None:
        dense = lam * dense + (1 - lam) * smoothed(labels_b, smoothing, over)
        targets = Targets(labels, labels_b, lam)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, want = training_loss(ours, targets, config), F.cross_entropy(theirs, dense, reduction="sum")
    close(loss, want.detach())
    (loss * 0.25).backward()  # type: ignore[no-untyped-call]
    (want * 0.25).backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    close(ours.grad, theirs.grad)


def test_the_two_conventions_differ_as_the_paper_says() -> None:
    """smoothing over the others equals smoothing' = smoothing K / (K - 1) over all."""
    logits, labels, _ = batch()
    others = training_loss(logits, Targets(labels), LossConfig(smoothing=0.1))
    scaled = training_loss(logits, Targets(labels), LossConfig(smoothing=0.1 * K / (K - 1), smoothing_over="all"))
    same = training_loss(logits, Targets(labels), LossConfig(smoothing=0.1, smoothing_over="all"))
    torch.testing.assert_close(others, scaled)
    assert abs(others - same) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(dtype: torch.dtype) -> None:
    logits, labels, _ = batch(dtype)
    loss = training_loss(logits, Targets(labels), LossConfig(smoothing=0.1))
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(logits.double(), smoothed(labels, 0.1, "others"), reduction="sum"))


def test_the_sum_over_micro_batches_is_the_batchs() -> None:
    logits, labels, labels_b = batch()
    config = LossConfig(smoothing=0.1)
    parts = [slice(0, 1), slice(1, 4), slice(4, 4), slice(4, 6)]
    total = sum(training_loss(logits[p], Targets(labels[p], labels_b[p], 0.4), config) for p in parts)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, training_loss(logits, Targets(labels, labels_b, 0.4), config))


def test_no_images_have_loss_0_and_gradient_0() -> None:
    weight = torch.ones(4, K, requires_grad=True)
    images = torch.zeros(0, 3, 8, 8)
    mixed, targets = mix_batch(images, torch.zeros(0, dtype=torch.int64), 0.3)
    assert mixed.shape == images.shape
    for case in (targets, Targets(torch.zeros(0, dtype=torch.int64))):
        loss = training_loss(torch.zeros(0, 4) @ weight, case, LossConfig(smoothing=0.1))
        assert loss.item() == 0
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert not weight.grad.any()


# --------------------------------------------------------------------------------------------------------- mixup


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.7123, 1.0])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_mix_batch_is_numpys_in_float64(count: int, lam: float) -> None:
    images = torch.randn(count, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(count) + 10
    kept = images.clone()
    mixed, targets = mix_batch(images, labels, lam)
    exact = images.double().numpy()
    want = lam * exact + (1 - lam) * exact[::-1]
    np.testing.assert_allclose(mixed.double().numpy(), want, rtol=0, atol=2**-22)
    assert targets.labels is labels
    assert targets.labels_b is not None
    assert targets.labels_b.tolist() == labels.tolist()[::-1]
    assert targets.lam == lam
    assert torch.equal(images, kept)


@pytest.mark.parametrize("labels", [torch.eye(4), torch.eye(4, dtype=torch.int64), torch.zeros(4)], ids=str)
def test_mix_batch_refuses_labels_of_another_form(labels: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"labels must be \(N,\) whole numbers.* but are \(4,.* torch\.(float32|int64)"
    ):
        mix_batch(torch.zeros(4, 3, 8, 8), labels, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mix_batch_keeps_dtype_and_channels_last(dtype: torch.dtype) -> None:
    images = torch.randn(4, 3, 8, 8).to(dtype=dtype, memory_format=torch.channels_last)
    mixed, _ = mix_batch(images, torch.arange(4), 0.3)
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    want = 0.3 * images.double() + 0.7 * images.double().flip(0)
    rounding = torch.finfo(dtype).eps / 2  # of a value below 8, rounded once
    torch.testing.assert_close(mixed.double(), want, rtol=rounding, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- lambda


def draws(alpha: float, count: int = 4000) -> np.ndarray:
    return np.array([draw_lam(alpha, seed=0, step=step, rank=0) for step in range(count)])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lam_has_the_moments_of_beta(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), within five standard errors; the same for the fourth central moment."""
    lam = draws(alpha)
    assert ((lam >= 0) & (lam <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    error = math.sqrt(variance / len(lam))
    assert abs(lam.mean() - 0.5) < 5 * error
    second = (lam - 0.5) ** 2
    assert abs(second.mean() - variance) < 5 * math.sqrt((fourth - variance**2) / len(lam))


def test_lam_of_alpha_one_is_uniform_and_of_one_half_is_the_arcsine() -> None:
    """Kolmogorov and Smirnov's distance to the two whose distribution function is elementary, at p = 1e-4."""
    ranks = np.arange(1, 4001) / 4000
    for alpha, distribution in ((1.0, lambda x: x), (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x)))):
        steps = distribution(np.sort(draws(alpha)))
        distance = max((ranks - steps).max(), (steps - ranks + 1 / 4000).max())
        assert distance < math.sqrt(math.log(2 / 1e-4) / 2 / 4000)


def test_lam_depends_on_seed_step_and_rank_and_on_nothing_else() -> None:
    keys = [(seed, step, rank) for seed in (0, 1, 2) for step in (0, 1, 1000, 10**7) for rank in (0, 1, 63)]
    lams = [draw_lam(0.2, seed=seed, step=step, rank=rank) for seed, step, rank in keys]
    assert len(set(lams)) == len(keys)
    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(1)
    assert [draw_lam(0.2, seed=seed, step=step, rank=rank) for seed, step, rank in reversed(keys)] == lams[::-1]


def test_neighbouring_lams_are_unrelated() -> None:
    lam = draws(0.2)
    ranks = np.array([draw_lam(0.2, seed=0, step=step, rank=1) for step in range(4000)])
    for other in (ranks[:-1], lam[1:]):
        assert abs(np.corrcoef(lam[:-1], other)[0, 1]) < 5 / math.sqrt(4000)


@pytest.mark.parametrize("alpha", [1e-3, 1e3])
def test_lam_is_a_number_for_extreme_alphas(alpha: float) -> None:
    lam = draws(alpha, 200)
    assert np.isfinite(lam).all()
    assert ((lam >= 0) & (lam <= 1)).all()
