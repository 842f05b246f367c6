"""Mixup, augmentation and colour matrices on the CPU: against NumPy in float64 and PIL, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

import fasttricks_kernels as fk
from fasttricks_kernels.images.color import IMAGENET_MEAN, IMAGENET_STD, LUMA, PCA_VALUES, PCA_VECTORS, RGB_TO_YIQ

REVERSE = torch.tensor([3, 2, 1, 0])


def pictures(dtype: torch.dtype = torch.uint8) -> Tensor:
    """(4, 7, 9, 3) on [0, 255]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 7, 9, 3), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pairs", [True, False])
def test_mixup(dtype: torch.dtype, pairs: bool) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        images = (pictures().permute(0, 3, 1, 2) / 255).to(dtype).contiguous(memory_format=layout)
        for lam in (0.3, torch.tensor(0.3), torch.tensor([0.0, 0.2, 0.7, 1.0])):
            share = np.broadcast_to(np.asarray(lam, np.float64), 4)[:, None, None, None]
            x = images.double().numpy()
            truth = share * x + (1 - share) * x[::-1]
            mixed = fk.mixup(images, REVERSE, lam, pairs=pairs)
            np.testing.assert_allclose(mixed.double().numpy(), truth, rtol=0, atol=torch.finfo(dtype).eps + 1e-8)
            assert mixed.is_contiguous(memory_format=layout) and mixed.data_ptr() != images.data_ptr()


def test_mixup_is_an_operator() -> None:
    images = torch.rand(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    cycle, lam = torch.tensor([1, 2, 0]), torch.tensor([0.1, 0.5, 0.9])
    for share in (lam, 0.3):
        assert torch.autograd.gradcheck(lambda x, s=share: fk.mixup(x, cycle, s), images)
    op = torch.ops.fasttricks_kernels.mixup.default
    for x in (images.detach().float(), images.detach().half().contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(op, (x, cycle, lam, 1.0, False))
    compiled = torch.compile(fk.mixup, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, cycle, lam), fk.mixup(images, cycle, lam))
    strided = torch.rand(4, 3, 6, 6)[:, :, ::2]
    torch.testing.assert_close(fk.mixup(strided, REVERSE, 0.5), fk.mixup(strided.contiguous(), REVERSE, 0.5))


@pytest.mark.parametrize(
    "words, error, change",
    [
        ("N, C, H, W", ValueError, {"images": torch.zeros(4, 3)}),
        ("augment", TypeError, {"images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)}),
        ("one partner an image", ValueError, {"permutation": torch.arange(3)}),
        ("int64 or int32", TypeError, {"permutation": torch.zeros(4)}),
        ("each of 0 .. 3 once", ValueError, {"permutation": torch.tensor([0, 0, 1, 2])}),
        ("each of 0 .. 3 once", ValueError, {"permutation": torch.tensor([0, 1, 2, 4])}),
        ("its own inverse", ValueError, {"permutation": torch.tensor([1, 2, 3, 0]), "pairs": True}),
        ("lam must lie", ValueError, {"lam": -0.1}),
        ("lam must lie", ValueError, {"lam": torch.tensor([0.0, 1.0, 2.0, 0.5])}),
        ("move one", ValueError, {"permutation": torch.empty(4, dtype=torch.int64, device="meta")}),
    ],
)
def test_bad_mixup_input_is_named(words: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"images": torch.zeros(4, 3, 2, 2), "permutation": REVERSE, "lam": 0.5, **change}
    with pytest.raises(error, match=words):
        fk.mixup(**arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_augment(dtype: torch.dtype) -> None:
    images = pictures()
    matrix_N34 = fk.random_color_matrix(4, np.random.default_rng(0))
    flip = torch.tensor([True, False, True, False])
    lam = torch.tensor([0.0, 0.3, 0.6, 1.0])
    x = images.numpy().astype(np.float64)
    x[flip.numpy()] = x[flip.numpy()][:, :, ::-1]
    plain = np.einsum("ncd,nhwd->nchw", matrix_N34[:, :, :3], x) + matrix_N34[:, :, 3][:, :, None, None]
    terms = np.einsum("ncd,nhwd->nchw", np.abs(matrix_N34[:, :, :3]), x) + np.abs(matrix_N34[:, :, 3])[:, :, None, None]
    mixed = lam.numpy()[:, None, None, None] * plain + (1 - lam.numpy()[:, None, None, None]) * plain[::-1]
    matrix = torch.from_numpy(matrix_N34).float()
    for options, truth in (({}, plain), ({"permutation": REVERSE, "lam": lam, "pairs": True}, mixed)):
        out = fk.augment(images, matrix, flip=flip, dtype=dtype, **options)
        # the terms that are summed are rounded in float32, the sum to dtype
        atol = torch.finfo(torch.float32).eps * terms.max() + torch.finfo(dtype).eps / 2 * np.abs(truth).max()
        np.testing.assert_allclose(out.double().numpy(), truth, rtol=0, atol=atol)
        assert out.is_contiguous(memory_format=torch.channels_last)
        lam_N = options.get("lam")
        arguments = (images, matrix, flip, options.get("permutation"), lam_N, 1.0, "lam" in options, dtype)
        torch.library.opcheck(torch.ops.fasttricks_kernels.augment.default, arguments)


@pytest.mark.parametrize(
    "words, error, change",
    [
        ("channels last", ValueError, {"images": torch.zeros(4, 3, 7, 9, dtype=torch.uint8)}),
        ("uint8", TypeError, {"images": torch.zeros(4, 7, 9, 3)}),
        ("one an image", ValueError, {"matrix": torch.zeros(3, 3, 4)}),
        ("converts", ValueError, {"matrix": torch.zeros(4, 3, 4, dtype=torch.float64)}),
        ("flip must be", ValueError, {"flip": torch.zeros(4)}),
        ("come together", ValueError, {"lam": 0.5}),
        ("lam must lie", ValueError, {"lam": 2.0, "permutation": REVERSE}),
        ("dtype must be", TypeError, {"dtype": torch.float64}),
    ],
)
def test_bad_augment_input_is_named(words: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"images": pictures(), "matrix": torch.zeros(4, 3, 4), **change}
    with pytest.raises(error, match=words):
        fk.augment(**arguments)


def applied(matrix_134: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return pixels @ matrix_134[0, :, :3].T + matrix_134[0, :, 3]


def test_each_colour_step_and_their_order() -> None:
    """One matrix against the steps one by one on pixels, typed from section 2.1 and AlexNet's section 4.1."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 255, (50, 3))
    hue, saturation, brightness = 1.3, 0.7, 1.2
    pca = rng.normal(0, 0.1, 3)
    y, i, q = RGB_TO_YIQ @ pixels.T
    turned = (i + 1j * q) * np.exp(1j * np.pi * (hue - 1))
    steps = np.linalg.solve(RGB_TO_YIQ, np.stack([y, turned.real, turned.imag])).T
    steps = saturation * steps + (1 - saturation) * (steps @ LUMA)[:, None]
    steps = brightness * steps + (pca * PCA_VALUES) @ PCA_VECTORS.T
    steps = (steps - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(
        applied(fk.color_matrix(hue, saturation, brightness, pca), pixels), steps, rtol=0, atol=1e-12
    )


def test_saturation_and_brightness_are_pils() -> None:
    """PIL rounds to 8 bits and to integer weights; nothing clips at these factors on these pixels."""
    pixels = np.random.default_rng(0).integers(60, 150, (16, 16, 3), dtype=np.uint8)
    unit: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    for enhance, name in ((ImageEnhance.Color, "saturation"), (ImageEnhance.Brightness, "brightness")):
        theirs = np.asarray(enhance(Image.fromarray(pixels)).enhance(1.3), np.float64)
        ours = applied(fk.color_matrix(**{name: 1.3}, **unit), pixels.reshape(-1, 3).astype(np.float64))
        assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= 1.5


def test_grey_stays_grey_and_ones_change_nothing() -> None:
    grey = np.repeat(np.linspace(0, 255, 5)[:, None], 3, 1)
    unit: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    np.testing.assert_allclose(applied(fk.color_matrix(hue=1.4, saturation=0.6, **unit), grey), grey, atol=1e-9)
    np.testing.assert_allclose(
        fk.color_matrix()[0],
        np.column_stack([np.diag(1 / np.array(IMAGENET_STD)), -np.array(IMAGENET_MEAN) / IMAGENET_STD]),
        atol=1e-12,
    )
    plain = fk.random_color_matrix(3, np.random.default_rng(0), jitter=0, pca_std=0)
    np.testing.assert_allclose(plain, np.repeat(fk.color_matrix(), 3, 0), atol=1e-12)


def test_random_colours_have_the_papers_ranges() -> None:
    matrices = fk.random_color_matrix(4000, np.random.default_rng(0), mean=(0, 0, 0), std=(1, 1, 1))
    brightness = matrices[:, :, :3].sum(2) @ LUMA  # what grey is multiplied by
    assert 0.6 <= brightness.min() < 0.61 and 1.39 < brightness.max() <= 1.4
    noise = matrices[:, :, 3] @ PCA_VECTORS / PCA_VALUES
    np.testing.assert_allclose(noise.std(0), 0.1, rtol=0.05)
    again = fk.random_color_matrix(4000, np.random.default_rng(0), mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_array_equal(matrices, again)
    with pytest.raises(ValueError, match="jitter"):
        fk.random_color_matrix(1, np.random.default_rng(0), jitter=1.5)


@pytest.mark.parametrize(
    "words, change",
    [
        ("hue must be finite, but is nan", {"hue": float("nan")}),
        ("pca must be finite", {"pca": (0.0, 0.0, float("inf"))}),
        ("std must be above 0", {"std": (0, 1, 1)}),
        (r"std must be \(3,\)", {"std": 58.0}),
        (r"mean must be \(3,\)", {"mean": 120.0}),
    ],
)
def test_numbers_that_would_spoil_every_pixel_are_named(words: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        fk.color_matrix(**change)
