"""Transfer (section 6 of the paper): the fields of a task that trains a base network together with parts of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from fasttricks.config.errors import DoesNotApplyError, require
from fasttricks.config.fields import get_at
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


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """Detection (task = detection): boxes of objects, each of a class, by Faster R-CNN with a feature pyramid."""

    base_size: Annotated[int, Range(8, 8192, unit="pixels")] = 600
    """Short side of the images, in training and validation."""
    max_size: int = 1000
    """Long side of the images, pixels, at most: a longer image has a shorter short side. At least base_size."""
    channels: Annotated[int, Range(8, 4096)] = 256
    """Channels of each map of the feature pyramid, and of the region proposal network."""
    head_features: Annotated[int, Range(8, 16384)] = 1024
    """Features of the two layers that judge a region."""
    anchor_scales: Annotated[tuple[float, ...], Rising(empty=False)] = (8.0,)
    """Side of a map's anchors, in strides of the map: 8 gives 32 to 512 pixels on strides of 4 to 64."""
    anchor_ratios: Annotated[tuple[float, ...], Rising(empty=False)] = (0.5, 1.0, 2.0)
    """Height / width of the anchors of each size."""
    train_proposals: Annotated[int, Range(1, 100_000)] = 2000
    """Training: proposed regions of an image that are kept, and of each map before overlapping ones go."""
    test_proposals: Annotated[int, Range(1, 100_000)] = 1000
    """Validation: the same."""
    train_samples: Annotated[int, Range(4, 100_000)] = 512
    """Training: regions of an image that are judged, drawn at random, a quarter of them of objects at most."""
    score_threshold: Annotated[float, Range(0, 1, below=True)] = 1e-4
    """Least score of a detection, above which it counts in validation; a lower one costs time and gains recall."""
    nms_threshold: Annotated[float, Range(0, 1, above=True)] = 0.3
    """Largest intersection over union of two detections of a class; above it the one of the lower score goes."""
    most_detections: Annotated[int, Range(1, 100_000)] = 100
    """Detections of an image, at most: those of the highest scores."""
    average: Literal["voc07", "area"] = "voc07"
    """Form of the average precision in `map`: voc07: at 11 recalls (VOC 2007, the paper); area: below the curve (VOC 2010)."""

    def __post_init__(self) -> None:
        check_fields(self, "detect.")
        rule = f"must be at least detect.base_size = {self.base_size}"
        require(self.max_size >= self.base_size, "detect.max_size", self.max_size, rule)


_CROP, _COLOR, _CLASS = "a crop is cut by segment.scale", "colours stay as they are", "an image has no class of its own"
_SEGMENTATION: dict[str, tuple[Any, str]] = {
    "data.area": ((0.08, 1.0), _CROP),
    "data.aspect": ((3 / 4, 4 / 3), _CROP),
    "data.color": ("none", _COLOR),
    "data.pca_noise": (0.0, _COLOR),
    "data.alternate_flip": (False, "flips are drawn"),
    "data.fixed_augmentation": (False, "no teacher's logits are kept"),
    "data.operators": ("auto", "torchvision cuts and resizes"),
    "data.balance": (0.0, _CLASS),
    "model.whitening": (False, "the patches are a classifier's"),
    "model.aux_head": (False, "segment.aux_weight has an auxiliary head of its own"),
    "schedule.first_size": (1.0, "the images have one size"),
    "loss.mixup_alpha": (0.0, "pixels are not mixed"),
    "loss.aux_weight": (0.4, "segment.aux_weight is the weight"),
    "distill.teacher": ("", "there is no teacher of pixels"),
}
_OF_DETECT = "detect.base_size and detect.max_size are the sizes"
_DETECTION: dict[str, tuple[Any, str]] = {
    "data.image_size": (224, _OF_DETECT),
    "data.val_resize": (256, _OF_DETECT),
    "data.area": ((0.08, 1.0), "images are whole"),
    "data.aspect": ((3 / 4, 4 / 3), "images are whole"),
    "data.color": ("none", _COLOR),
    "data.pca_noise": (0.0, _COLOR),
    "data.alternate_flip": (False, "flips are drawn"),
    "data.fixed_augmentation": (False, "no teacher's logits are kept"),
    "data.operators": ("auto", "torchvision resizes"),
    "data.balance": (0.0, _CLASS),
    "model.whitening": (False, "the patches are a classifier's"),
    "model.aux_head": (False, "there is no auxiliary head"),
    "schedule.first_size": (1.0, "detect.base_size is the size"),
    "loss.smoothing": (0.0, "torchvision's losses have none"),
    "loss.mixup_alpha": (0.0, "boxes are not mixed"),
    "loss.class_weights": ("", _CLASS),
    "loss.aux_weight": (0.4, "there is no auxiliary head"),
    "distill.teacher": ("", "there is no teacher of boxes"),
    "eval.batch_size": (0, "validation has one image a batch"),
    "eval.flip": (False, "the boxes of an image and its mirror image are not joined"),
    "compile": ("off", "the network runs eagerly, as the number of boxes differs from step to step"),
}
HAS: dict[str, dict[str, tuple[Any, str]]] = {
    "segmentation": _SEGMENTATION,
    "detection": _DETECTION,
}
"""Task -> the fields that have no effect in it: the one value that each may have, and why."""
SECTIONS: dict[str, tuple[str, type]] = {
    "segmentation": ("segment", SegmentConfig),
    "detection": ("detect", DetectConfig),
}
"""Task -> the section of its own, which has no effect elsewhere."""


def check_transfer(config: Any) -> None:
    """Raise DoesNotApplyError for a field of the TrainConfig `config` that has no effect in its task."""
    for path, (value, why) in HAS.get(config.task, {}).items():
        rule = f"has no effect in {config.task}, where {why}; leave it at {value!r}"
        require(get_at(config, path) == value, path, get_at(config, path), rule, DoesNotApplyError)
    for task, (section, cls) in SECTIONS.items():
        for one in fields(cls) if task != config.task else ():
            value = getattr(getattr(config, section), one.name)
            rule = f"has no effect in task {config.task}; leave it at {one.default!r}, or add --task {task}"
            require(value == one.default, f"{section}.{one.name}", value, rule, DoesNotApplyError)
