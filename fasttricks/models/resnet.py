"""ResNet in the paper's variants A, B, C and D (section 4), from 8 to 152 layers.

Read from the bottom: a variant is one replaced field on top of the one before, `ResNet` puts stem, stages and
classifier together, a block is path A + path B. State-dict keys are those of torchvision (its resnet50 is our B) and
timm (resnet50c, resnet50d), so their weights load strictly. tests/test_models.py compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fasttricks.models.common import scaled, xavier_


@dataclass(frozen=True)
class ResNetSpec:
    """The differences between ResNets. The defaults of the three tweaks are variant A."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    """Blocks in each stage; a stage has twice the channels of the one before, beginning at 64."""
    stride_in_3x3: bool = False
    """B: a down-sampling bottleneck strides in its 3x3, where no input is skipped, instead of in its first 1x1."""
    deep_stem: bool = False
    """C: three 3x3 convolutions (32, 32, 64 channels) instead of one 7x7."""
    pool_shortcut: bool = False
    """D: path B averages 2x2 before a 1x1 of stride 1, instead of a 1x1 of stride 2 that skips 3/4 of its input."""


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """relu(path_a(x) + path_b(x)); path B is the identity, or `downsample` where the shape changes."""

    expansion: int
    """Output channels / channels."""
    downsample: nn.Module | None

    def path_a(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm that ends path A."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        # In place is safe: batch norm's backward needs its input, not its output, and relu's needs its own output.
        out: Tensor = F.relu(self.path_a(x).add_(shortcut), inplace=True)
        return out

    @classmethod
    def make_downsample(cls, in_channels: int, channels: int, stride: int, spec: ResNetSpec) -> nn.Module | None:
        """Path B of a block, None for the identity."""
        out_channels = channels * cls.expansion
        if stride == 1 and in_channels == out_channels:
            return None
        norm = nn.BatchNorm2d(out_channels)
        if not spec.pool_shortcut:
            return nn.Sequential(_conv(in_channels, out_channels, 1, stride), norm)
        # ceil_mode keeps an odd side's last row, as the 3x3 of path A does; it is averaged over the pixels it has.
        pool = nn.AvgPool2d(2, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        return nn.Sequential(pool, _conv(in_channels, out_channels, 1), norm)


class BasicBlock(Block):
    """Two 3x3 (ResNet-34 and below). There is no first 1x1 to stride in, so variants A and B are the same."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, spec: ResNetSpec) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = self.make_downsample(in_channels, channels, stride, spec)

    def path_a(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out: Tensor = self.bn2(self.conv2(x))
        return out

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(Block):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many (ResNet-50 and above)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, spec: ResNetSpec) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (1, stride) if spec.stride_in_3x3 else (stride, 1)
        self.conv1 = _conv(in_channels, channels, 1, stride_1x1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride_3x3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, channels * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = self.make_downsample(in_channels, channels, stride, spec)

    def path_a(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        out: Tensor = self.bn3(self.conv3(x))
        return out

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean over the image, classifier.

    num_classes: 1 or more. width: multiplies every channel count, rounded to a multiple of 8 and at least 8.
    stem_stride: the factor by which the stem divides the image's side: 4 (the paper: stride 2, then max-pooling), 2 (no pooling)
    or 1 (neither, and a 3x3 for the 7x7); the last two are for images of 32 pixels.
    zero_gamma: gamma of each block's last batch norm starts at 0, so each block starts as its path B (section 3.1).
    Memory: channels-last inputs stay channels-last throughout. Nothing here waits for the device.
    """

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        num_classes: int = 1000,
        width: float = 1.0,
        stem_stride: Literal[4, 2, 1] = 4,
        zero_gamma: bool = False,
    ) -> None:
        super().__init__()
        in_channels = scaled(64, width)
        self.conv1 = _stem_conv(spec.deep_stem, scaled(32, width), in_channels, stem_stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem_stride == 4 else nn.Identity()
        feature_channels = []
        for stage, depth in enumerate(spec.depths):
            channels = scaled(64 * 2**stage, width)
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(spec.block(in_channels, channels, stride, spec))
                in_channels = channels * spec.block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            feature_channels.append(in_channels)
        self.feature_channels = tuple(feature_channels)
        """Channels of each output of features()."""
        self.feature_strides = tuple(stem_stride * 2**stage for stage in range(len(feature_channels)))
        """The factor by which each divides the image's side, rounded up."""
        self.num_features = in_channels
        """Channels of the last stage, which the classifier sees."""
        self.fc = nn.Linear(in_channels, num_classes)
        xavier_(self)
        if zero_gamma:
            for block in self.modules():
                if isinstance(block, Block):
                    nn.init.zeros_(block.last_norm.weight)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Output of each stage, (N, channels, H / s, W / s), sides rounded up: s = 4, 8, 16, 32 for stem_stride 4.

        As feature_channels and feature_strides say.
        """
        x = self.maxpool(F.relu(self.bn1(self.conv1(images_NCHW)), inplace=True))
        outputs = []
        for stage in range(len(self.feature_channels)):
            x = getattr(self, f"layer{stage + 1}")(x)
            outputs.append(x)
        return tuple(outputs)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        logits: Tensor = self.fc(self.features(images_NCHW)[-1].mean((2, 3)))
        return logits


def _stem_conv(deep: bool, inner: int, out: int, stem_stride: int) -> nn.Module:
    stride = 1 if stem_stride == 1 else 2
    if not deep:
        return _conv(3, out, 3 if stem_stride == 1 else 7, stride)
    first = (_conv(3, inner, 3, stride), nn.BatchNorm2d(inner), nn.ReLU(inplace=True))
    second = (_conv(inner, inner, 3), nn.BatchNorm2d(inner), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *second, _conv(inner, out, 3))


LAYOUTS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    8: (BasicBlock, (1, 1, 1)),
    10: (BasicBlock, (1, 1, 1, 1)),
    11: (Bottleneck, (1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Layers -> block and blocks a stage. 8, 10 and 11 are ours, for small data and for the CPU."""


def resnet_a(depth: int) -> ResNetSpec:
    """The original."""
    return ResNetSpec(*LAYOUTS[depth])


def resnet_b(depth: int) -> ResNetSpec:
    """A with the stride of path A in the 3x3; torchvision's resnet50."""
    return replace(resnet_a(depth), stride_in_3x3=True)


def resnet_c(depth: int) -> ResNetSpec:
    """B with the 7x7 stem in three 3x3."""
    return replace(resnet_b(depth), deep_stem=True)


def resnet_d(depth: int) -> ResNetSpec:
    """C with average pooling before the 1x1 of path B."""
    return replace(resnet_c(depth), pool_shortcut=True)
