"""The AnnotatedLoader: an epoch's images with their annotations, made by worker processes; bad files named and replaced."""

from __future__ import annotations

import atexit
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch.utils.data import DataLoader

from fasttricks.config import ConfigError, DataConfig, require
from fasttricks.data.annotated.pixels import INTERPOLATIONS
from fasttricks.data.annotated.samples import AnnotatedSource, C, D, Drawn, Samples, Turns, collate
from fasttricks.data.annotated.workers import start_workers, workers_started
from fasttricks.data.pipeline.shards import Shards, require_same
from fasttricks.data.sources.bad import name_bad, require_few_bad
from fasttricks.data.sources.errors import DataError
from fasttricks.system.process import threads_per_rank

if TYPE_CHECKING:
    from typing_extensions import NotRequired, Unpack  # in typing from Python 3.11 on

B = TypeVar("B")
"""A batch on the device."""


class LoaderOptions(TypedDict):
    """The arguments by name of an AnnotatedLoader, which describes them."""

    training: bool
    batch_size: int
    device: torch.device
    dtype: NotRequired[torch.dtype]
    seed: NotRequired[int]
    rank: NotRequired[int]
    world_size: NotRequired[int]
    workers: NotRequired[int | None]


class AnnotatedLoader(ABC, Generic[C, D, B]):
    """Batches of one split, an epoch an iteration: learning.Batches.

    Training: in an order shuffled in each epoch. Validation: one image a batch, in the order of `source`.
    Every image comes exactly once an epoch, over all ranks. Bad files are the exception: they are named on stderr as they come,
    listed in `bad`, and replaced in training or left out in validation (samples.py). The last batch of an epoch may be short,
    and on some ranks empty, so that all ranks take the same number of steps; `global_count(step)` says how many images a
    step has in all.

    Args:
        source: the images of the split, with their annotations.
        config: normalisation, interpolation, threads, prefetch, limits.
        training: as above.
        batch_size: images of this rank a step in training, 1 or more. Validation has one.
        device: the device of the batches.
        dtype: the dtype of the images; float32 by default.
        seed: of order and views, 0 or more, equal on all ranks; 0 by default.
        rank, world_size: which of how many equal parts of each epoch this is; 0 of 1 by default.
        workers: processes that decode and transform, 0 for this process; None: config.threads, or the cores of this rank.

    Raises DataError for fewer images than ranks, and for more bad files than config.max_bad allows, while iterating too;
    ConfigError for an interpolation that torchvision lacks.

    Deterministic: order and views are pure functions of (seed, epoch, image); workers, prefetch and ranks change no bit.
    Cost: the workers are forked at the first batch and live as long as the loader. A batch comes through a pipe, 8 bits a value.
    """

    note = ""
    operators = "torchvision"

    def __init__(self, source: AnnotatedSource, config: DataConfig, **options: Unpack[LoaderOptions]) -> None:
        training, seed, rank = options["training"], options.get("seed", 0), options.get("rank", 0)
        world_size, workers = options.get("world_size", 1), options.get("workers")
        rule = f"must be {' or '.join(INTERPOLATIONS)} for masks and boxes"
        require(config.interpolation in INTERPOLATIONS, "data.interpolation", config.interpolation, rule, ConfigError)
        batch_size = options["batch_size"] if training else 1
        self.shards = Shards(num_images=len(source), batch_size=batch_size, world_size=world_size, source=source.place)
        self._source, self._config = source, config
        self._training, self._seed, self._rank = training, seed, rank
        self._device, self._dtype = options["device"], options.get("dtype", torch.float32)
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
        self._batches: Iterator[Drawn[D]] | None = None
        self._loaders: list[DataLoader[Any]] = []
        """torch's, once it is started."""
        # torch's part outlives self: where the collector took both at once, the workers would never be told to end
        weakref.finalize(self, self._loaders.clear).atexit = False  # see _close
        self._require_few_bad()

    @abstractmethod
    def _samples(self) -> Samples[C]:
        """The samples by turn."""

    @staticmethod
    @abstractmethod
    def _join(parts: list[C]) -> D:
        """N parts as one, in a worker; N may be 0. Static, as torch's loader keeps it and must not keep self alive."""

    @abstractmethod
    def _batch(self, drawn: Drawn[D]) -> B:
        """The batch on the device."""

    def _epoch_ended(self) -> None:
        """Called after the last batch of an epoch."""

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
        """The bad images that this rank knows of and the files without an image, by name, and why."""
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

    def __iter__(self) -> Iterator[B]:
        """The batches of one epoch, or the rest of it after a restored state or an iteration left early."""
        while self._step < len(self):
            batch = self._next()
            self._step += 1
            yield batch
        self._epoch, self._step = self._epoch + 1, 0
        self._epoch_ended()

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the batches yielded so far, and the bad files: plain values, 0.2 KB as JSON without any.

        Images read ahead are not part of it.
        """
        position = {"epoch": self._epoch, "step": self._step, "bad": sorted(self._bad.items())}
        return {**self._must_agree, **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, bit for bit, at the position of a loader of equal arguments whose state_dict() gave `state`, or its JSON.

        Raises DataError for a state of another data set, seed, batch size or sharding, and as the constructor for bad files.
        Cost: images read ahead are discarded.
        """
        require_same(self._source.root, self._must_agree, state)
        self._epoch, self._step = state["epoch"], state["step"]
        self._bad = {**self._source.bad, **dict(state["bad"])}
        self._named |= set(dict(state["bad"]))
        self._batches = None
        self._require_few_bad()

    def close(self) -> None:
        """End the workers; the next batch starts others."""
        self._batches = None
        self._loaders.clear()

    def _next(self) -> B:
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
        return self._batch(drawn)

    def _start(self) -> Iterator[Drawn[D]]:
        """Batches from the present position on, made ahead by the workers."""
        self._turns.epoch, self._turns.step = self._epoch, self._step
        with workers_started():
            if not self._loaders:
                join, ahead = partial(collate, join=self._join), self._config.prefetch
                self._loaders.append(
                    start_workers(self._samples(), self._turns, join, workers=self._workers, prefetch=ahead)
                )
                if self._workers:
                    atexit.register(_close, weakref.ref(self))
            return iter(self._loaders[0])

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
            self._name_strays()
            self._strays_named = True

    def _name_strays(self) -> None:
        """Say which files belong to no image."""
        name_bad(list(self._source.strays.items()), "left out")


def _close(loader: weakref.ref[AnnotatedLoader[Any, Any, Any]]) -> None:
    """At the end of the process, before torch's own end, which would wait for workers that nobody has told."""
    if (there := loader()) is not None:
        there.close()
