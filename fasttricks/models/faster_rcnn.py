"""The parts of the detector that torchvision has no switch for; models.detector builds it. Needs torchvision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from fasttricks.config import DetectConfig

T = TypeVar("T")
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
"""The losses of training, by torchvision's names."""
DIVISOR = 32
"""The sides of a batch are multiples of it, in pixels, as in torchvision."""
_ROI = 7
"""Side of the features of a region, as in torchvision."""


class Pyramid(nn.Module):
    """The base network `body` and the feature pyramid on all that its features() gives; as torchvision's BackboneWithFPN."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        in_channels: tuple[int, ...] = body.feature_channels  # type: ignore[assignment]
        self.fpn = FeaturePyramidNetwork(list(in_channels), channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images_NCHW: Tensor) -> OrderedDict[str, Tensor]:
        """Maps (N, channels, H / s, W / s) in float32, as 0, 1, ... and pool: of the strides of `body`, and twice the last."""
        images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
        features: tuple[Tensor, ...] = self.body.features(images_NCHW)  # type: ignore[operator]
        maps = self.fpn(OrderedDict((str(level), one) for level, one in enumerate(features)))
        return OrderedDict((name, one.float()) for name, one in maps.items())


class Padded(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision has no types
    """The images as they are, which the loader has resized and normalised, in one batch; zeros, the mean colour, fill it up."""

    def __init__(self) -> None:
        super().__init__(1, 1, [0.0] * 3, [1.0] * 3, size_divisible=DIVISOR)

    def normalize(self, image: Tensor) -> Tensor:
        """`image` itself."""
        return image

    def resize(self, image: Tensor, target: T = None) -> tuple[Tensor, T]:  # type: ignore[assignment]
        """Both as they are."""
        return image, target


class _ProposalHead(RPNHead):  # type: ignore[misc]  # torchvision has no types
    """Its outputs in float32, also under autocast: boxes have no room in bfloat16's 8 bits."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [one.float() for one in logits], [one.float() for one in deltas]


class _Predictor(FastRCNNPredictor):  # type: ignore[misc]  # torchvision has no types
    """As _ProposalHead."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class _RegionAlign(MultiScaleRoIAlign):  # type: ignore[misc]  # torchvision has no types
    """RoIAlign on maps whose strides are known.

    torchvision's takes them from the size of the first image that it sees, without its filling, and keeps them: a small one
    gives others, and a resumed run would begin with another image.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__([str(level) for level in range(len(strides))], output_size=_ROI, sampling_ratio=2)
        self._stride = strides[0]

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        height, width = x["0"].shape[-2:]
        pooled: Tensor = super().forward(x, boxes, [(height * self._stride, width * self._stride)])
        return pooled


class Detector(FasterRCNN):  # type: ignore[misc]  # torchvision has no types
    """Faster R-CNN on the base network `base`, which has two feature maps or more.

    In training forward(images, targets) gives the four losses by name, float32 scalars, means over the samples of the batch;
    in evaluation forward(images) a dict for each image: boxes (M, 4) in its pixels, scores (M,), labels (M,) from 1.
    images: (3, h, w) each, normalised. targets: boxes (n, 4) float32, labels (n,) int64 from 1, as 0 is the background; n may be
    0. Without images the losses are 0, and so is every gradient.

    The anchors of a map of stride s have areas of (anchor_scale x s)^2 pixels; so those of torchvision where s is 4 to 64.
    In training torch's global generator draws the samples. It waits for the device many times an image.
    """

    background = 1
    """Outputs of the classifier before the first class."""

    def __init__(self, base: nn.Module, detect: DetectConfig, num_classes: int) -> None:
        strides: list[int] = list(base.feature_strides)  # type: ignore[arg-type]
        levels, ratios = [*strides, 2 * strides[-1]], (detect.anchor_ratios,) * (len(strides) + 1)
        anchors = AnchorGenerator(tuple(tuple(s * x for x in detect.anchor_scales) for s in levels), ratios)
        super().__init__(
            Pyramid(base, detect.channels),
            rpn_anchor_generator=anchors,
            rpn_head=_ProposalHead(detect.channels, anchors.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=detect.train_proposals,
            rpn_pre_nms_top_n_test=detect.test_proposals,
            rpn_post_nms_top_n_train=detect.train_proposals,
            rpn_post_nms_top_n_test=detect.test_proposals,
            box_roi_pool=_RegionAlign(strides),
            box_head=TwoMLPHead(detect.channels * _ROI**2, detect.head_features),
            box_predictor=_Predictor(detect.head_features, num_classes + self.background),
            box_score_thresh=detect.score_threshold,
            box_nms_thresh=detect.nms_threshold,
            box_detections_per_img=detect.most_detections,
            box_batch_size_per_image=detect.train_samples,
        )
        self.transform = Padded()
        self.num_classes = num_classes

    @property
    def in_fp32(self) -> tuple[nn.Module, ...]:
        """The parts whose weights stay in FP32 where the others are FP16."""
        return self.rpn, self.roi_heads

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are the classes: their scores and their boxes."""
        return self.roi_heads.box_predictor.cls_score, self.roi_heads.box_predictor.bbox_pred

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None) -> Any:
        """As the class says; for images without data as outline()."""
        if not len(images):
            return dict.fromkeys(LOSSES, _nothing(self)) if self.training else []
        if images[0].is_meta or isinstance(images[0], FakeTensor):
            return self.outline(images)
        return super().forward(list(images), targets)

    def outline(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """The layers of a training step, on as many regions as it judges at most: to count it by, and to try sizes."""
        batch = self.transform(list(images))[0].tensors
        maps = self.backbone(batch)
        logits, deltas = self.rpn.head(list(maps.values()))
        regions = maps["0"].new_zeros(len(images) * self.roi_heads.fg_bg_sampler.batch_size_per_image, 5)
        pooled = roi_align(maps["0"], regions, _ROI, sampling_ratio=2)
        scores, boxes = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        judged = (logits, deltas, [scores], [boxes])
        return {
            name: torch.stack([part.sum() for part in parts]).sum() for name, parts in zip(LOSSES, judged, strict=True)
        }


def _nothing(model: nn.Module) -> Tensor:
    """0, of which every parameter that is trained has the gradient 0: ranks wait for all."""
    return torch.stack([p.float().sum() * 0.0 for p in model.parameters() if p.requires_grad]).sum()
