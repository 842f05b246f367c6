"""The colour matrix against each step written out on pixels, and against DALI's and torchvision's own operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from fasttricks.config import DataConfig, Statistics
from fasttricks.data.pipeline import color, reference
from lib.tables import mostly_slow

RNG = np.random.default_rng(0)
PIXELS = RNG.uniform(0, 255, (32, 32, 3))


def matrix(
    kind: Any, factors: list[float], noise: list[float], statistics: Statistics = (DataConfig.mean, DataConfig.std)
) -> color.Array:
    config = DataConfig(color=kind, mean=tuple(statistics[0]), std=tuple(statistics[1]))  # type: ignore[arg-type]
    made = color.color_matrices(config, np.array([[*factors, 1, 1, 1][:3]]), np.array([noise]))
    assert made.shape == (1, 3, 4)
    return made[0]


def apply(mt: color.Array, pixels: color.Array) -> color.Array:
    return pixels @ mt[:, :3].T + mt[:, 3]


@pytest.mark.parametrize("statistics", [(DataConfig.mean, DataConfig.std), ((127.5, 100, 9), (64, 32, 255))])
@pytest.mark.parametrize("kind", ["paper", "published", "none"])
def test_matrix_is_the_steps_in_turn(kind: str, statistics: Statistics) -> None:
    for _ in range(20):
        factors = list(RNG.uniform(0.6, 1.4, 0 if kind == "none" else 3))
        noise = list(RNG.normal(0, 0.1, 3))
        colored = reference.augment_color(PIXELS, kind, factors, noise, mean=statistics[0])
        stepwise = reference.normalise(colored, *statistics)
        np.testing.assert_allclose(
            apply(matrix(kind, factors, noise, statistics), PIXELS), stepwise, rtol=0, atol=1e-12
        )


def test_factors_of_one_and_no_noise_leave_the_constants_of_the_paper() -> None:
    want = (PIXELS - [123.68, 116.779, 103.939]) / [58.393, 57.12, 57.375]
    for kind in ("paper", "published", "none"):
        factors = [] if kind == "none" else [1.0, 1.0, 1.0]
        np.testing.assert_allclose(apply(matrix(kind, factors, [0, 0, 0]), PIXELS), want, rtol=0, atol=1e-12)


def test_grey_stays_grey_under_hue_and_saturation() -> None:
    grey = np.full((1, 1, 3), 77.0)
    np.testing.assert_allclose(reference.rotate_hue(grey, 1.4), grey, atol=1e-12)
    np.testing.assert_allclose(reference.scale_saturation(grey, 0.6), grey, atol=1e-12)


def test_hue_factor_spans_half_a_turn_a_unit() -> None:
    """factor 2 is 180 degrees: chroma changes sign, luma stays."""
    luma = PIXELS @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(reference.rotate_hue(PIXELS, 2.0), 2 * luma[..., None] - PIXELS, atol=1e-9)


def test_principal_axes_are_orthonormal() -> None:
    np.testing.assert_allclose(color.PCA_VECTORS.T @ color.PCA_VECTORS, np.eye(3), atol=2e-4)


def test_steps_agree_with_torchvision() -> None:
    """torchvision clips to [0, 1] and has luma weights of four digits, 0.2989: pixels and factors here stay inside."""
    pixels = RNG.uniform(100, 150, (16, 16, 3))
    image = torch.from_numpy(pixels.transpose(2, 0, 1) / 255)

    def back(result: torch.Tensor) -> Any:
        return result.numpy().transpose(1, 2, 0) * 255

    np.testing.assert_allclose(
        reference.scale_saturation(pixels, 1.3), back(tv.adjust_saturation(image, 1.3)), atol=0.02
    )
    np.testing.assert_allclose(
        reference.scale_brightness(pixels, 0.7), back(tv.adjust_brightness(image, 0.7)), atol=1e-9
    )
    # torchvision stretches about the image's own mean grey: shift the image so that this is our fixed centre
    grey = pixels + color.contrast_center(DataConfig.mean) - (pixels @ color.RGB_TO_YIQ[0]).mean()
    stretched = back(tv.adjust_contrast(torch.from_numpy(grey.transpose(2, 0, 1) / 255), 1.4))
    np.testing.assert_allclose(reference.scale_contrast(grey, 1.4), stretched, atol=0.02)


def test_hue_agrees_with_dali() -> None:
    """DALI's own hue operator turns the other way (the draw is symmetric); its YIQ matrix has three digits."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> Any:
        pixels = types.Constant(PIXELS.astype(np.float32), device="cpu", layout="HWC")
        return fn.hue(pixels, hue=0.25 * 180, dtype=types.FLOAT), fn.saturation(
            pixels, saturation=1.3, dtype=types.FLOAT
        )

    pipeline = graph()
    pipeline.build()
    hue, saturation = (np.array(output.as_array())[0] for output in pipeline.run())
    np.testing.assert_allclose(reference.rotate_hue(PIXELS, 0.75), hue, atol=0.6)
    np.testing.assert_allclose(reference.scale_saturation(PIXELS, 1.3), saturation, atol=0.6)


@pytest.mark.parametrize(
    ("kind", "mean_bound", "share_bound"),
    mostly_slow([("paper", 2.2, 0.08), ("published", 3.3, 0.13)], ("paper", 2.2, 0.08)),
)
def test_distance_from_clipping_each_step(
    kind: str, mean_bound: float, share_bound: float, test_data: Callable[[str], Path]
) -> None:
    """No step clips; code on 8-bit images would. The bounds are those stated in color.py."""
    difference, share = clipping_distance(kind, test_data("imagenet_samples") / "train")
    print(f"{kind}: mean absolute difference {difference:.2f} grey levels, {share:.1%} of values over half a level")
    assert difference < mean_bound
    assert share < share_bound


def clipping_distance(kind: str, root: Path) -> tuple[float, float]:
    """(mean absolute difference in grey levels, share of values over 0.5 apart): 100 images, 4 draws each."""
    rng = np.random.default_rng(1)
    differences = []
    for path in sorted(root.rglob("*.JPEG"))[::5]:
        pixels = reference.validation_pixels(reference.decode(path), image_size=224, val_resize=256)[::4, ::4]
        for _ in range(4):
            factors, noise = list(rng.uniform(0.6, 1.4, 3)), list(rng.normal(0, 0.1, 3))
            free, clipped = (reference.augment_color(pixels, kind, factors, noise, clip=clip) for clip in (False, True))
            differences.append(np.abs(free - clipped))
    together = np.concatenate([d.ravel() for d in differences])
    return float(together.mean()), float((together > 0.5).mean())
