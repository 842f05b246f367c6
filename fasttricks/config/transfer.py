"""Transfer (section 6 of the paper): the fields of a task that trains a base network together with parts of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fasttricks.config.ranges import Range, Rising, Span, check_fields


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Semantic segmentation (task = segmentation): a class a pixel, by a fully convolutional head on the base network."""

    base_size: Annotated[int, Range(8, 8192, unit="pixels")] = 520
    """Training: side of the images before the random scale (base_side). Whole images of validation have data.val_resize."""
    base_side: Literal["short", "long"] = "short"
    """Training: the side that base_size is of: short (torchvision's references), or long (the authors' code)."""
    scale: Annotated[tuple[float, float], Span(0, 16)] = (0.5, 2.0)
    """Training: that side is base_size times a factor, uniform in this range. A square of data.image_size is cut out."""
    blur: Annotated[float, Range(0, 1, note="it is a probability")] = 0.5
    """Training: probability of a Gaussian blur, its deviation uniform from 0 to 1 pixels."""
    output_stride: Literal[8, 16, 32] = 8
    """Factor by which the last features are smaller than the image, at most: stages that would shrink them more are dilated."""
    aux_weight: Annotated[float, Range(0, zero="no auxiliary head")] = 0.4
    """Weight of the loss of an auxiliary head on the features before the last; the network's own has 1."""
    test_scales: Annotated[tuple[float, ...], Rising()] = ()
    """Validation: factors of the image's size whose probabilities are averaged, as 0.5 0.75 1 1.25; empty: 1 alone."""

    def __post_init__(self) -> None:
        check_fields(self, "segment.")
