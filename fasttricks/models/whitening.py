"""The whitened first layer: filters whose outputs on small patches of the images have variance 1 and no correlation.

Source: Page 2018, How to Train Your ResNet 8; the filters and their negatives, Jordan 2024 (arXiv:2404.00498, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttricks.config import require

ENOUGH_PATCHES = 1_000_000
"""A thousand images of 32 pixels have as many of 2x2 pixels. Their 12 x 12 moments are then exact to a thousandth."""
LEAST_VARIANCE = 5e-4
"""Added to the variances: directions in which patches hardly differ would be noise amplified."""


@torch.no_grad()
def whiten(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the fixed filters of `model`, a network whose config has `whitening`, by the patches of `batches`.

    batches: normalised images (N, 3, H, W), of which as many are read as hold ENOUGH_PATCHES, or all. Moments are float64.
    The last filter has the largest variance's direction; each direction's sign is such that its largest number is positive.
    Raises ConfigError where there is no image. A sync a batch.
    """
    conv = model.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    side, size = conv.kernel_size[0], conv.weight[0].numel()
    moments, count = torch.zeros(size, size, dtype=torch.float64), 0
    for images in batches:
        patches_PS = F.unfold(images.double(), side).transpose(1, 2).reshape(-1, size)
        moments += (patches_PS.T @ patches_PS).cpu()
        count += len(patches_PS)
        if count >= ENOUGH_PATCHES:
            break
    require(count > 0, "model.whitening", True, "needs training images, of which this rank found none")
    variances_S, axes_SS = torch.linalg.eigh(moments / count)
    axes_SS = axes_SS.T
    largest_S = axes_SS.gather(1, axes_SS.abs().argmax(1, keepdim=True))
    filters = axes_SS * largest_S.sign() / (variances_S[:, None] + LEAST_VARIANCE).sqrt()
    conv.weight.copy_(torch.cat([filters, -filters]).view_as(conv.weight))
