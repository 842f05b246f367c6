"""The input pipeline in DALI, the only importer of nvidia.dali: read, decode, crop, resize, flip, colour, normalise.

A device is a value: the same graph function builds the CPU pipeline ('cpu' operators, device_id=None) and the GPU one ('mixed'
decoding, 'gpu' after it). Random numbers and the little arithmetic on them are CPU operators in both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from fasttricks.config import DataConfig
from fasttricks.data import Batch, DataError, ImageFolder
from fasttricks.data.color import color_map, paper_coefficients, published_coefficients

_READER = "files"
_INTERPOLATION = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC, "lanczos3": types.INTERP_LANCZOS3}


class Loader:
    """Batches of one split, an epoch an iteration.

    Every image comes exactly once an epoch, over all ranks. The last batches of an epoch may be short, and on some ranks empty
    (N = 0), so that all ranks take the same number of steps: `global_count(step)` says how many images a step has in all.

    Args:
        folder: what scan_folder found.
        config: sizes, augmentation, threads.
        training: random crop, flip and colour, in an order shuffled anew each epoch; else short side to val_resize, centre crop,
            in the order of `folder.files`.
        batch_size: images of this rank a step.
        device, dtype: of the images. DALI computes float32 or float16; any other dtype is a cast.
        seed: of order and augmentation, 0 or more; equal on all ranks.
        rank, world_size: which of how many equal shards of each epoch this is.
        state: bytes of `state()` of a Loader that was made with equal arguments; go on from there, bit for bit.
    """

    def __init__(
        self,
        folder: ImageFolder,
        config: DataConfig,
        *,
        training: bool,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        state: bytes | None = None,
    ) -> None:
        if len(folder) < world_size:
            raise DataError(f"{folder.root}: {len(folder)} images for {world_size} ranks; each rank needs one or more")
        self.batch_size, self.dtype = batch_size, dtype
        bounds = [len(folder) * r // world_size for r in range(world_size + 1)]
        self._shard_sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        order = np.random.default_rng((seed, 0)).permutation(len(folder)) if training else range(len(folder))
        graph = pipeline_def(_graph)(
            [folder.files[i] for i in order],
            [folder.labels[i] for i in order],
            root=str(folder.root),
            config=config,
            training=training,
            on_gpu=device.type == "cuda",
            half=dtype == torch.float16,
            entropy=(seed, rank),
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            num_threads=config.threads or _threads_per_rank(),
            device_id=(device.index or 0) if device.type == "cuda" else None,
            prefetch_queue_depth=config.prefetch,
            enable_checkpointing=True,
            checkpoint=state,
        )
        graph.build()
        self._iterator = DALIGenericIterator(
            [graph],
            ["images", "labels"],
            reader_name=_READER,
            last_batch_policy=LastBatchPolicy.PARTIAL,
            auto_reset=True,
        )

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""
        return -(-max(self._shard_sizes) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch, or of what is left of it where `state` was taken within one."""
        while True:
            try:
                (outputs,) = self._iterator.next()
            except StopIteration:
                return
            yield Batch(outputs["images"].permute(0, 3, 1, 2).to(self.dtype), outputs["labels"].squeeze(1))

    def global_count(self, step: int) -> int:
        """Images of batch `step` (0 to len - 1) of an epoch, over all ranks. Arithmetic only."""
        return sum(min(max(size - step * self.batch_size, 0), self.batch_size) for size in self._shard_sizes)

    def state(self) -> bytes:
        """Where this loader stands: after the batches yielded so far. Under 1 KB, under 1 ms."""
        checkpoint = self._iterator.checkpoints()[0]
        return checkpoint if isinstance(checkpoint, bytes) else checkpoint.encode("latin-1")


def _threads_per_rank() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Draws:
    """Random operators, each with a seed of its own made from (seed, rank, how many came before it)."""

    def __init__(self, seed: int, rank: int) -> None:
        self._entropy, self._count = (seed, rank), 0

    def _seed(self) -> int:
        self._count += 1
        return stream_seed(*self._entropy, self._count)

    def uniform(self, low: float, high: float, **shape: Any) -> Any:
        return fn.random.uniform(range=[low, high], seed=self._seed(), **shape)

    def normal(self, stddev: float) -> Any:
        return fn.random.normal(stddev=stddev, seed=self._seed())

    def coin(self, probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, seed=self._seed())

    def window(self, shape: Any, config: DataConfig) -> Any:
        return fn.random_crop_generator(
            shape, random_area=list(config.area), random_aspect_ratio=list(config.aspect), seed=self._seed()
        )


def stream_seed(*entropy: int) -> int:
    """A 63-bit seed from non-negative integers. DALI would fold a pipeline's seed to 32 bits, but not an operator's."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def _graph(
    files: list[str], labels: list[int], *, root: str, config: DataConfig, training: bool, on_gpu: bool, half: bool,
    entropy: tuple[int, int], rank: int, world_size: int,
) -> tuple[Any, Any]:
    seed = entropy[0]
    shuffle = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": stream_seed(seed, 0) >> 33} if training else {}
    jpegs, numbers = fn.readers.file(
        name=_READER,
        file_root=root,
        files=files,
        labels=labels,
        **shuffle,
        shard_id=rank,
        num_shards=world_size,
        pad_last_batch=True,
        dont_use_mmap=True,
    )
    draws = _Draws(*entropy)
    size = config.image_size
    decoder = "mixed" if on_gpu else "cpu"
    if training:
        anchor, shape = draws.window(fn.peek_image_shape(jpegs), config)
        images = fn.decoders.image_slice(jpegs, device=decoder, start=anchor, shape=shape, axes=(0, 1))
        flip = fn.cast(draws.coin(config.flip), dtype=types.FLOAT)
        start, end = fn.stack(0.0, flip), fn.stack(1.0, 1.0 - flip)
        images = fn.resize(images, size=[size, size], roi_start=start, roi_end=end, roi_relative=True,
                           interp_type=_INTERPOLATION[config.interpolation], antialias=config.antialias)
    else:
        images = fn.decoders.image(jpegs, device=decoder)
        images = fn.resize(images, resize_shorter=config.val_resize,
                           interp_type=_INTERPOLATION[config.interpolation], antialias=config.antialias)
        images = fn.crop(images, crop=(size, size))
    images = fn.coord_transform(images, MT=_color_matrix(draws, config, training),
                                dtype=types.FLOAT16 if half else types.FLOAT)
    numbers = fn.cast(numbers, dtype=types.INT64)
    return images, numbers.gpu() if on_gpu else numbers


def _color_matrix(draws: _Draws, config: DataConfig, training: bool) -> Any:
    """(3, 4) an image, or one constant where nothing is drawn."""
    color = config.color if training else "none"
    noise = config.pca_noise if training else 0.0
    constant, basis = color_map(color, pca_noise=noise > 0)
    factors = [draws.uniform(1 - config.color_jitter, 1 + config.color_jitter) for _ in range(0 if color == "none" else 3)]
    coefficients = []
    if color == "paper":
        coefficients = paper_coefficients(*factors, cos=math.cos, sin=math.sin)
    elif color == "published":
        coefficients = published_coefficients(*factors)
    if noise > 0:
        coefficients += [draws.normal(noise) for _ in range(3)]
    if not coefficients:
        return constant.ravel().tolist()
    matrix = types.Constant(constant.astype(np.float32), device="cpu")
    for coefficient, block in zip(coefficients, basis, strict=True):
        matrix = matrix + coefficient * types.Constant(block.astype(np.float32), device="cpu")
    return matrix
