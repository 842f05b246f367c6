"""FCN: a fully convolutional network for segmentation (section 6.2; Long et al. 2015, arXiv:1411.4038) on a base network.

The heads are torchvision's FCNHead, the keys those of its fcn_resnet50, whose weights load strictly into the one on our
ResNet-50-B. tests/test_models_fcn.py compares them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fasttricks.config import ConfigError, ModelConfig, SegmentConfig
from fasttricks.models.base import base_network
from fasttricks.models.norm import BatchNormAct, use_norm
from fasttricks.system.extras import missing_extra


class FCN(nn.Module):
    """A head on the last features of `backbone` and, with `auxiliary`, one on those before, which is for training alone.

    A head: 3x3 to a quarter of the channels, batch norm, ReLU, dropout 0.1, 1x1 to the classes. Its logits are resized to the
    image, bilinearly, in float32. num_classes: 1 or more. Memory: float32 logits of each pixel, twice with `auxiliary`.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, auxiliary: bool) -> None:
        super().__init__()
        channels: tuple[int, ...] = backbone.feature_channels  # type: ignore[assignment]
        self.backbone = backbone
        self.classifier = _head(channels[-1], num_classes)
        self.aux_classifier = _head(channels[-2], num_classes) if auxiliary else None

    def forward(self, images_NCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, num_classes, H, W), float32, of normalised images (N, 3, H, W); in training with an auxiliary head (logits,
        the auxiliary head's)."""
        features: tuple[Tensor, ...] = self.backbone.features(images_NCHW)  # type: ignore[operator]
        size = images_NCHW.shape[-2:]
        logits = _resized(self.classifier(features[-1]), size)
        if self.aux_classifier is None or not self.training:
            return logits
        return logits, _resized(self.aux_classifier(features[-2]), size)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are the classes."""
        heads = (self.classifier, self.aux_classifier)
        return tuple(head[-1] for head in heads if isinstance(head, nn.Sequential))


def _head(channels: int, num_classes: int) -> nn.Module:
    if missing := missing_extra("transfer", ["torchvision"], "task segmentation"):
        raise ConfigError(missing)
    from torchvision.models.segmentation.fcn import FCNHead

    head: nn.Sequential = FCNHead(channels, num_classes)
    head[1], head[2] = BatchNormAct(channels // 4, "relu"), nn.Identity()  # the keys stay
    return head


def _resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def build_fcn(model: ModelConfig, segment: SegmentConfig, num_classes: int) -> FCN:
    """The network of `model` and `segment`, in FP32 on torch's default device, in training mode.

    Raises ConfigError as base_network, and where torchvision is absent. Initial weights: the base network's as build_model has
    them, the heads' as torch makes them.
    """
    network = FCN(base_network(model, segment.output_stride), num_classes, auxiliary=segment.aux_weight > 0)
    use_norm(network, model.norm)
    return network
