"""The MaskLoader: an epoch's images and masks, decoded and transformed by worker processes; bad files named and replaced."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from fasttricks.config import ConfigError, DataConfig, SegmentConfig, require, show_name
from fasttricks.data.masks.batch import MaskBatch
from fasttricks.data.masks.samples import Drawn, Samples, Turns, collate
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.masks.views import INTERPOLATIONS, normalise
from fasttricks.data.pipeline.shards import Shards, require_same
from fasttricks.data.sources.bad import name_bad, require_few_bad
from fasttricks.data.sources.errors import DataError
from fasttricks.system.process import deaf_children, die_with_parent, threads_per_rank
from fasttricks.system.transfer import to_device


class MaskLoader:
    """Batches of one split, an epoch an iteration: learning.Batches.

    Training: a random view of each image (views.py), in an order shuffled in each epoch. Validation: one whole image a batch, its
    short side at data.val_resize, in the order of `source`, with its mask at full size: so a metric counts the pixels of the
    annotation, once each.
    Every image comes exactly once an epoch, over all ranks. Bad files are the exception: they are named on stderr as they come,
    listed in `bad`, and replaced in training or left out in validation (samples.py). The last batch of an epoch may be short,
    and on some ranks empty, so that all ranks take the same number of steps; `global_count(step)` says how many images a
    step has in all.

    Args:
        source: the images and masks of the split.
        config: image_size, flip, normalisation, interpolation, threads, prefetch, limits.
        segment: base_size, scale, blur.
        training: as above.
        batch_size: images of this rank a step in training, 1 or more. Validation has one.
        device: the device of the batches.
        dtype: the dtype of the images.
        seed: of order and views, 0 or more, equal on all ranks.
        rank, world_size: which of how many equal parts of each epoch this is.
        workers: processes that decode and transform, 0 for this process; None: config.threads, or the cores of this rank.

    Raises DataError for fewer images than ranks, and for more bad files than config.max_bad allows, while iterating too;
    ConfigError for an interpolation that torchvision lacks.

    Deterministic: order and views are pure functions of (seed, epoch, image); workers, prefetch and ranks change no bit.
    Cost: the workers are forked at the first batch and live as long as the loader. A batch comes through a pipe, 8 bits a value.
    """

    note = ""
    operators = "torchvision"

    def __init__(
        self,
        source: MaskSource,
        config: DataConfig,
        segment: SegmentConfig,
        *,
        training: bool,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
    ) -> None:
        rule = f"must be {' or '.join(INTERPOLATIONS)} for masks"
        require(config.interpolation in INTERPOLATIONS, "data.interpolation", config.interpolation, rule, ConfigError)
        batch_size = batch_size if training else 1
        self.shards = Shards(num_images=len(source), batch_size=batch_size, world_size=world_size, source=source.place)
        self._source, self._config, self._segment = source, config, segment
        self._training, self._seed, self._rank = training, seed, rank
        self._device, self._dtype = device, dtype
        self._workers = (config.threads or threads_per_rank()) if workers is None else workers
        self._must_agree: dict[str, Any] = {
            "training": training,
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "files": source.fingerprint(),
        }
        """The values that a saved position must agree with."""
        self._epoch = self._step = 0
        self._turns = Turns(self.shards, shuffles=training, seed=seed, rank=rank)
        self._bad = dict(source.bad)
        self._named = {*source.bad} if rank else set()  # each rank knows those; one names them
        self._strays_named = bool(rank)
        self._classes: NDArray[np.bool_] | None = None
        """The classes that the masks of this epoch have, from its first batch on; None: not to be told."""
        self._tells = training and not rank
        self._batches: Iterator[Drawn] | None = None
        self._loader: DataLoader[Any] | None = None
        self._require_few_bad()

    @property
    def root(self) -> Path:
        """The folder data.root."""
        return self._source.root

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by number."""
        return self._source.classes

    @property
    def bad(self) -> dict[str, str]:
        """The bad images that this rank knows of and the masks without an image, by name, and why."""
        return {
            **{self._source.name(image): why for image, why in sorted(self._bad.items())},
            **self._source.strays,
        }

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""
        return len(self.shards)

    def global_count(self, step: int) -> int:
        """Images of batch `step`, 0 to len - 1, over all ranks. Arithmetic on the host."""
        return self.shards.global_count(step)

    def __iter__(self) -> Iterator[MaskBatch]:
        """The batches of one epoch, or the rest of it after a restored state or an iteration left early."""
        while self._step < len(self):
            batch = self._next()
            self._step += 1
            yield batch
        self._epoch, self._step = self._epoch + 1, 0
        self._tell_classes()

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the batches yielded so far, and the bad files: plain values, 0.2 KB as JSON without any.

        Images read ahead are not part of it.
        """
        position = {"epoch": self._epoch, "step": self._step, "bad": sorted(self._bad.items())}
        return {**self._must_agree, **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, at the position of a MaskLoader of equal arguments whose state_dict() gave `state`, or its JSON.

        Raises DataError for a state of another data set, seed, batch size or sharding, and as the constructor for bad files.
        Cost: images read ahead are discarded.
        """
        require_same(self._source.root, self._must_agree, state)
        self._epoch, self._step = state["epoch"], state["step"]
        self._bad = {**self._source.bad, **dict(state["bad"])}
        self._named |= set(dict(state["bad"]))
        self._batches = self._classes = None
        self._require_few_bad()

    def close(self) -> None:
        """End the workers; the next batch starts others."""
        self._batches = self._loader = None

    def _next(self) -> MaskBatch:
        self._name_bad()  # those that the source knows, before the first batch
        if self._batches is None:
            self._batches = self._start()
        drawn = next(self._batches)
        new = {image: why for image, why in drawn.bad.items() if image not in self._bad}
        self._bad |= new
        if new:
            self._require_few_bad()
            self._name_bad()
        if self._training and len(drawn.shown) < len(drawn.turns):
            raise DataError(f"{self._source.place}: no good image is left; {next(reversed(self._bad.values()))}")
        self._see_classes(drawn)
        return MaskBatch(self._images(drawn), self._masks(drawn), drawn.places, drawn.shown)

    def _images(self, drawn: Drawn) -> Tensor:
        side = self._config.image_size
        images = np.empty((0, side, side, 3), np.uint8) if drawn.images is None else drawn.images
        return normalise(to_device(torch.from_numpy(images), self._device), self._config, self._dtype)

    def _masks(self, drawn: Drawn) -> Tensor:
        side = self._config.image_size
        masks = np.empty((0, side, side), np.uint8) if drawn.masks is None else drawn.masks
        return to_device(torch.from_numpy(masks), self._device).long()

    def _start(self) -> Iterator[Drawn]:
        """Batches from the present position on, made ahead by the workers."""
        many = self._workers > 0
        self._turns.epoch, self._turns.step = self._epoch, self._step
        with _workers_started():
            if self._loader is None:
                samples = Samples(self._source, self._config, self._segment, training=self._training, seed=self._seed)
                in_main = threading.current_thread() is threading.main_thread()
                self._loader = DataLoader(
                    samples,
                    batch_sampler=self._turns,
                    num_workers=self._workers,
                    collate_fn=collate,
                    # the fork costs no second of imports, and a script needs no __main__ guard; nothing here holds a lock
                    multiprocessing_context="fork" if many else None,
                    prefetch_factor=-(-self._config.prefetch // self._workers) if many else None,
                    persistent_workers=many,
                    worker_init_fn=partial(_begin_worker, dies=in_main),
                    generator=torch.Generator(),  # or each start would take a number from torch's own
                )
                if many:
                    atexit.register(_close, weakref.ref(self))
            return iter(self._loader)

    def _require_few_bad(self) -> None:
        files = len(self._source) + len(self._source.strays)

        def last() -> tuple[str, str]:
            bad = {**self._source.strays, **{self._source.name(image): why for image, why in self._bad.items()}}
            return next(reversed(bad.items()))

        known = len(self._bad) + len(self._source.strays)
        require_few_bad(self._source.place, known, files, self._config.max_bad, last)

    def _name_bad(self) -> None:
        """Say which files were found bad since the last time."""
        new = sorted({*self._bad} - self._named)
        name_bad(
            [(self._source.name(image), self._bad[image]) for image in new],
            "replaced by another" if self._training else "left out",
        )
        self._named.update(new)
        if not self._strays_named:
            name_bad(list(self._source.strays.items()), "left out")
            self._strays_named = True

    def _see_classes(self, drawn: Drawn) -> None:
        if self._tells and self._step == 0:
            self._classes = np.zeros(len(self.classes), bool)
        if self._classes is not None and drawn.classes is not None:
            self._classes |= drawn.classes

    def _tell_classes(self) -> None:
        """After the first whole epoch: warn of each class that no mask of it had. The masks' values are not read before."""
        if self._classes is None:
            return
        ranks, masks = self.shards.world_size, len(self.shards.part(self._rank))
        for number in np.flatnonzero(~self._classes).tolist():
            value, name = number + self._source.first, show_name(self._source.classes[number])
            read = f"{masks} training masks{f' of rank {self._rank}' * (ranks > 1)}"
            text = f"class {name} (value {value}) is in none of the {read}; check the names and their order"
            print(f"warning: {text}", file=sys.stderr, flush=True)
        self._classes, self._tells = None, False


def _begin_worker(number: int, *, dies: bool) -> None:
    """In a worker, before its first batch."""
    if dies:
        # torch's own watch takes five seconds, in which the worker would keep the lock of the run folder, the sockets and the GPU
        die_with_parent()


@contextmanager
def _workers_started() -> Iterator[None]:
    """Within the block workers are forked: deaf to the signals that the command answers, and without the usual warnings."""
    with deaf_children(signal.SIGINT, signal.SIGTERM, signal.SIGHUP), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more than cores: as asked
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
        yield


def _close(loader: weakref.ref[MaskLoader]) -> None:
    """At the end of the process, before torch's own end, which would wait for workers that nobody has told."""
    if (there := loader()) is not None:
        there.close()
