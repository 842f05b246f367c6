"""The colour augmentation and the normalisation as one affine map of RGB: the formulas, in numpy float64.

Every step of the paper's section 2.1 is affine in an RGB pixel x on the 0 to 255 scale, so together they are one 3x4
matrix an image, y = MT (x, 1), and that matrix is linear in a few coefficients of the image's random numbers:

    MT = constant + sum_k coefficient_k * basis_k

`color_map` gives constant and basis, normalisation included; the coefficients are `paper_coefficients`,
`published_coefficients` and the PCA noise's normal draws; `color_matrices` puts them together for a batch. Oracle:
reference.py, each step in turn on pixels.

No step clips, where code on 8-bit images clips after each. On 100 ImageNet JPEGs (224 crop, jitter 0.4, noise 0.1) the
two differ by 2.0 grey levels on average for `paper` and 3.1 for `published`, and by more than half a level in 7.5 % and
12.2 % of the values: tests/test_data_color.py::test_distance_from_clipping_each_step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import Color, DataConfig
from fasttricks_kernels.images import color as constants

Array = NDArray[np.float64]

RGB_TO_YIQ, PCA_VALUES, PCA_VECTORS = constants.RGB_TO_YIQ, constants.PCA_VALUES, constants.PCA_VECTORS
_LUMA = np.outer(np.ones(3), RGB_TO_YIQ[0])
_CHROMA = np.eye(3) - _LUMA
# d/d(angle) of a rotation in the IQ plane, at 0, seen from RGB; a rotation is _LUMA + cos * _CHROMA + sin * _TURN
_TURN = np.linalg.inv(RGB_TO_YIQ) @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ RGB_TO_YIQ


def contrast_center(mean: Sequence[float]) -> float:
    """Grey level about which `published` stretches contrast: the luma of the data set's mean (3,); 117.4 for ImageNet's."""
    return float(RGB_TO_YIQ[0] @ np.asarray(mean))


class ColorMap(NamedTuple):
    """MT = constant + tensordot(coefficients, basis, 1), normalisation included."""

    constant: Array
    """(3, 4)"""
    basis: Array
    """(K, 3, 4): one a colour coefficient, then one a principal axis."""


@cache
def color_map(color: Color, mean: tuple[float, ...], std: tuple[float, ...]) -> ColorMap:
    """The affine map of `color`, then PCA noise, then (x - mean) / std, each (3,), 0 to 255. Not to be changed."""
    grey = np.full(3, contrast_center(mean))
    none = np.zeros((3, 3))
    table: dict[
        Color, list[tuple[Array, Array | float]]
    ] = {  # (matrix, shift) pairs: the constant first, then one for each coefficient
        "paper": [(none, 0), (_LUMA, 0), (_CHROMA, 0), (_TURN, 0)],
        "published": [(none, grey), (_LUMA, 0), (_CHROMA, 0), (none, -grey)],
        "none": [(np.eye(3), 0)],
    }
    steps = table[color]
    steps += [(none, value * axis) for value, axis in zip(PCA_VALUES, PCA_VECTORS.T, strict=True)]
    blocks = np.stack([np.column_stack([matrix, np.broadcast_to(shift, 3)]) for matrix, shift in steps])
    blocks[0, :, 3] -= mean
    blocks /= np.array(std)[:, None]
    return ColorMap(blocks[0], blocks[1:])


def color_matrices(config: DataConfig, factors: Array, noise: Array) -> Array:
    """(N, 3, 4): the affine map of each of N images by color, mean and std of `config`, normalisation included.

    factors: (N, 3), in the order of the steps, not read for `none`; 1 changes nothing. noise: (N, 3), of the principal axes.
    """
    constant, basis = color_map(config.color, config.mean, config.std)
    coefficients = {"paper": paper_coefficients, "published": published_coefficients, "none": _no_coefficients}[
        config.color
    ]
    matrices: Array = constant + np.tensordot(np.column_stack([coefficients(*factors.T), noise]), basis, 1)
    return matrices


def noise_means(config: DataConfig, noise: Array) -> Array:
    """(N, 3): the offset to subtract from each of N images for the mean and the noise, x - (mean - noise); noise: (N, 3)."""
    means: Array = config.mean - noise * PCA_VALUES @ PCA_VECTORS.T
    return means


def paper_coefficients(hue: Array, saturation: Array, brightness: Array) -> Array:
    """(N, 3). Hue (a rotation by (hue - 1) * 180 degrees in the IQ plane), then saturation (a blend with the luma), then
    brightness.

    The three commute: hue and saturation are a rotation and a scaling of the same plane, brightness a scaling of all.
    Arguments: factors, (N,), 1 changes nothing; the paper draws U[0.6, 1.4].
    """
    angle, chroma = (hue - 1) * math.pi, brightness * saturation
    return np.column_stack([brightness, chroma * np.cos(angle), chroma * np.sin(angle)])


def published_coefficients(brightness: Array, contrast: Array, saturation: Array) -> Array:
    """(N, 3). Brightness (a scaling), then contrast (a scaling about contrast_center), then saturation (a blend with the
    luma).

    The authors' code stretches contrast about each image's own mean grey and draws the order; a fixed centre and order
    make the step affine in the pixel whatever the image, so that the matrix is known before the image is decoded. The
    centre is the grey that normalisation maps to about 0, which keeps the data set's mean brightness.
    """
    return np.column_stack([contrast * brightness, contrast * brightness * saturation, contrast])


def _no_coefficients(*factors: Array) -> Array:
    return np.empty((len(factors[0]), 0))
