"""MobileNet-V1 (Howard et al. 2017, arXiv:1704.04861): alternating 3x3 depthwise and 1x1 convolutions.

State-dict keys and outputs are those of timm's mobilenetv1_100, so its weights load strictly. tests/test_models_other.py
compares them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fasttricks.models.common import scaled, xavier_
from fasttricks.models.norm import BatchNormAct, Norm, use_norm

STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
"""Channels, blocks: all but the first halve the image in their first block, as the stem did before."""


class SeparableBlock(nn.Module):
    """3x3 on each channel alone, then 1x1 over all of them; batch norm and ReLU6 after both."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_channels, in_channels, 3, stride, dilation, dilation=dilation, groups=in_channels, bias=False
        )
        self.bn1 = BatchNormAct(in_channels, "relu6")
        self.conv_pw = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = BatchNormAct(channels, "relu6")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv_dw(x))
        out: Tensor = self.bn2(self.conv_pw(x))
        return out


class MobileNetV1(nn.Module):
    """Stem, five stages of separable blocks, mean over the image, classifier.

    num_classes: 1 or more. width: multiplies every channel count, rounded to a multiple of 8 and at least 8; the paper's
    width multiplier. ReLU6 follows the authors' code and timm; the paper writes ReLU. There is no residual block, so
    zero gamma does not apply. output_stride, norm: as ResNet has them. Memory: channels-last inputs stay channels-last
    throughout. Nothing here waits for the device.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        width: float = 1.0,
        output_stride: Literal[8, 16, 32] = 32,
        norm: Norm = "auto",
    ) -> None:
        super().__init__()
        in_channels = scaled(32, width)
        self.conv_stem = nn.Conv2d(3, in_channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNormAct(in_channels, "relu6")
        self.blocks = nn.Sequential()
        dilation, strides = 1, [2]
        for stage, (channels, depth) in enumerate(STAGES):
            blocks, dilates = [], stage > 0 and strides[-1] >= output_stride
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 and not dilates else 1
                blocks.append(SeparableBlock(in_channels, scaled(channels, width), stride, dilation))
                in_channels = scaled(channels, width)
                dilation *= 2 if dilates and index == 0 else 1  # the first 3x3 has the distances of the stage before
            strides.append(min(2 ** (stage + 1), output_stride))
            self.blocks.append(nn.Sequential(*blocks))
        self.feature_channels = tuple(scaled(channels, width) for channels, _ in STAGES[1:])
        """Channels of each output of features()."""
        self.feature_strides = tuple(strides[2:])
        """The factor by which each divides the image's side, rounded up."""
        self.num_features = in_channels
        """Channels of the last stage, which the classifier sees."""
        self.classifier = nn.Linear(in_channels, num_classes)
        xavier_(self)
        use_norm(self, norm)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Output of the last four stages, (N, channels, H / s, W / s), sides rounded up: s = 4, 8, 16, 32, undilated."""
        x = self.bn1(self.conv_stem(images_NCHW))
        outputs = []
        for stage in self.blocks:
            x = stage(x)
            outputs.append(x)
        return tuple(outputs[1:])

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        logits: Tensor = self.classifier(self.features(images_NCHW)[-1].mean((2, 3)))
        return logits
