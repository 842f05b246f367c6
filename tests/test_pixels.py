"""The loss of pixels against torch in float64; scores of whole images; bands of them against torch's interpolate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.config import LossConfig
from fasttricks.tasks import pixels
from fasttricks.tasks.pixels import pixel_loss, pixel_scores, resized_in_bands

IGNORED = 255
NONE = LossConfig()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits of three images and their masks: one with some ignored pixels, one whole, one without a valid pixel."""
    masks = torch.randint(classes, (3, 6, 7))
    masks[0, :2], masks[2] = IGNORED, IGNORED
    return torch.randn(3, classes, 6, 7).contiguous(memory_format=torch.channels_last), masks


WEIGHTS = torch.tensor([0.3, 2.0, 0.0, 1.0, 9.5])


def oracle(logits: Tensor, masks: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """torch's mean over the valid pixels of each image, and 0 where it has none."""
    weight = None if weights is None else weights.double()
    found = [
        functional.cross_entropy(one[None], mask[None], weight=weight, ignore_index=IGNORED, label_smoothing=smoothing)
        for one, mask in zip(logits.double(), masks, strict=True)
        if (mask != IGNORED).any()
    ]
    return torch.stack(found).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_loss_and_gradient_are_torchs(smoothing: float, memory: torch.memory_format) -> None:
    logits, masks = batch()
    logits = logits.contiguous(memory_format=memory).requires_grad_()
    auxiliary = torch.randn_like(logits).requires_grad_()
    config = LossConfig(smoothing=smoothing, smoothing_over="all")
    loss = pixel_loss((logits, auxiliary), masks, config, aux_weight=0.4)
    expected = oracle(logits, masks, smoothing) + 0.4 * oracle(auxiliary, masks, smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert pixel_loss(logits, masks, config, aux_weight=0.4).item() == pytest.approx(
        oracle(logits, masks, smoothing).item(), rel=1e-6
    )
    found = torch.autograd.grad(loss, (logits, auxiliary))
    wanted = torch.autograd.grad(expected, (logits, auxiliary))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
        assert not ours[2].any(), "an image without a valid pixel has no gradient"


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_an_image_is_the_same_whatever_is_beside_it(weights: Tensor | None) -> None:
    """So the gradient of a step is the mean over its images for every split into micro-batches and ranks."""
    logits, masks = batch()

    def loss(part: slice) -> Tensor:
        return pixel_loss(logits[part], masks[part], NONE, aux_weight=0.4, class_weights=weights)

    alone = [loss(slice(i, i + 1)) for i in range(3)]
    assert loss(slice(None)).item() == pytest.approx(sum(alone).item(), rel=1e-6)  # type: ignore[union-attr]
    assert loss(slice(0)) == 0 == alone[2]


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_weights_are_torchs_weight_of_an_image_alone(memory: torch.memory_format) -> None:
    """And their scale has no effect."""
    logits, masks = batch()
    logits = logits.contiguous(memory_format=memory).requires_grad_()
    auxiliary = torch.randn_like(logits).requires_grad_()
    loss = pixel_loss((logits, auxiliary), masks, NONE, aux_weight=0.4, class_weights=WEIGHTS)
    expected = oracle(logits, masks, weights=WEIGHTS) + 0.4 * oracle(auxiliary, masks, weights=WEIGHTS)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) != oracle(logits, masks).item()
    found = torch.autograd.grad(loss, (logits, auxiliary))
    wanted = torch.autograd.grad(expected, (logits, auxiliary))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    scaled = pixel_loss((logits, auxiliary), masks, NONE, aux_weight=0.4, class_weights=1000 * WEIGHTS)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_smoothed_pixel_has_the_weight_of_its_label() -> None:
    """In float64, pixel by pixel; torch would weigh each term by the class of the term."""
    logits, masks = batch()
    config, total = LossConfig(smoothing=0.1), 0.0
    for one, mask in zip(logits.double(), masks, strict=True):
        log_p, terms, weights = one.log_softmax(0), 0.0, 0.0
        for row, column in (mask != IGNORED).nonzero().tolist():
            label = int(mask[row, column])
            target = torch.full((5,), 0.1 / 4, dtype=torch.float64)
            target[label] = 0.9
            terms -= float(WEIGHTS[label]) * float(target @ log_p[:, row, column])
            weights += float(WEIGHTS[label])
        total += terms / weights if weights else 0.0
    found = pixel_loss(logits, masks, config, aux_weight=0.4, class_weights=WEIGHTS)
    assert found.item() == pytest.approx(total, rel=1e-6)


def test_an_image_whose_pixels_all_weigh_0_has_loss_0() -> None:
    logits, masks = batch()
    logits.requires_grad_()
    loss = pixel_loss(logits, torch.full_like(masks, 2), NONE, aux_weight=0.4, class_weights=WEIGHTS)
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_input_alone(dtype: torch.dtype) -> None:
    logits, masks = batch()
    half = logits.to(dtype)
    loss = pixel_loss(half, masks, NONE, aux_weight=0.4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle(half, masks).item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- scores
class Lines(nn.Module):
    """Logits that depend on the column, so that a mirror image has others."""

    def forward(self, images: Tensor) -> Tensor:
        across = torch.linspace(0, 3, images.shape[3]).expand(len(images), 1, *images.shape[2:])
        return torch.cat([images[:, :1], across, -across], 1)


def test_one_view_is_the_networks_logits() -> None:
    images = torch.randn(2, 3, 6, 8)
    assert torch.equal(pixel_scores(Lines(), images), Lines()(images).log_softmax(1))


def test_views_are_averaged_as_probabilities() -> None:
    images = torch.randn(1, 3, 6, 8)

    def at(size: tuple[int, int], *, mirrored: bool) -> Tensor:
        seen = images
        if size != (6, 8):
            seen = functional.interpolate(seen, size=size, mode="bilinear", antialias=True)
        logits = Lines()(seen.flip(3)).flip(3) if mirrored else Lines()(seen)
        return functional.interpolate(logits, size=(6, 8), mode="bilinear").double().softmax(1)

    flipped = [at((6, 8), mirrored=mirrored) for mirrored in (False, True)]
    torch.testing.assert_close(pixel_scores(Lines(), images, flip=True).exp().double(), sum(flipped) / 2)
    every = [at(size, mirrored=mirrored) for size in ((3, 4), (9, 12)) for mirrored in (False, True)]
    found = pixel_scores(Lines(), images, scales=(0.5, 1.5), flip=True)
    torch.testing.assert_close(found.exp().double(), sum(every) / 4)
    assert bool(found.isfinite().all()) and found.dtype == torch.float32


@pytest.mark.parametrize("size", [(24, 36), (7, 5), (31, 8), (6, 8), (1, 1), (90, 3)])
def test_bands_are_the_rows_of_torchs_interpolate(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(2, 3, 6, 8)
    expected = functional.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    for at_once in (1, 2 * 3 * size[1] * 4, 1 << 24):
        monkeypatch.setattr(pixels, "_AT_ONCE", at_once)
        bands = list(resized_in_bands(scores, *size))
        assert [row for rows, _ in bands for row in range(rows.start, rows.stop)] == list(range(size[0]))
        assert at_once > 1 or len(bands) == size[0] or size == (6, 8)
        torch.testing.assert_close(torch.cat([band for _, band in bands], 2), expected, rtol=1e-5, atol=1e-6)
