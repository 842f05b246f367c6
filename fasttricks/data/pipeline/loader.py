"""The Loader: an epoch's batches, which are decoded and augmented ahead of the training; bad files named and replaced.

feed.py has the images and their order, draws.py their random numbers, graph.py and pixels.py the operations, decoder.py
DALI, which runs them.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from fasttricks.config import DataConfig, replace_fields
from fasttricks.config.resolve import check_kinds
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.decoder import DecodeError, Decoder
from fasttricks.data.pipeline.feed import Feed, Job
from fasttricks.data.pipeline.pixels import choose_pixels
from fasttricks.data.pipeline.shards import Shards, require_same
from fasttricks.data.sources import Source, Split, find_dataset
from fasttricks.data.sources.bad import name_bad
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.label_sets import set_table, sets_of
from fasttricks.system.transfer import to_device

_OPTIONS = ("device", "dtype", "seed", "rank", "world_size", "image_size_at", "hw_decoder_load")
_SAMPLE = re.compile(r"sample #(\d+)")  # how DALI names, in most of its errors, the image of a batch


class Loader:
    """Batches of one split, an epoch an iteration.

    Every image comes exactly once an epoch, over all ranks; with config.balance training shows those of rare classes more often.
    Bad files are the exception: they are named on stderr as they are met, listed in `bad`, and replaced in training or left out
    in validation (feed.py). The last batch of an epoch may be short, and on some ranks empty (N = 0), so that all ranks take the
    same number of steps; `global_count(step)` says how many images a step has in all.

    Args:
        source: the images of the split.
        config: sizes, augmentation, threads.
        training: random crop, flip and colour, in an order shuffled in each epoch; else short side to val_resize,
            centre crop, in the order of `source`.
        batch_size: images of this rank a step, 1 or more.
        device: the device of the batches. cuda decodes and augments on the GPU.
        dtype: the dtype of the images. float32 and float16 are rounded once, any other is a cast.
        seed: of order and augmentation, 0 or more, equal on all ranks.
        rank, world_size: which of how many equal parts of each epoch this is.
        image_size_at: side of the images by epoch, at most config.image_size; None: always that.
        hw_decoder_load: on a GPU with a JPEG engine (A100, H100), the share of a batch, 0 to 1, that DALI gives to it. The engine
            rounds otherwise than the CUDA decoder, and an image's place in its batch decides which of them it gets. 0: CUDA.
        names_bad: name bad files on stderr; no: the caller asks why_bad().

    Raises DataError for fewer images than ranks, and for more bad files than config.max_bad allows, while iterating too.

    Deterministic: order and augmentation are pure functions of (seed, epoch, image), see draws.py; threads and prefetch
    change no bit. With a hw_decoder_load above 0 the batch size and a bad file's place change last bits. Oracle: reference.py.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        training: bool,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        image_size_at: Callable[[int], int] | None = None,
        hw_decoder_load: float = 0.0,
        names_bad: bool = True,
    ) -> None:
        self._image_size_at = image_size_at or (lambda epoch: config.image_size)
        self.shards = Shards(
            num_images=len(source), batch_size=batch_size, world_size=world_size, source=str(source.root)
        )
        self._source, self._config, self._training, self._seed = source, config, training, seed
        self._device, self._dtype = device, dtype
        self._hw_decoder_load, self._names_bad = hw_decoder_load, names_bad
        self._must_agree: dict[str, Any] = {
            "training": training,
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "files": source.fingerprint(),
        }
        """The values that a saved position must agree with."""
        self._pixels = choose_pixels(config, training=training, device=device)
        if self._pixels is not None and device.type == "cpu":
            self._must_agree["operators"] = self._pixels.operators  # a machine without a compiler makes other bits
        self._epoch = self._step = 0
        self._feed = Feed(source, self.shards, config, training=training, seed=seed, rank=rank)
        table = set_table(sets, len(source.classes)) if (sets := sets_of(source)) else None
        self._sets = None if table is None else torch.from_numpy(table).float().to(device)
        """(S, K): the classes of each set, of several labels an image."""
        self._named = set(source.bad) if rank else set()  # each rank knows those; one names them
        self._under_way: deque[Job] = deque()
        """The jobs of the batches to come: those that the decoder has and, in between, those without an image."""
        self._decoder: Decoder | None = None

    @classmethod
    def open(cls, root: str | Path, split: Split, *, batch_size: int, **options: Any) -> Loader:
        """A Loader of one split of a data set: Loader.open("DIR", "train", batch_size=64, image_size=160).

        root: the folder that holds train/ and val/, a pack, or the word demo. split: train, with random crops, flips and
        colours, in a new order each epoch; val, the centre of each image, labelled by the classes of train. options: those of
        the constructor (device, by default the GPU where there is one; dtype, seed, rank, world_size), and fields of the
        section data.
        Raises DataError and ConfigError.
        """
        given = {name: options.pop(name) for name in tuple(options) if name in _OPTIONS}
        config = replace_fields(DataConfig(), check_kinds(DataConfig, {**options, "root": str(root)}))
        if split not in get_args(Split):
            raise DataError(f"split = {split!r}: must be train or val")
        train, val = find_dataset(config)
        device = given.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            train if split == "train" else val,
            config,
            training=split == "train",
            batch_size=batch_size,
            device=torch.device(device),
            **given,
        )

    @property
    def root(self) -> Path:
        """The folder of the split's images."""
        return self._source.root

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by label."""
        return self._source.classes

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""
        return len(self.shards)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch, or the rest of it after a restored state or an iteration left early."""
        if self._image_size_at(self._epoch) != self._config.image_size:
            self._decoder = None  # images read ahead have the old size
        while self._step < len(self):
            batch = self._next()
            self._step += 1
            yield batch
        self._epoch, self._step = self._epoch + 1, 0

    @property
    def smallest_batch(self) -> int:
        """Images of the smallest batch that any rank gets in an epoch, empty ones aside."""
        return self.shards.smallest_batch

    def global_count(self, step: int) -> int:
        """Images of batch `step`, 0 to len - 1, over all ranks. Arithmetic on the host."""
        return self.shards.global_count(step)

    @property
    def bad(self) -> dict[str, str]:
        """The bad files that this rank knows of, by name with the split's folder before it, and why."""
        split = self._source.root.name
        return {f"{split}/{self._source.name(image)}": why for image, why in sorted(self._feed.bad.items())}

    def why_bad(self, image: int) -> str:
        """Why that image, by its number, is bad, as far as this rank knows; empty: it is not."""
        return self._feed.bad.get(image, "")

    @property
    def operators(self) -> str:
        """The implementation of training pixels: fused or dali on the CPU, gpu on CUDA. Each has other last bits."""
        return self._pixels.operators if self._pixels is not None else ""

    @property
    def note(self) -> str:
        """Why this loader is slower than it might be, for the header of a run; empty: it is not."""
        return self._pixels.note if self._pixels is not None else ""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the batches yielded so far, and the bad files: plain values, 0.2 KB as JSON without any.

        Images read ahead are not part of it.
        """
        position = {"epoch": self._epoch, "step": self._step, "bad": sorted(self._feed.bad.items())}
        return {**self._must_agree, **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, at the position of a Loader of equal arguments whose state_dict() gave `state`, or its JSON.

        Raises DataError for a state of another data set, seed, batch size or sharding, and as the constructor for bad files.
        Cost: after the first batch, images read ahead are discarded.
        """
        require_same(self._source.root, self._must_agree, state)
        self._epoch, self._step, bad = state["epoch"], state["step"], dict(state["bad"])
        self._feed.recall(bad)
        self._named |= set(bad)
        self._decoder = None

    def _next(self) -> Batch:
        """The batch of the first job under way."""
        while True:
            decoder = self._decoder or self._start()  # an undecodable image is met while iterating, never before
            job = self._under_way[0]
            try:
                images = decoder.take() if job.encoded else self._no_images()
                break
            except DecodeError as error:
                self._mend(error)
        self._under_way.popleft()
        if job.encoded:
            self._hand_over(decoder)
            decoder.run()
        labels = to_device(torch.from_numpy(job.labels), self._device)
        labels = labels if self._sets is None else self._sets[labels]
        return Batch(images.to(self._dtype), labels, job.places, job.images)

    def _no_images(self) -> torch.Tensor:
        side = self._config.image_size
        return torch.empty((0, side, side, 3), dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)

    def _start(self) -> Decoder:
        """Build the decoder and give it its first jobs, those from the present position on."""
        self._name_bad()
        self._config = dataclasses.replace(self._config, image_size=self._image_size_at(self._epoch))
        self._under_way.clear()
        self._decoder = decoder = self._build(self.shards.batch_size, self._config.prefetch)
        self._jobs = self._feed.jobs(self._epoch, self._step)
        for _ in range(self._config.prefetch):
            self._hand_over(decoder)
        decoder.run()
        return decoder

    def _build(self, batch_size: int, ahead: int) -> Decoder:
        return Decoder(
            self._config,
            self._pixels,
            device=self._device,
            half=self._dtype == torch.float16,
            seed=self._seed,
            batch_size=batch_size,
            ahead=ahead,
            hw_decoder_load=self._hw_decoder_load,
        )

    def _hand_over(self, decoder: Decoder) -> None:
        """Give the decoder its next job. Empty ones wait in the queue, but have nothing to decode.

        Raises DataError where an epoch of this rank is empty: each of its validation images is bad.
        """
        for _ in range(len(self) + 1):
            job = next(self._jobs)
            self._name_bad()
            self._under_way.append(job)
            if job.encoded:
                decoder.hand_over(job)
                return
        rank, ranks = self._must_agree["rank"], self.shards.world_size
        raise DataError(
            f"{self._source.root}: rank {rank} of {ranks} has no good image; repair the images, or use fewer ranks"
        )

    def _mend(self, error: DecodeError) -> None:
        """After DALI failed: find the files under way that it cannot decode, so that it does not get them any more.

        Raises `error` where all of them decode: the cause is another. Cost: the decoder is rebuilt, 0.1 s; where
        DALI does not say which image of a batch it was, the images of a few batches are decoded one by one.
        """
        self._decoder, alone = None, None
        numbers = {int(number) for number in _SAMPLE.findall(str(error))}
        under_way = [(job, n) for job in self._under_way for n in range(len(job.encoded))]
        hinted = [(job, n) for job, n in under_way if n in numbers]
        found: dict[int, bytes] = {}
        for job, number in hinted or under_way:
            alone = alone or self._build(batch_size=1, ahead=1)
            if not alone.decodes(job.one(number)):
                found[int(job.images[number])], alone = job.encoded[number], None
        if not found:
            raise error
        for image, file in found.items():
            self._feed.keep_from_dali(image, file)

    def _name_bad(self) -> None:
        """Say which files were found bad since the last time."""
        known = self._feed.bad.copy() if self._names_bad else {}
        new = sorted(image for image in known if image not in self._named)
        another = "another of its class" if self._sets is None else "another with the same labels, or any"
        then = f"replaced by {another}" if self._training else "left out"
        name_bad([(self._source.name(image), known[image]) for image in new], then)
        self._named.update(new)
