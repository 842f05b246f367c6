"""What DALI does to the images of a batch: decode, crop, resize, flip, colour, normalise.

The graph has no state and no chance: bytes and the images' random numbers go in, pixels come out. A device is a value:
one function makes the CPU's graph ('cpu' operators, device_id=None) and the GPU's ('mixed' decoding, 'gpu' after it). On
the CPU, all that follows the decoding of a training image is one operator (fused.py); on the GPU, all that follows its
resize is one kernel (fasttricks_kernels.augment).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types

from fasttricks.config import DataConfig
from fasttricks.data.pipeline import color
from fasttricks.data.pipeline.draws import Draws
from fasttricks.data.pipeline.fused import Callback, resize_and_color

_FILTERS = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC, "lanczos3": types.INTERP_LANCZOS3}


def augmentation(
    config: DataConfig, draws: Draws, *, fused: bool, color_last: bool = False
) -> dict[str, NDArray[np.float32]]:
    """What a training batch takes of N images, from their random numbers: inputs of the graph by name, besides the files.

    aspect ~ U[config.aspect]; area ~ U[0, 1) is scaled in the graph, as is the position. The `fused` operator takes flip
    (N,) and matrix (N, 3, 4). For DALI's, the flip is a region of the resize that is read from right to left, and there
    is a mean (N, 3) in place of the matrix where there is no colour step. With `color_last` the matrix is not the
    graph's, but for the kernel behind it.
    """
    low, high = config.aspect
    flip = (draws.flip < config.flip).astype(np.float64)
    noise = config.pca_noise * draws.noise
    inputs = {"aspect": low + (high - low) * draws.aspect, "area": draws.area, "position": draws.position}
    if fused:
        inputs["flip"] = flip
    else:
        zero = np.zeros_like(flip)
        inputs |= {"roi_start": np.column_stack([zero, flip]), "roi_end": np.column_stack([zero + 1, 1 - flip])}
    if fused or color_last or config.color != "none":
        factors = 1 + config.color_jitter * (2 * draws.factors - 1)
        inputs["matrix"] = color.color_matrices(config.color, factors, noise)
    else:
        inputs["mean"] = color.noise_means(noise)
    return {name: values.astype(np.float32) for name, values in inputs.items()}


def image_graph(
    config: DataConfig,
    *,
    training: bool,
    callback: Callback | None = None,
    on_gpu: bool,
    half: bool,
    color_last: bool = False,
) -> tuple[Any, ...]:
    """(images HWC,): the training graph, or the validation graph. Training takes what `augmentation` makes.

    With `color_last` the training graph ends after the resize, in uint8.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    decoder = "mixed" if on_gpu else "cpu"
    resize = {"interp_type": _FILTERS[config.interpolation], "antialias": config.antialias}
    dtype = types.FLOAT16 if half else types.FLOAT
    if training:
        window = crop_window(fn.peek_image_shape(encoded), config.area, *map(given, ("aspect", "area"), (0, 0)))
        images = fn.decoders.image_slice(encoded, device=decoder, axes=(0, 1), **window)
        if callback is not None:
            images = resize_and_color(
                images, given("matrix", 2), given("flip", 0), size=config.image_size, callback=callback
            )
            return (fn.cast(images, dtype=dtype) if half else images,)
        # a region read from right to left is a flip that costs nothing
        region = {"roi_start": given("roi_start", 1), "roi_end": given("roi_end", 1), "roi_relative": True}
        images = fn.resize(images, size=[config.image_size] * 2, **region, **resize)
        if color_last:
            return (images,)
    else:
        # on the GPU too, chroma as libjpeg upsamples it: what is measured does not depend on the device
        images = fn.decoders.image(encoded, device=decoder, jpeg_fancy_upsampling=True)
        # the whole image onto the rounded size, as PIL does; DALI's default keeps the exact scale and shifts the image
        images = fn.resize(images, resize_shorter=config.val_resize, subpixel_scale=False, **resize)
    return (_finish(images, config, training, dtype),)


def given(name: str, ndim: int) -> Any:
    """An input of the graph: `ndim` axes an image, float32."""
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=ndim, no_copy=True)


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
    return {"rel_start": given("position", 1) * (1.0 - extent), "rel_shape": extent}


def _finish(images: Any, config: DataConfig, training: bool, dtype: Any) -> Any:
    """Colour and normalisation in one pass: a matrix an image, or crop_mirror_normalize (faster) without one."""
    if training and config.color != "none":
        images = fn.coord_transform(images, MT=given("matrix", 2), dtype=types.FLOAT)  # it has no FP16
        return images if dtype == types.FLOAT else fn.cast(images, dtype=dtype)
    return fn.crop_mirror_normalize(
        images,
        dtype=dtype,
        output_layout="HWC",
        crop=(config.image_size, config.image_size),
        rounding="truncate",
        mean=given("mean", 1) if training else color.MEAN.tolist(),
        std=color.STD.tolist(),
    )
