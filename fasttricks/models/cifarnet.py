"""A convolutional network for small images in short training: few layers, all of them wide matrix products.

The layout is that of the networks of the CIFAR-10 speed records (Page 2018, How to Train Your ResNet; Jordan 2024, 94% on
CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv:2404.00498), with channels that a CPU has the time for.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fasttricks.models.common import scaled, xavier_
from fasttricks.models.convolution import Conv2d, Conv2dPool
from fasttricks.models.norm import BatchNormAct, Norm, use_norm

STAGES = (32, 128, 128)
"""Channels; each stage halves the image."""
PATCH = 2
"""Side of the first convolution."""
LOGIT_SCALE = 1 / 9
"""The classifier sees maxima over the image of up to several standard deviations: its first logits would be as large."""


class Stage(nn.Module):
    """3x3, 2x2 maximum, batch norm, ReLU; 3x3, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2dPool(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct(channels, "relu")
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct(channels, "relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        out: Tensor = self.bn2(self.conv2(x))
        return out


class CifarNet(nn.Module):
    """2x2 convolution to 24 channels, three stages, maximum over the image, classifier.

    num_classes: 1 or more. width: multiplies the stages' channels, rounded to a multiple of 8 and at least 8.
    whitening: the first convolution has a bias, no batch norm and fixed weights, which whiten() sets; without, it is trained
    and batch norm follows. identity_init: every 3x3 convolution starts by passing its channels on, as far as both sides have
    them; the channels beyond start at random. norm: as ResNet has it. Images: 9 pixels a side at least. Memory: channels-last
    inputs stay channels-last throughout. Nothing here waits for the device.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        width: float = 1.0,
        whitening: bool = False,
        identity_init: bool = False,
        norm: Norm = "auto",
    ) -> None:
        super().__init__()
        patch_size = 3 * PATCH**2
        self.conv1 = nn.Conv2d(3, 2 * patch_size, PATCH, bias=whitening)
        self.bn1 = nn.ReLU(inplace=True) if whitening else BatchNormAct(2 * patch_size, "relu")
        channels = (2 * patch_size, *(scaled(count, width) for count in STAGES))
        self.blocks = nn.Sequential(*(Stage(*pair) for pair in pairwise(channels)))
        self.feature_channels = channels[1:]
        """Channels of each output of features()."""
        self.feature_strides = (2, 4, 8)
        """The factor by which each divides the image's side, roughly."""
        self.num_features = channels[-1]
        """Channels of the last stage, which the classifier sees."""
        self.fc = nn.Linear(self.num_features, num_classes)
        xavier_(self)
        for stage in self.blocks if identity_init else ():
            assert isinstance(stage, Stage)
            for conv in (stage.conv1, stage.conv2):
                nn.init.dirac_(conv.weight.data[: conv.in_channels])
        if whitening:
            self.conv1.weight.requires_grad_(False)
        use_norm(self, norm)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Output of each stage, (N, channels, H / s, W / s): s = 2, 4, 8, sides rounded down from H - 1 and W - 1."""
        x = self.bn1(self.conv1(images_NCHW))
        outputs = []
        for stage in self.blocks:
            x = stage(x)
            outputs.append(x)
        return tuple(outputs)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        logits: Tensor = self.fc(self.features(images_NCHW)[-1].amax((2, 3)))
        return logits * LOGIT_SCALE
