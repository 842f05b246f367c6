"""DALI's operations on the images of a batch: decode, crop, resize, flip, colour, normalise.

The graph has no state and no randomness: bytes and the images' random numbers go in, pixels come out. A device is a value:
one function makes the CPU's graph ('cpu' operators, device_id=None) and the GPU's ('mixed' decoding, 'gpu' after it). pixels.py
has the operations after the decoding of a training image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types

from fasttricks.config import DataConfig
from fasttricks.data.pipeline.draws import Draws
from fasttricks.data.pipeline.pixels import Pixels, graph_input, normalised, resize_filter

_LONG = 8
"""Sides of an image as 1 to this or more: panoramas are 1 to 5."""


def training_inputs(config: DataConfig, pixels: Pixels, draws: Draws) -> dict[str, NDArray[np.float32]]:
    """The inputs of the training graph for N images besides their files, from their random numbers, by name.

    aspect ~ U[config.aspect]; area ~ U[0, 1) is scaled in the graph, as is the position.
    """
    low, high = config.aspect
    crop = {"aspect": low + (high - low) * draws.aspect, "area": draws.area, "position": draws.position}
    return {name: values.astype(np.float32) for name, values in (crop | pixels.inputs(config, draws)).items()}


def image_graph(
    config: DataConfig, pixels: Pixels | None, *, on_gpu: bool, half: bool, hw_decoder_load: float
) -> tuple[Any, ...]:
    """(images HWC,): the training graph, with the inputs of `training_inputs`, or without `pixels` the validation graph.

    hw_decoder_load: as Loader; DALI's own default is 0.65.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    decoder: dict[str, Any] = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if on_gpu else {"device": "cpu"}
    if pixels is not None:
        window = crop_window(fn.peek_image_shape(encoded), config.area, *map(graph_input, ("aspect", "area"), (0, 0)))
        crops = fn.decoders.image_slice(encoded, axes=(0, 1), **window, **decoder)
        return (pixels.nodes(crops, config, half=half),)
    # on the GPU too, chroma as libjpeg upsamples it: validation does not depend on the device
    images = fn.decoders.image(encoded, jpeg_fancy_upsampling=True, **decoder)
    region = resized_region(fn.peek_image_shape(encoded), config.val_resize, config.image_size)
    # the image onto the rounded size, as PIL does; DALI's default keeps the exact scale and shifts the image
    images = fn.resize(images, **region, subpixel_scale=False, **resize_filter(config))
    return (normalised(images, list(config.mean), config, half=half),)


def resized_region(shape: Any, short_side: int, crop_size: int) -> dict[str, Any]:
    """The resize of an image of `shape` (H, W, C): the whole with its short side at `short_side`, in rounded pixels.

    An image longer than _LONG times its width keeps only the centre of `crop_size` along the long side: one of 1 x 20,000
    would else be 256 x 5,120,000. The centre crop that follows is the same, but for the rounding of float32.
    """
    sides = fn.slice(shape, 0, 2, axes=[0])
    shortest = fn.reductions.min(sides)
    whole = (2 * short_side * sides + shortest) // (2 * shortest)
    cut = whole > _LONG * short_side
    size = cut * crop_size + (1 - cut) * whole
    start = cut * ((whole - crop_size) // 2)
    pixels = fn.cast(sides, dtype=types.FLOAT) / fn.cast(whole, dtype=types.FLOAT)
    return {
        "size": fn.cast(size, dtype=types.FLOAT),
        "roi_start": fn.cast(start, dtype=types.FLOAT) * pixels,
        "roi_end": fn.cast(cut * (start + size), dtype=types.FLOAT) * pixels
        + fn.cast((1 - cut) * sides, dtype=types.FLOAT),
    }


def crop_window(shape: Any, area_range: tuple[float, float], aspect: Any, area: Any) -> dict[str, Any]:
    """Random crop of an image of `shape` (H, W, C), as start and shape relative to the image, (y, x).

    aspect ~ U[config.aspect]; area ~ U[low, min(high, the largest that fits at this aspect)], or that largest where it
    is below low (panoramas); position uniform. So the aspect is uniform for every image. torchvision, timm and DALI's
    own operator draw its logarithm uniformly, and both numbers again until they fit, which bends both towards the
    image's shape; the paper says U[3/4, 4/3].
    """
    low, high = area_range
    # height / width of the image in units of the crop's: a crop is sqrt(area / tall) high and sqrt(area * tall) wide
    height, width = shape[0], shape[1]
    tall = aspect * height / width
    wide = 1.0 / tall
    largest = math.min(math.min(tall, wide), high)
    area = math.min(largest, low + area * (largest - low))
    one_pixel = 1.0 / fn.stack(height, width)  # a crop of an image of two pixels would round to none
    extent = math.max(math.sqrt(area * fn.stack(wide, tall)), one_pixel)
    return {"rel_start": graph_input("position", 1) * (1.0 - extent), "rel_shape": extent}
