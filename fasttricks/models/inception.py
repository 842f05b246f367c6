"""Inception-V3 (Szegedy et al. 2015, arXiv:1512.00567), for images of 299 pixels.

Read from the bottom: `InceptionV3` is a stem and eleven mixed blocks; a mixed block is a table of branches; a branch is a
row of convolutions. State-dict keys and outputs are those of torchvision's inception_v3 (with transform_input=False), so its
weights load strictly. tests/test_models_other.py compares them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, cat, nn
from torch.nn import functional as F

from fasttricks.models.common import scaled, xavier_
from fasttricks.models.norm import BatchNormAct, Norm, use_norm
from fasttricks.models.pool import max_pool


class Conv(NamedTuple):
    """A convolution of a branch: its key, output channels and kernel (height, width). Stride 1 pads, stride 2 does not."""

    key: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Fork(NamedTuple):
    """Two convolutions of the same input, side by side: the end of a branch."""

    left: Conv
    right: Conv


AVERAGE = "average"
"""The step of a branch that averages 3x3 at stride 1; the zeros of its padding count."""
MAXIMUM = "maximum"
"""The step of a branch that takes the maximum of 3x3 at stride 2, without padding."""
Branch = tuple[Conv | Fork | str, ...]


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = BatchNormAct(channels, "relu", eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class Mixed(nn.Module):
    """Branches side by side on one input, their channels concatenated."""

    def __init__(self, in_channels: int, branches: tuple[Branch, ...], width: float) -> None:
        super().__init__()
        self.branches = branches
        self.out_channels = sum(self._add(in_channels, branch, width) for branch in branches)

    def _add(self, in_channels: int, branch: Branch, width: float) -> int:
        """Make the convolutions of a branch; returns its output channels."""
        channels = in_channels
        for step in branch:
            if isinstance(step, str):
                continue
            ends = step if isinstance(step, Fork) else (step,)
            for conv in ends:
                padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.stride == 1 else 0
                layer = ConvNorm(channels, scaled(conv.channels, width), conv.kernel, conv.stride, padding)
                self.add_module(conv.key, layer)
            channels = sum(scaled(conv.channels, width) for conv in ends)
        return channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            out = x
            for step in branch:
                if isinstance(step, Fork):
                    outputs.append(getattr(self, step.left.key)(out))
                    out = getattr(self, step.right.key)(out)
                elif isinstance(step, Conv):
                    out = getattr(self, step.key)(out)
                else:
                    out = F.avg_pool2d(out, 3, stride=1, padding=1) if step == AVERAGE else max_pool(out, 3, stride=2)
            outputs.append(out)
        return cat(outputs, 1)


def mixed_5(pool_channels: int) -> tuple[Branch, ...]:
    """At 35 x 35: 1x1, 5x5, two 3x3."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (AVERAGE, Conv("branch_pool", pool_channels)),
    )


MIXED_6A: tuple[Branch, ...] = (
    (Conv("branch3x3", 384, (3, 3), 2),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)),
    (MAXIMUM,),
)
"""35 x 35 to 17 x 17."""


def mixed_6(inner: int) -> tuple[Branch, ...]:
    """At 17 x 17: 1x1, 7x7 and two 7x7, each 7x7 as a 1x7 and a 7x1."""
    wide, tall = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, wide), Conv("branch7x7_3", 192, tall)),
        (
            Conv("branch7x7dbl_1", inner), Conv("branch7x7dbl_2", inner, tall), Conv("branch7x7dbl_3", inner, wide),
            Conv("branch7x7dbl_4", inner, tall), Conv("branch7x7dbl_5", 192, wide),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )  # fmt: skip


MIXED_7A: tuple[Branch, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
    (
        Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)), Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2),
    ),
    (MAXIMUM,),
)  # fmt: skip
"""17 x 17 to 8 x 8."""
MIXED_7: tuple[Branch, ...] = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), Fork(Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
    (
        Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)),
        Fork(Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (AVERAGE, Conv("branch_pool", 192)),
)  # fmt: skip
"""At 8 x 8: 1x1, and 3x3s whose last is a 1x3 and a 3x1 side by side."""
STAGES: dict[int, dict[str, tuple[Branch, ...]]] = {
    5: {"b": mixed_5(32), "c": mixed_5(64), "d": mixed_5(64)},
    6: {"a": MIXED_6A, "b": mixed_6(128), "c": mixed_6(160), "d": mixed_6(160), "e": mixed_6(192)},
    7: {"a": MIXED_7A, "b": MIXED_7, "c": MIXED_7},
}
"""Number of a stage -> its mixed blocks by letter, as they follow each other."""


class AuxiliaryHead(nn.Module):
    """A second classifier on the 17 x 17 stage, whose loss helps the layers below it learn. Not used after training."""

    def __init__(self, in_channels: int, num_classes: int, width: float) -> None:
        super().__init__()
        inner, out = scaled(128, width), scaled(768, width)
        self.conv0 = ConvNorm(in_channels, inner, 1)
        self.conv1 = ConvNorm(inner, out, 5)
        self.fc = nn.Linear(out, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, stride=3)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class InceptionV3(nn.Module):
    """Stem, eleven mixed blocks in three stages, mean over the image, dropout of 0.5, classifier.

    num_classes: 1 or more. width: multiplies every channel count, rounded to a multiple of 8 and at least 8.
    aux_head: in training, forward also returns the logits of the auxiliary head; the paper's runs have none.
    norm: as ResNet has it.
    Images: 75 pixels a side at least, 299 with the auxiliary head and in the paper. There is no residual block, so zero
    gamma does not apply. Memory: channels-last inputs stay channels-last throughout. Nothing here waits for the device.
    """

    def __init__(
        self, *, num_classes: int = 1000, width: float = 1.0, aux_head: bool = False, norm: Norm = "auto"
    ) -> None:
        super().__init__()
        stem = [scaled(channels, width) for channels in (32, 32, 64, 80, 192)]
        self.Conv2d_1a_3x3 = ConvNorm(3, stem[0], 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(stem[0], stem[1], 3)
        self.Conv2d_2b_3x3 = ConvNorm(stem[1], stem[2], 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(stem[2], stem[3], 1)
        self.Conv2d_4a_3x3 = ConvNorm(stem[3], stem[4], 3)
        channels = stem[-1]
        feature_channels = [channels]
        self.AuxLogits: AuxiliaryHead | None = None
        for stage, blocks in STAGES.items():
            for letter, branches in blocks.items():
                block = Mixed(channels, branches, width)
                self.add_module(f"Mixed_{stage}{letter}", block)
                channels = block.out_channels
            feature_channels.append(channels)
            if stage == 6 and aux_head:
                self.AuxLogits = AuxiliaryHead(channels, num_classes, width)
        self.feature_channels = tuple(feature_channels)
        """Channels of each output of features()."""
        self.feature_strides = (4, 8, 16, 32)
        """The factor by which each divides the image's side, apart from the edges that are not padded."""
        self.num_features = channels
        """Channels of the last stage, which the classifier sees."""
        self.fc = nn.Linear(channels, num_classes)
        xavier_(self)
        use_norm(self, norm)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Stem and stages before each halving, (N, channels, side, side): sides 71, 35, 17, 8 for 299; no layer but the
        mixed blocks pads, so a side is not just the image's divided by 4, 8, 16, 32."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images_NCHW)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x, 3, stride=2)))
        outputs = [x]
        x = max_pool(x, 3, stride=2)
        for stage, blocks in STAGES.items():
            for letter in blocks:
                x = getattr(self, f"Mixed_{stage}{letter}")(x)
            outputs.append(x)
        return tuple(outputs)

    def forward(self, images_NCHW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, num_classes) of normalised images (N, 3, H, W); in training with an auxiliary head (logits, its logits)."""
        features = self.features(images_NCHW)
        logits: Tensor = self.fc(F.dropout(features[-1].mean((2, 3)), 0.5, self.training))
        if self.training and self.AuxLogits is not None:
            return logits, self.AuxLogits(features[2])
        return logits
