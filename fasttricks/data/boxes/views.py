"""An image and its boxes as the network sees them, by torchvision.transforms.v2 with tv_tensors.

As in Faster R-CNN (Ren et al. 2015, section 3.3) and the authors' code: the short side is scaled to detect.base_size, but the
long one to detect.max_size at most. In training the image is mirrored with a probability, and no more.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from fasttricks.config import DataConfig, DetectConfig
from fasttricks.data.annotated.pixels import resize, short_side_to
from fasttricks.data.pipeline.draws import image_draws


def shown_size(height: int, width: int, detect: DetectConfig) -> tuple[int, int]:
    """(height, width) in which an image of that size is shown, as by torchvision's Resize(base_size, max_size); 1 at least."""
    height, width = short_side_to(detect.base_size, height, width)
    short, long = min(height, width), max(height, width)
    if long > detect.max_size:
        short, long = max(1, int(detect.max_size * short / long)), detect.max_size
    return (short, long) if height < width else (long, short)


def draw_flip(data: DataConfig, *, seed: int, epoch: int, place: int) -> bool:
    """Whether training mirrors that image in `epoch`. A pure function of its arguments."""
    return float(image_draws(seed, epoch, np.array([place])).flip[0]) < data.flip


def show(
    image: NDArray[np.uint8], xyxy: NDArray[np.float32], flip: bool, data: DataConfig, detect: DetectConfig
) -> tuple[Tensor, Tensor]:
    """uint8 (h, w, 3) and float32 (n, 4): the view of an image (H, W, 3) and its boxes (n, 4)."""
    before = (image.shape[0], image.shape[1])
    size = shown_size(*before, detect)
    pixels: Tensor = resize(image, size, data)
    boxes: Tensor = tv_tensors.BoundingBoxes(torch.from_numpy(xyxy), format="XYXY", canvas_size=before)
    boxes = functional.resize(boxes, list(size))
    if flip:
        pixels, boxes = functional.horizontal_flip(pixels), functional.horizontal_flip(boxes)
    return pixels.permute(1, 2, 0).contiguous(), boxes.as_subclass(Tensor)
