"""The Loader: an epoch's batches from DALI, which decodes and augments ahead of the training; bad files named and replaced.

What DALI does to an image is in graph.py; which images, in what order, in feed.py; their random numbers in draws.py.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from fasttricks.config import DataConfig
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.draws import image_draws
from fasttricks.data.pipeline.feed import Feed, Job
from fasttricks.data.pipeline.fused import Callback, choose_callback
from fasttricks.data.pipeline.graph import augmentation, image_graph
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources import Source
from fasttricks.data.sources.errors import DataError, show_name
from fasttricks_kernels import augment

_SHOWN = 20
"""Bad files that are named at a time on stderr."""
_SAMPLE = re.compile(r"sample #(\d+)")  # how DALI names, in most of its errors, the image of a batch


class Loader:
    """Batches of one split, an epoch an iteration.

    Every image comes exactly once an epoch, over all ranks, but for bad files: those are named on stderr as they are
    met, listed in `bad`, and replaced in training or left out in validation (feed.py). The last batch of an epoch may be
    short, and on some ranks empty (N = 0), so that all ranks take the same number of steps; `global_count(step)` says how
    many images a step has in all.

    Args:
        source: the images of the split.
        config: sizes, augmentation, threads.
        training: random crop, flip and colour, in an order shuffled anew each epoch; else short side to val_resize,
            centre crop, in the order of `source`.
        batch_size: images of this rank a step, 1 or more.
        device: of the batches. cuda decodes and augments on the GPU.
        dtype: of the images. float32 and float16 are rounded once, any other is a cast.
        seed: of order and augmentation, 0 or more, equal on all ranks.
        rank, world_size: which of how many equal parts of each epoch this is.
        image_size_at: side of the images by epoch, at most config.image_size; None: always that.

    Raises DataError for fewer images than ranks, and for more bad files than config.max_bad allows, while iterating too.

    Deterministic: order and augmentation are pure functions of (seed, epoch, image), see draws.py; threads and prefetch
    change no bit. Oracle: reference.py.
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
    ) -> None:
        self._image_size_at = image_size_at or (lambda epoch: config.image_size)
        self.shards = Shards(
            num_images=len(source), batch_size=batch_size, world_size=world_size, source=str(source.root)
        )
        self._source, self._config, self._training, self._seed = source, config, training, seed
        self._device, self._dtype = device, dtype
        self._must_agree: dict[str, Any] = {
            "training": training,
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "files": source.fingerprint(),
        }
        self._color_last = training and device.type == "cuda"  # behind the graph, which ends in uint8
        self._callback: Callback | None = None
        self.note = ""
        """Why this loader is slower than it might be, for the header of a run; empty: it is not."""
        if training and device.type == "cpu":
            self._callback, self.note = choose_callback(config)
            # a machine without a compiler would go on with other bits
            self._must_agree["operators"] = "fused" if self._callback else "dali"
        self._epoch = self._step = 0
        self._feed = Feed(source, self.shards, config, training=training, seed=seed, rank=rank)
        self._named = set(source.bad) if rank else set()  # each rank knows those; one names them
        self._in_flight: deque[tuple[Job, dict[str, Any]]] = deque()
        """Jobs in the pipeline and, as it does not copy them, what was handed over for them."""
        self._pipeline: Any = None

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""
        return len(self.shards)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch, or what is left of it after a restored state or an iteration left early."""
        if self._image_size_at(self._epoch) != self._config.image_size:
            self._pipeline = None  # what was read ahead is of the old size
        while self._step < len(self):
            if self._pipeline is None:  # an undecodable image is met while iterating, never in the constructor
                self._start()
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

    @property
    def operators(self) -> str:
        """What makes the pixels of training images: fused or dali on the CPU, gpu on CUDA. Each has other last bits."""
        return str(self._must_agree.get("operators", "gpu"))

    def state_dict(self) -> dict[str, Any]:
        """Where it stands after the batches yielded so far, and the bad files: plain values, 0.2 KB as JSON without any.

        What was read ahead is no part of it.
        """
        position = {"epoch": self._epoch, "step": self._step, "bad": sorted(self._feed.bad.items())}
        return {**self._must_agree, **position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, bit for bit, where a Loader of equal arguments stood when its state_dict() gave `state`, or its JSON.

        Raises DataError for a state of another data set, seed, batch size or sharding, and as the constructor for bad files.
        Cost: after the first batch, what was read ahead is thrown away.
        """
        for field, value in self._must_agree.items():
            if state.get(field) != value:
                raise DataError(
                    f"{self._source.root}: the saved position has {field} = {state.get(field)}, this run {value}; resume "
                    f"with the same, or start a new run"
                )
        self._epoch, self._step, bad = state["epoch"], state["step"], dict(state["bad"])
        self._feed.recall(bad)
        self._named |= set(bad)
        self._pipeline = None

    def _start(self) -> None:
        """Build the pipeline and give it its first jobs, those from the present position on."""
        self._name_bad()
        self._config = dataclasses.replace(self._config, image_size=self._image_size_at(self._epoch))
        self._in_flight.clear()
        self._pipeline = self._build(self.shards.batch_size, self._config.prefetch)
        self._jobs = self._feed.jobs(self._epoch, self._step)
        for _ in range(self._config.prefetch):
            self._hand_over()
        self._pipeline.schedule_run()  # the first time, as many runs as there are batches to prefetch

    def _build(self, batch_size: int, prefetch_queue_depth: int) -> Any:
        config, on_gpu = self._config, self._device.type == "cuda"
        pipeline = pipeline_def(image_graph)(
            config,
            training=self._training,
            callback=self._callback,
            on_gpu=on_gpu,
            half=self._dtype == torch.float16,
            color_last=self._color_last,
            batch_size=batch_size,
            num_threads=config.threads or _threads_per_rank(),
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=prefetch_queue_depth,
        )
        pipeline.build()
        return pipeline

    def _next(self) -> Batch:
        """The batch of the first job in flight."""
        while True:
            job = self._in_flight[0][0]
            if not job.encoded:
                self._in_flight.popleft()
                side = self._config.image_size
                images = torch.empty((0, side, side, 3), dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)
                break
            try:
                (outputs,) = self._pipeline.share_outputs()
            except RuntimeError as error:
                self._mend(error)
                continue
            inputs = self._in_flight.popleft()[1]
            images = self._finished(torch.from_dlpack(outputs.as_tensor()), inputs)
            self._pipeline.release_outputs()
            self._hand_over()
            self._pipeline.schedule_run()
            break
        labels = self._on_device(torch.from_numpy(job.labels))
        return Batch(images.to(self._dtype), labels, job.places, job.images)

    def _finished(self, images: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The graph's (N, S, S, 3) as normalised (N, 3, S, S), channels-last in memory; uint8 is coloured, in one launch.

        Mixup is not in this pass, though the kernel has it: lambda belongs to the step, not to the image, and is drawn
        there, after images were read ahead.
        """
        if not self._color_last:
            return images.permute(0, 3, 1, 2)
        dtype = torch.float16 if self._dtype == torch.float16 else torch.float32
        return augment(images, self._on_device(torch.from_numpy(inputs["matrix"])), dtype=dtype)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, of the host, on the loader's device; the host does not wait for the copy."""
        if self._device.type == "cuda":
            return values.pin_memory().to(self._device, non_blocking=True)
        return values

    def _hand_over(self) -> None:
        """Give the pipeline its next job. Empty ones wait in the queue, but have nothing to run.

        Raises DataError where an epoch of this rank is empty: each of its validation images is bad.
        """
        for _ in range(len(self) + 1):
            job = next(self._jobs)
            self._name_bad()
            inputs = self._inputs(job) if job.encoded else {}
            self._in_flight.append((job, inputs))
            if inputs:
                self._feed_graph(self._pipeline, inputs)
                return
        rank, ranks = self._must_agree["rank"], self.shards.world_size
        raise DataError(
            f"{self._source.root}: rank {rank} of {ranks} has no good image; repair them, or take fewer ranks"
        )

    def _feed_graph(self, pipeline: Any, inputs: dict[str, Any]) -> None:
        for name, values in inputs.items():
            if name != "matrix" or not self._color_last:
                pipeline.feed_input(name, values)

    def _inputs(self, job: Job) -> dict[str, Any]:
        """What the graph takes for a job of one image or more, by name."""
        files = [np.frombuffer(file, np.uint8) for file in job.encoded]
        # a third of the time that a plain list takes, 5 us an image
        inputs: dict[str, Any] = {"encoded": TensorListCPU([TensorCPU(file) for file in files])}
        if self._training:
            drawn = image_draws(self._seed, 0 if self._config.fixed_augmentation else job.epoch, job.places)
            fused = self._callback is not None
            inputs |= augmentation(self._config, drawn, fused=fused, color_last=self._color_last)
        return inputs

    def _mend(self, error: RuntimeError) -> None:
        """After DALI failed: find the files in flight that it cannot decode, and start anew without them.

        Raises `error` where all of them decode: the trouble is another. Cost: the pipeline is built anew, 0.1 s; where
        DALI does not say which image of a batch it was, the images of a few batches are decoded one by one.
        """
        self._pipeline, alone = None, None
        numbers = {int(number) for number in _SAMPLE.findall(str(error))}
        in_flight = [(job, n) for job, _ in self._in_flight for n in range(len(job.encoded))]
        hinted = [(job, n) for job, n in in_flight if n in numbers]
        found: dict[int, str] = {}
        for job, number in hinted or in_flight:
            alone = alone or self._build(batch_size=1, prefetch_queue_depth=1)
            why = self._why_undecodable(alone, job, number)
            if why is not None:
                found[int(job.images[number])], alone = why, None
        if not found:
            raise error
        for image, why in found.items():
            self._feed.mark(image, why)
        self._start()

    def _why_undecodable(self, pipeline: Any, job: Job, number: int) -> str | None:
        """Put image `number` of a job through `pipeline`, of one image, which is of no more use if this fails."""
        one = slice(number, number + 1)
        parts = job.places[one], job.images[one], job.labels[one], job.encoded[one]
        self._feed_graph(pipeline, self._inputs(Job(job.epoch, job.step, *parts)))
        try:
            pipeline.schedule_run()
            pipeline.share_outputs()
        except RuntimeError as error:
            reasons = [
                line.strip() for line in str(error).splitlines() if line.strip() and "no longer valid" not in line
            ]
            return f"DALI cannot decode it ({reasons[-1]})"
        pipeline.release_outputs()
        return None

    def _name_bad(self) -> None:
        """Say which files were found bad since the last time."""
        new = [image for image in sorted(self._feed.bad.copy()) if image not in self._named]
        then = "replaced by another of its class" if self._training else "left out"
        for image in new[:_SHOWN]:
            name, why = show_name(self._source.name(image)), self._feed.bad[image]
            print(f"bad image {name}: {why}; {then}", file=sys.stderr, flush=True)
        if len(new) > _SHOWN:
            print(f"{len(new) - _SHOWN} more bad images: {then}; the run's summary.json names all", file=sys.stderr)
        self._named.update(new)


def _threads_per_rank() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
