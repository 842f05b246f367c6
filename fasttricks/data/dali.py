"""The input pipeline in DALI, the only importer of nvidia.dali: read, decode, crop, resize, flip, colour, normalise.

A device is a value: one graph function makes the CPU pipeline ('cpu' operators, device_id=None) and the GPU one
('mixed' decoding, 'gpu' after it). Random numbers, and the little arithmetic on them, are CPU operators in both.

Order of reading: Loader, the graph, the reader's order, the search for a damaged file. Over 300 lines, because no other
file may import DALI.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from fasttricks.config import DataConfig
from fasttricks.data import Batch, DataError, ImageFolder, color
from fasttricks.data.shards import Shards

_READER = "reader"
_FILTERS = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC, "lanczos3": types.INTERP_LANCZOS3}


class Loader:
    """Batches of one split, an epoch an iteration.

    Every image comes exactly once an epoch, over all ranks. The last batch of an epoch may be short, and on some ranks
    empty (N = 0), so that all ranks take the same number of steps; `global_count(step)` says how many images a step has
    in all.

    Args:
        folder: what scan_folder found.
        config: sizes, augmentation, threads.
        training: random crop, flip and colour, in an order shuffled anew each epoch; else short side to val_resize,
            centre crop,
            in the order of `folder.files`.
        batch_size: images of this rank a step, 1 or more.
        device: of the batches. cuda decodes and augments on the GPU.
        dtype: of the images. float32 and float16 are computed by DALI, any other is a cast.
        seed: of order and augmentation, 0 or more, equal on all ranks.
        rank, world_size: which of how many equal parts of each epoch this is.
        state: what `state()` of a Loader of equal arguments gave: go on from there, bit for bit.

    Raises DataError for fewer images than ranks and for a state of another data set, seed, batch size or sharding;
    while iterating, for an image that cannot be decoded, which it names.

    Deterministic: `config.threads` and `config.prefetch` change no bit. Oracle: reference.py.
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
        self.shards = Shards(
            num_images=len(folder), batch_size=batch_size, world_size=world_size, source=str(folder.root)
        )
        self._config, self._dtype = config, dtype
        self._reader = _reader_arguments(folder, training, seed, rank, world_size)
        self._identity = {
            "training": training,
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "files": _digest(folder),
        }
        self._epoch, self._step, checkpoint = _unpack(state, self._identity, folder.root)
        on_gpu = device.type == "cuda"
        pipeline = pipeline_def(_graph)(
            self._reader,
            config,
            Draws(seed, rank) if training else None,
            on_gpu=on_gpu,
            half=dtype == torch.float16,
            batch_size=batch_size,
            num_threads=config.threads or _threads_per_rank(),
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=config.prefetch,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        pipeline.build()
        # PARTIAL with pad_last_batch is the one combination that gives each image once in every epoch
        self._iterator = DALIGenericIterator(
            [pipeline],
            ["images", "labels"],
            reader_name=_READER,
            last_batch_policy=LastBatchPolicy.PARTIAL,
            auto_reset=True,
            prepare_first_batch=False,  # an undecodable image is met while iterating, never in the constructor
        )

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""
        return len(self.shards)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch, or what is left of it after a restored state or an iteration left early."""
        while True:
            try:
                (outputs,) = self._iterator.next()
            except StopIteration:
                self._epoch, self._step = self._epoch + 1, 0
                return
            except RuntimeError as error:
                self._name_undecodable(error)
                raise
            self._step += 1
            yield Batch(outputs["images"].permute(0, 3, 1, 2).to(self._dtype), outputs["labels"].squeeze(1))

    @property
    def smallest_batch(self) -> int:
        """Images of the smallest batch that any rank gets in an epoch, empty ones aside."""
        return self.shards.smallest_batch

    def global_count(self, step: int) -> int:
        """Images of batch `step`, 0 to len - 1, over all ranks. Arithmetic on the host."""
        return self.shards.global_count(step)

    def state(self) -> bytes:
        """Position and random generators after the batches yielded so far: 0.6 to 3.4 KB, about 1 ms."""
        dali = base64.b64encode(self._iterator.checkpoints()[0]).decode()
        return json.dumps({**self._identity, "epoch": self._epoch, "step": self._step, "dali": dali}).encode()

    def _name_undecodable(self, error: RuntimeError) -> None:
        """Raise DataError if a file of the batches in flight cannot be decoded; return if the trouble is another.

        DALI names no file for most kinds of damage. So the batch that failed, and those prefetched after it, are
        decoded file by file. Cost: a few seconds, and one tiny read for each image that this rank has seen since the
        run began.
        """
        first = self._step * self.shards.batch_size
        last = first + (1 + self._config.prefetch) * self.shards.batch_size
        root = Path(self._reader["file_root"])
        bad = [file for file in _read_order(self._reader, self._epoch, first, last) if not _decodes(root / file)]
        if bad:
            raise DataError(
                f"{root}: cannot decode {', '.join(bad)}: the file is damaged or of a format that DALI does not read; "
                f"repair or re-encode it under the same name and go on with --resume, or remove it and start anew"
            ) from error


class Draws:
    """Random operators of a graph, each with a seed of its own made from (seed, rank, how many were made before it).

    DALI would fold a seed given to the pipeline to 32 bits, so that seeds 2^32 apart collide; an operator's own keeps
    63.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._entropy, self._made = (seed, rank), 0

    def _next_seed(self) -> int:
        self._made += 1
        return stream_seed(*self._entropy, self._made)

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Any:
        if low == high:  # DALI refuses an empty range
            return _constant(np.full(shape, low))
        return fn.random.uniform(range=[low, high], shape=shape, seed=self._next_seed())

    def normal(self, stddev: float, shape: tuple[int, ...] = ()) -> Any:
        return fn.random.normal(stddev=stddev, shape=shape, seed=self._next_seed())

    def coin(self, probability: float) -> Any:
        return fn.cast(fn.random.coin_flip(probability=probability, seed=self._next_seed()), dtype=types.FLOAT)


def stream_seed(seed: int, rank: int = 0, number: int = 0) -> int:
    """A 63-bit seed, well mixed: neighbours give unrelated streams. seed below 2^64, rank and number below 2^32."""
    # one integer: numpy cuts a tuple into 32-bit words of no fixed width, so that (2^32, 1) meets (0, 1, 1)
    entropy = seed | rank << 64 | number << 96
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def _graph(
    reader: dict[str, Any], config: DataConfig, draws: Draws | None, *, on_gpu: bool, half: bool
) -> tuple[Any, Any]:
    """(images HWC, labels): the training graph with `draws`, the validation graph without."""
    encoded, labels = fn.readers.file(name=_READER, **reader)
    labels = fn.cast(labels, dtype=types.INT64)
    decoder = "mixed" if on_gpu else "cpu"
    resize = {"interp_type": _FILTERS[config.interpolation], "antialias": config.antialias}
    dtype = types.FLOAT16 if half else types.FLOAT
    if draws is None:
        # on the GPU too, chroma as libjpeg upsamples it: what is measured does not depend on the device
        images = fn.decoders.image(encoded, device=decoder, jpeg_fancy_upsampling=True)
        # the whole image onto the rounded size, as PIL does; DALI's default keeps the exact scale and shifts the image
        images = fn.resize(images, resize_shorter=config.val_resize, subpixel_scale=False, **resize)
    else:
        window = crop_window(fn.peek_image_shape(encoded), config, draws)
        images = fn.decoders.image_slice(encoded, device=decoder, axes=(0, 1), **window)
        # a region read from right to left is a flip that costs nothing
        flip = draws.coin(config.flip)
        region = {"roi_start": fn.stack(0.0, flip), "roi_end": fn.stack(1.0, 1.0 - flip), "roi_relative": True}
        images = fn.resize(images, size=[config.image_size] * 2, **region, **resize)
    images = _finish(images, config, draws, dtype)
    return images, labels.gpu() if on_gpu else labels


def crop_window(shape: Any, config: DataConfig, draws: Draws) -> dict[str, Any]:
    """Random crop of an image of `shape` (H, W, C), as start and shape relative to the image, (y, x).

    aspect ~ U[config.aspect]; area ~ U[low, min(high, the largest that fits at this aspect)], or that largest where it
    is below low (panoramas); position uniform. So the aspect is uniform for every image. torchvision, timm and DALI's
    own operator draw its logarithm uniformly, and both numbers again until they fit, which bends both towards the
    image's shape; the paper says U[3/4, 4/3].
    """
    (low, high), aspect = config.area, draws.uniform(*config.aspect)
    # height / width of the image in units of the crop's: a crop is sqrt(area / tall) high and sqrt(area * tall) wide
    height, width = shape[0], shape[1]
    tall = aspect * height / width
    wide = 1.0 / tall
    largest = math.min(math.min(tall, wide), high)
    area = math.min(largest, low + draws.uniform(0.0, 1.0) * (largest - low))
    one_pixel = 1.0 / fn.stack(height, width)  # a crop of an image of two pixels would round to none
    extent = math.max(math.sqrt(area * fn.stack(wide, tall)), one_pixel)
    return {"rel_start": draws.uniform(0.0, 1.0, shape=(2,)) * (1.0 - extent), "rel_shape": extent}


def _finish(images: Any, config: DataConfig, draws: Draws | None, dtype: Any) -> Any:
    """Colour and normalisation in one pass: a matrix an image, or crop_mirror_normalize (faster) without one."""
    if draws is not None and config.color != "none":
        images = fn.coord_transform(images, MT=_color_matrix(config, draws), dtype=types.FLOAT)  # it has no FP16
        return images if dtype == types.FLOAT else fn.cast(images, dtype=dtype)
    mean: Any = color.MEAN.tolist()
    if draws is not None and config.pca_noise > 0:  # x + noise - mean = x - (mean - noise)
        axes = (-color.PCA_VECTORS * color.PCA_VALUES).ravel().tolist()
        mean = fn.reshape(fn.coord_transform(draws.normal(config.pca_noise, shape=(1, 3)), M=axes, T=mean), shape=[3])
    return fn.crop_mirror_normalize(
        images,
        dtype=dtype,
        output_layout="HWC",
        crop=(config.image_size, config.image_size),
        rounding="truncate",
        mean=mean,
        std=color.STD.tolist(),
    )


def _color_matrix(config: DataConfig, draws: Draws) -> Any:
    """(3, 4) an image: the sum of color.ColorMap, evaluated in the graph."""
    constant, basis = color.color_map(config.color, pca_noise=config.pca_noise > 0)
    factors = [draws.uniform(1 - config.color_jitter, 1 + config.color_jitter) for _ in range(3)]
    if config.color == "paper":
        hue, saturation, brightness = factors
        coefficients = color.paper_coefficients(hue, saturation, brightness, cos=math.cos, sin=math.sin)
    else:
        brightness, contrast, saturation = factors
        coefficients = color.published_coefficients(brightness, contrast, saturation)
    coefficients += [draws.normal(config.pca_noise) for _ in basis[len(coefficients) :]]
    matrix = _constant(constant)
    for coefficient, block in zip(coefficients, basis, strict=True):
        matrix = matrix + coefficient * _constant(block)
    return matrix


def _constant(array: color.Array) -> Any:
    return types.Constant(array.astype(np.float32), device="cpu")


def _reader_arguments(folder: ImageFolder, training: bool, seed: int, rank: int, world_size: int) -> dict[str, Any]:
    """DALI reads the first epoch in the order given and shuffles after each: so the order given is shuffled here."""
    arguments: dict[str, Any] = {
        "file_root": str(folder.root),
        "files": list(folder.files),
        "labels": list(folder.labels),
        "shard_id": rank,
        "num_shards": world_size,
        "pad_last_batch": True,
        "dont_use_mmap": True,  # 14.3k against 10.7k small files/s
    }
    if training:
        order = np.random.default_rng(stream_seed(seed)).permutation(len(folder))
        arguments["files"] = [folder.files[i] for i in order]
        arguments["labels"] = [folder.labels[i] for i in order]
        arguments["shuffle_after_epoch"] = True
        arguments["shuffle_after_epoch_seed"] = stream_seed(seed) >> 32  # an int32 in DALI
    return arguments


def _read_order(reader: dict[str, Any], epoch: int, first: int, last: int) -> list[str]:
    """The files that a reader reads as number `first` to `last` - 1 of an epoch: found by a reader that reads one file
    for all.

    The order depends on the number of files and the seed only, so it is that of the real reader.
    """
    files = reader["files"]
    with tempfile.NamedTemporaryFile() as stand_in:
        stand_in.write(b"x")
        stand_in.flush()
        numbered = {**reader, "file_root": "", "files": [stand_in.name] * len(files), "labels": list(range(len(files)))}

        def graph() -> Any:
            return fn.readers.file(name=_READER, **numbered)[1]

        # with checkpointing as there: without it DALI shuffles differently
        pipeline = pipeline_def(graph)(batch_size=1024, num_threads=1, device_id=None, enable_checkpointing=True)
        pipeline.build()
        iterator = DALIGenericIterator(
            [pipeline], ["numbers"], reader_name=_READER, last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
        )
        for _ in range(epoch):
            for _ in iterator:
                pass
        numbers: list[int] = []
        for (batch,) in iterator:
            numbers += batch["numbers"].flatten().tolist()
            if len(numbers) >= last:
                break
    return [files[number] for number in numbers[first:last]]


def _decodes(path: Path) -> bool:
    """Whether DALI decodes this file, on the CPU."""

    def graph() -> Any:
        return fn.decoders.image(fn.readers.file(files=[str(path)])[0])

    pipeline = pipeline_def(graph)(batch_size=1, num_threads=1, device_id=None)
    pipeline.build()
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def _unpack(state: bytes | None, identity: dict[str, Any], root: Path) -> tuple[int, int, bytes | None]:
    """(epoch, step, DALI's checkpoint). DALI itself would load that of another data set or seed without a word."""
    if state is None:
        return 0, 0, None
    saved = json.loads(state)
    for field, value in identity.items():
        if saved[field] != value:
            raise DataError(
                f"{root}: the saved position has {field} = {saved[field]}, this run {value}; resume with the same, "
                f"or start a new run"
            )
    return saved["epoch"], saved["step"], base64.b64decode(saved["dali"])


def _digest(folder: ImageFolder) -> str:
    return hashlib.blake2b(repr((folder.files, folder.labels)).encode(), digest_size=8).hexdigest()


def _threads_per_rank() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
