"""ResNet in the paper's variants A, B, C and D (section 4), from 8 to 152 layers.

Read from the bottom: a variant is one replaced field on top of the one before, `ResNet` puts stem, stages and
classifier together, a block is path A + path B. State-dict keys are those of torchvision (its resnet50 is our B) and
timm (resnet50c, resnet50d), so their weights load strictly. tests/test_models.py compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fasttricks.models.common import scaled, xavier_
from fasttricks.models.convolution import Conv2d
from fasttricks.models.norm import BatchNormAct, Norm, second_use, use_norm
from fasttricks.models.pool import MaxPool


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


class Walk(NamedTuple):
    """The steps of a block over its input."""

    stride: int = 1
    first_dilation: int = 1
    """Dilation of its first 3x3."""
    dilation: int = 1
    """Dilation of its second 3x3, and of the next blocks."""

    @property
    def begins_stage(self) -> bool:
        """Whether it strides, or would without dilation: its first 3x3 still has the distances of the stage before."""
        return self.stride > 1 or self.dilation > self.first_dilation


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return Conv2d(in_channels, out_channels, kernel, stride, padding=padding, dilation=dilation, bias=False)


class Block(nn.Module):
    """relu(path_a(x) + path_b(x)); path B is the identity, or `downsample` where the shape changes."""

    expansion: int
    """Output channels / channels."""
    downsample: nn.Module | None

    def path_a(self, x: Tensor) -> Tensor:
        """Path A up to its last batch norm."""
        raise NotImplementedError

    @property
    def last_norm(self) -> BatchNormAct:
        """The batch norm that ends path A, to which path B is added."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for_b = second_use(x)
        shortcut = for_b if self.downsample is None else self.downsample(for_b)
        out: Tensor = self.last_norm(self.path_a(x), shortcut)
        return out

    @classmethod
    def make_downsample(cls, in_channels: int, channels: int, walk: Walk, spec: ResNetSpec) -> nn.Module | None:
        """Path B of a block, None for the identity."""
        out_channels = channels * cls.expansion
        if not walk.begins_stage and in_channels == out_channels:
            return None
        norm = BatchNormAct(out_channels)
        if not spec.pool_shortcut:
            return nn.Sequential(_conv(in_channels, out_channels, 1, walk.stride), norm)
        return nn.Sequential(_pool(walk), _conv(in_channels, out_channels, 1), norm)


def _pool(walk: Walk) -> nn.Module:
    """The 2x2 average of a block's path B in variant D; nothing in its place where the block does not begin a stage."""
    if walk.stride > 1:
        # ceil_mode keeps an odd side's last row, as the 3x3 of path A does; it is averaged over the pixels it has.
        return nn.AvgPool2d(2, walk.stride, ceil_mode=True)
    if walk.begins_stage:  # the same averages at each place, as timm has them: zeros follow the last row and column
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))
    return nn.Identity()


class BasicBlock(Block):
    """Two 3x3 (ResNet-34 and below). There is no first 1x1 to stride in, so variants A and B are the same."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, walk: Walk, spec: ResNetSpec) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, walk.stride, walk.first_dilation)
        self.bn1 = BatchNormAct(channels, "relu")
        self.conv2 = _conv(channels, channels, 3, dilation=walk.dilation)
        self.bn2 = BatchNormAct(channels, "relu")
        self.downsample = self.make_downsample(in_channels, channels, walk, spec)

    def path_a(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.bn1(self.conv1(x)))
        return out

    @property
    def last_norm(self) -> BatchNormAct:
        return self.bn2


class Bottleneck(Block):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many (ResNet-50 and above)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, walk: Walk, spec: ResNetSpec) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (1, walk.stride) if spec.stride_in_3x3 else (walk.stride, 1)
        self.conv1 = _conv(in_channels, channels, 1, stride_1x1)
        self.bn1 = BatchNormAct(channels, "relu")
        self.conv2 = _conv(channels, channels, 3, stride_3x3, walk.first_dilation)
        self.bn2 = BatchNormAct(channels, "relu")
        self.conv3 = _conv(channels, channels * self.expansion, 1)
        self.bn3 = BatchNormAct(channels * self.expansion, "relu")
        self.downsample = self.make_downsample(in_channels, channels, walk, spec)

    def path_a(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        out: Tensor = self.conv3(x)
        return out

    @property
    def last_norm(self) -> BatchNormAct:
        return self.bn3


class ResNet(nn.Module):
    """Stem, stages of residual blocks, mean over the image, classifier.

    num_classes: 1 or more. width: multiplies every channel count, rounded to a multiple of 8 and at least 8.
    stem_stride: the factor by which the stem divides the image's side: 4 (the paper: stride 2, then max-pooling), 2 (no pooling)
    or 1 (neither, and a 3x3 for the 7x7); the last two are for images of 32 pixels.
    zero_gamma: gamma of each block's last batch norm starts at 0, so each block starts as its path B (section 3.1).
    output_stride: the factor by which the last stage divides the image's side, at most: a stage that would divide it by more is
    dilated instead, for segmentation (section 6.2). The state-dict keys stay. The oracles, torchvision's
    replace_stride_with_dilation and timm's output_stride, are in tests/test_models_dilated.py.
    norm: fused: batch norm, the addition of path B and ReLU are one operator; torch: they are torch's own three; auto: as
    BatchNormAct has it.
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
        output_stride: Literal[8, 16, 32] = 32,
        norm: Norm = "auto",
    ) -> None:
        super().__init__()
        in_channels = scaled(64, width)
        self.conv1 = _stem_conv(spec.deep_stem, scaled(32, width), in_channels, stem_stride)
        self.bn1 = BatchNormAct(in_channels, "relu")
        self.maxpool = MaxPool(3, stride=2, padding=1) if stem_stride == 4 else nn.Identity()
        feature_channels = []
        walks = _stage_walks(len(spec.depths), stem_stride, output_stride)
        for stage, (depth, first) in enumerate(zip(spec.depths, walks, strict=True)):
            channels = scaled(64 * 2**stage, width)
            blocks = []
            for index in range(depth):
                walk = Walk(1, first.dilation, first.dilation) if index else first
                blocks.append(spec.block(in_channels, channels, walk, spec))
                in_channels = channels * spec.block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            feature_channels.append(in_channels)
        self.feature_channels = tuple(feature_channels)
        """Channels of each output of features()."""
        self.feature_strides = tuple(accumulate((walk.stride for walk in walks), mul, initial=stem_stride))[1:]
        """The factor by which each divides the image's side, rounded up."""
        self.num_features = in_channels
        """Channels of the last stage, which the classifier sees."""
        self.fc = nn.Linear(in_channels, num_classes)
        xavier_(self)
        every = [module for module in self.modules() if isinstance(module, Block)]
        for block in every if zero_gamma else ():
            nn.init.zeros_(block.last_norm.weight)
        for block in every[:-1]:  # paths A and B of the next begin there
            block.last_norm.forks = True
        use_norm(self, norm)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Output of each stage, (N, channels, H / s, W / s), sides rounded up: s = 4, 8, 16, 32 for stem_stride 4, undilated.

        As feature_channels and feature_strides say.
        """
        x = self.maxpool(self.bn1(self.conv1(images_NCHW)))
        outputs = []
        for stage in range(len(self.feature_channels)):
            x = getattr(self, f"layer{stage + 1}")(x)
            outputs.append(x)
        return tuple(outputs)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of normalised images (N, 3, H, W)."""
        logits: Tensor = self.fc(self.features(images_NCHW)[-1].mean((2, 3)))
        return logits


def _stage_walks(stages: int, stem_stride: int, output_stride: int) -> list[Walk]:
    """The first block's walk in each stage. All stages but the first have a stride of 2, as far as output_stride lets them."""
    walks = [Walk()]
    for stage in range(1, stages):
        total, before = stem_stride * 2 ** (stage - 1), walks[-1].dilation
        walks.append(Walk(2) if total < output_stride else Walk(1, before, 2 * before))
    return walks


def _stem_conv(deep: bool, inner: int, out: int, stem_stride: int) -> nn.Module:
    stride = 1 if stem_stride == 1 else 2
    if not deep:
        return _conv(3, out, 3 if stem_stride == 1 else 7, stride)
    # the third of each is where torchvision's and timm's ReLU is, so that the keys are theirs
    first = (_conv(3, inner, 3, stride), BatchNormAct(inner, "relu"), nn.Identity())
    second = (_conv(inner, inner, 3), BatchNormAct(inner, "relu"), nn.Identity())
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
