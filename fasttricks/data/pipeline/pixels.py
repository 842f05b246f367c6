"""The three ways to make a training image of its crop: resize, flip, colour, normalise.

On the CPU that is one compiled operator (fused.py) or, without a compiler, DALI's own; on the GPU it is DALI's resize and,
behind the graph, one kernel for all the rest (fasttricks_kernels.augment). A way is a class, of which `choose_pixels` takes
one; their images agree, but not in the last bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types

from fasttricks.config import DataConfig, require
from fasttricks.data.pipeline import color, fused
from fasttricks.data.pipeline.draws import Draws
from fasttricks.system.transfer import to_device
from fasttricks_kernels import augment
from fasttricks_kernels.native import NativeError

Array = NDArray[np.float64]

_FILTERS = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC, "lanczos3": types.INTERP_LANCZOS3}


class Pixels(ABC):
    """The operations after the decoding of a training image."""

    operators: ClassVar[str]
    """Its name in a saved position."""
    note: str = ""
    """Why it is slower than another, for the header of a run; empty: it is not."""

    @abstractmethod
    def inputs(self, config: DataConfig, draws: Draws) -> dict[str, Array]:
        """The inputs of `nodes` for N images, from their random numbers, by name."""

    @abstractmethod
    def nodes(self, crops: Any, config: DataConfig, *, half: bool) -> Any:
        """The end of the graph: crops (H, W, 3) uint8 -> (S, S, 3), in float16 or float32 where `finish` colours nothing."""

    def finish(self, images: torch.Tensor, config: DataConfig, draws: Draws, *, half: bool) -> torch.Tensor:
        """The graph's (N, S, S, 3) as normalised (N, 3, S, S), channels-last in memory. No sync."""
        return images.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class FusedPixels(Pixels):
    """One pass of the compiled operator on the CPU."""

    callback: fused.Callback
    operators: ClassVar[str] = "fused"

    def inputs(self, config: DataConfig, draws: Draws) -> dict[str, Array]:
        """flip (N,) and matrix (N, 3, 4)."""
        return {"flip": _flips(config, draws), "matrix": _matrices(config, draws)}

    def nodes(self, crops: Any, config: DataConfig, *, half: bool) -> Any:
        """The operator."""
        matrix, flip = graph_input("matrix", 2), graph_input("flip", 0)
        images = fused.resize_and_color(crops, matrix, flip, size=config.image_size, callback=self.callback)
        return _rounded(images, half=half)


@dataclass(frozen=True)
class DaliPixels(Pixels):
    """DALI's operators: resize and flip in one, then colour and normalisation in one."""

    note: str = ""
    operators: ClassVar[str] = "dali"

    def inputs(self, config: DataConfig, draws: Draws) -> dict[str, Array]:
        """The region (N, 2), (N, 2) of the resize, and matrix (N, 3, 4), or mean (N, 3) where there is no colour step."""
        if config.color == "none":
            return _regions(config, draws) | {"mean": color.noise_means(config, config.pca_noise * draws.noise)}
        return _regions(config, draws) | {"matrix": _matrices(config, draws)}

    def nodes(self, crops: Any, config: DataConfig, *, half: bool) -> Any:
        """The colour as a matrix an image; without one, crop_mirror_normalize, which is faster."""
        images = _resize_region(crops, config)
        if config.color == "none":
            return normalised(images, graph_input("mean", 1), config, half=half)
        images = fn.coord_transform(images, MT=graph_input("matrix", 2), dtype=types.FLOAT)  # it has no FP16
        return _rounded(images, half=half)


@dataclass(frozen=True)
class GpuPixels(Pixels):
    """DALI's resize in uint8 and, behind the graph, one kernel.

    Mixup is not in this pass, though the kernel has it: lambda belongs to the step, not to the image, and is drawn there,
    after images were read ahead.
    """

    operators: ClassVar[str] = "gpu"

    def inputs(self, config: DataConfig, draws: Draws) -> dict[str, Array]:
        """The region (N, 2), (N, 2) of the resize."""
        return _regions(config, draws)

    def nodes(self, crops: Any, config: DataConfig, *, half: bool) -> Any:
        """The resize, in uint8."""
        return _resize_region(crops, config)

    def finish(self, images: torch.Tensor, config: DataConfig, draws: Draws, *, half: bool) -> torch.Tensor:
        """The colour and the normalisation, in one launch."""
        matrices = torch.from_numpy(_matrices(config, draws).astype(np.float32))
        dtype = torch.float16 if half else torch.float32
        return augment(images, to_device(matrices, images.device), dtype=dtype)


def choose_pixels(config: DataConfig, *, training: bool, device: torch.device) -> Pixels | None:
    """How training images are made on this device; None for validation, which has one way (graph.py).

    Raises ConfigError where config.operators asks for the compiled operator and it cannot be had.
    """
    if not training:
        return None
    if device.type == "cuda":
        return GpuPixels()
    if config.operators == "dali":
        return DaliPixels()
    try:
        return FusedPixels(fused.find_callback(config.interpolation, antialias=config.antialias))
    except NativeError as error:
        rule = f"the compiled operator cannot be had: {error}; or leave it at auto"
        require(config.operators == "auto", "data.operators", config.operators, rule)
        return DaliPixels(f"resized and coloured by DALI's operators, slower than the compiled one: {error}")


# ------------------------------------------------------------------------------------------- shared by several of them
def graph_input(name: str, ndim: int) -> Any:
    """An input of the graph: `ndim` axes an image, float32."""
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=ndim, no_copy=True)


def resize_filter(config: DataConfig) -> dict[str, Any]:
    """The arguments of DALI's resize that say with which filter."""
    return {"interp_type": _FILTERS[config.interpolation], "antialias": config.antialias}


def normalised(images: Any, mean: Any, config: DataConfig, *, half: bool) -> Any:
    """A node: the centre of config.image_size, minus `mean`, divided by config.std; float16 or float32."""
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC",
        crop=(config.image_size, config.image_size),
        rounding="truncate",
        mean=mean,
        std=list(config.std),
    )


def _flips(config: DataConfig, draws: Draws) -> Array:
    """(N,): 1 where an image is mirrored, else 0."""
    return (draws.flip < config.flip).astype(np.float64)


def _matrices(config: DataConfig, draws: Draws) -> Array:
    """(N, 3, 4): colour, noise and normalisation of each image as one map."""
    factors = 1 + config.color_jitter * (2 * draws.factors - 1)
    return color.color_matrices(config, factors, config.pca_noise * draws.noise)


def _regions(config: DataConfig, draws: Draws) -> dict[str, Array]:
    """The flip as the region of the resize: one that is read from right to left is a flip that costs nothing."""
    flip = _flips(config, draws)
    zero = np.zeros_like(flip)
    return {"roi_start": np.column_stack([zero, flip]), "roi_end": np.column_stack([zero + 1, 1 - flip])}


def _resize_region(crops: Any, config: DataConfig) -> Any:
    """A node: the crops of `_regions`, config.image_size square, uint8."""
    region = {"roi_start": graph_input("roi_start", 1), "roi_end": graph_input("roi_end", 1), "roi_relative": True}
    return fn.resize(crops, size=[config.image_size] * 2, **region, **resize_filter(config))


def _rounded(images: Any, *, half: bool) -> Any:
    return fn.cast(images, dtype=types.FLOAT16) if half else images
