"""The paper's colour augmentation with the normalisation as one 3x4 matrix an image, for `augment`; NumPy float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import _checks

Array = npt.NDArray[np.float64]

IMAGENET_MEAN = (123.68, 116.779, 103.939)
"""Subtracted from R, G, B; 0 to 255 scale (section 2.1)."""
IMAGENET_STD = (58.393, 57.12, 57.375)
"""R, G, B are divided by it; 0 to 255 scale (section 2.1)."""
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""NTSC. Row Y is the luma; rows I and Q sum to 0, so that grey has no chroma and a hue turn leaves it alone."""
PCA_VALUES = np.array([55.46, 4.794, 1.148])
"""Standard deviation of ImageNet's RGB along its principal axes, 0 to 255 scale (AlexNet, section 4.1)."""
PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
"""Those axes as columns; rows are R, G, B."""


def color_matrix(
    hue: npt.ArrayLike = 1.0,
    saturation: npt.ArrayLike = 1.0,
    brightness: npt.ArrayLike = 1.0,
    pca: npt.ArrayLike = (0.0, 0.0, 0.0),
    *,
    mean: npt.ArrayLike = IMAGENET_MEAN,
    std: npt.ArrayLike = IMAGENET_STD,
) -> Array:
    """The 3x4 matrix of hue, then saturation, then brightness, then PCA noise, then (x - mean) / std.

    Args:
        hue, saturation, brightness: (N,) or a number, around 1, which changes nothing: a rotation of (I, Q) by
            (hue - 1) x 180 degrees; a blend with the luma; a factor.
        pca: (N, 3) or (3,), coefficients of the three principal components.
        mean, std: (3,), on [0, 255].

    Returns:
        (N, 3, 4) float64; N is 1 for numbers. `torch.from_numpy(m).float()` suits `augment`.

    Raises ValueError: a number that is not finite, or a mean or std of another shape, or a std of 0 or less.

    Source: He et al. 2018, section 2.1; Krizhevsky et al. 2012, section 4.1 (PCA). Oracle: the steps one by one.
    """
    given = {"hue": hue, "saturation": saturation, "brightness": brightness, "pca": pca, "mean": mean, "std": std}
    for name, value in given.items():
        numbers = np.asarray(value, np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} must be finite, but is {value!r}; every pixel would be NaN or infinite")
        if name in ("mean", "std") and numbers.shape != (3,):
            raise ValueError(f"{name} must be (3,), one number a channel on [0, 255], but has shape {numbers.shape}")
    if not (np.asarray(std) > 0).all():
        raise ValueError(f"std must be above 0, but is {std!r}; pass (1, 1, 1) to leave the scale alone")
    angle = np.pi * (np.atleast_1d(np.asarray(hue, np.float64)) - 1)
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 2, 1] = np.sin(angle)
    turn[:, 1, 2] = -turn[:, 2, 1]
    hue_N33 = np.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ
    s_N11 = np.asarray(saturation, np.float64).reshape(-1, 1, 1)
    saturation_N33 = s_N11 * np.eye(3) + (1 - s_N11) * LUMA
    linear_N33 = np.asarray(brightness, np.float64).reshape(-1, 1, 1) * (saturation_N33 @ hue_N33)
    noise_N3 = (np.atleast_2d(np.asarray(pca, np.float64)) * PCA_VALUES) @ PCA_VECTORS.T
    shift_N3 = np.broadcast_to(noise_N3 - np.asarray(mean), (max(len(linear_N33), len(noise_N3)), 3))
    linear_N33 = np.broadcast_to(linear_N33, (len(shift_N3), 3, 3))
    matrix_N34 = np.concatenate([linear_N33, shift_N3[:, :, None]], 2)
    return np.asarray(matrix_N34 / np.asarray(std, np.float64)[:, None], np.float64)


def random_color_matrix(
    num_images: int,
    generator: np.random.Generator,
    *,
    jitter: float = 0.4,
    pca_std: float = 0.1,
    mean: npt.ArrayLike = IMAGENET_MEAN,
    std: npt.ArrayLike = IMAGENET_STD,
) -> Array:
    """The paper's random colours: hue, saturation, brightness from U[1 - jitter, 1 + jitter], PCA noise N(0, pca_std).

    Args:
        num_images: N, from 0 to 2^31 - 1.
        generator: np.random.default_rng(seed); the same generator gives the same matrices.
        jitter: in [0, 1]; pca_std: at least 0; both 0 leaves the normalisation alone, as for validation.

    Returns:
        (N, 3, 4) float64, as `color_matrix`.

    Source: He et al. 2018, section 2.1.
    """
    _checks.check_count("num_images", num_images)
    _checks.check_share("jitter", jitter)
    _checks.check_weight("pca_std", pca_std)
    hue_N, saturation_N, brightness_N = generator.uniform(1 - jitter, 1 + jitter, (3, num_images))
    pca_N3 = generator.normal(0, pca_std, (num_images, 3))
    return color_matrix(hue_N, saturation_N, brightness_N, pca_N3, mean=mean, std=std)
