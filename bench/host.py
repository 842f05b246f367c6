"""The host's milliseconds of a training step, by part: a GPU waits for them where its own work is short. Needs no GPU.

    python -m bench.host

ResNet-50-D in FP16 with mixup, a dynamic loss scale and an average of the weights, by the time that the step's thread takes.
Each operator is called as on a GPU, and does next to nothing: kernels of the project go through Triton's own launch to a driver
that starts none; a function in Python stands in for cuDNN's convolutions; torch's other operators run on the CPU, on images of
32 pixels and a sixteenth of the channels. The optimizer has the network's whole weights, and the loader a batch of encoded
images, which DALI decodes on threads of its own. Torch's calls of CUDA, some microseconds an operator, are not in it.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import numpy as np
import torch
from PIL import Image

from bench.stopwatch import Stopwatch
from fasttricks import trainer
from fasttricks.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline import decoder as decoder_module
from fasttricks.data.pipeline.decoder import Decoder
from fasttricks.data.pipeline.feed import Job
from fasttricks.data.pipeline.pixels import GpuPixels
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.optim import WeightAverage
from fasttricks.learning.placement import place
from fasttricks.models import build_model
from fasttricks.models.norm import BatchNormAct
from fasttricks.planning.planner import IMAGENET_CLASSES, IMAGENET_IMAGES
from fasttricks.runs.log import RunLog
from fasttricks.system.distributed import World
from fasttricks.tasks import find_task
from fasttricks_kernels.proof.host import launched_nowhere

CPU = torch.device("cpu")
Norm = Literal["fused", "torch"]
WARM_UP = 3
LOADER, COPY = "loader, hand-over", "loader, input copy"
OPTIMIZER, MOVED = "optimizer", "optimizer, where all gradients moved"
STEP = ("forward", "loss", "guard", "backward", "zero_grad", "average", "logging", "the rest")


def host_ms(batch_size: int, turns: int, norm: Norm = "fused") -> dict[str, float]:
    """Part -> the median of its milliseconds over the turns. norm: as config.model.norm."""
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = defaultdict(list)
    with launched_nowhere(), as_on_a_gpu():
        for part_of in (loader_turns(batch_size), step_turns(norm), optimizer_turns()):
            for turn in range(WARM_UP + turns):
                for part, seconds in next(part_of).items():
                    if turn >= WARM_UP:
                        rows[part].append(1e3 * seconds)
    return {part: statistics.median(rows[part]) for part in (LOADER, COPY, *STEP, OPTIMIZER, MOVED)}


# ------------------------------------------------------------------------------------------------------------ the parts


def loader_turns(batch_size: int) -> Iterator[dict[str, float]]:
    """A job handed to DALI, and the images of the one before taken, as for a GPU but for the device."""
    watch, places = Stopwatch(), np.arange(batch_size)
    job = Job(0, 0, places, places, places, [jpeg()] * batch_size)
    with mock.patch.object(decoder_module, "TensorListCPU", watch.timed(COPY, decoder_module.TensorListCPU)):
        options: dict[str, Any] = {"half": True, "seed": 0, "batch_size": batch_size, "ahead": 1, "hw_decoder_load": 0}
        decoder = Decoder(DataConfig(), GpuPixels(), device=CPU, **options)
        decoder.hand_over(job)
        while True:
            watch.seconds.clear()
            with watch.part(LOADER):
                decoder.run()
                decoder.take()
                decoder.hand_over(job)
            yield dict(watch.seconds)


def step_turns(norm: Norm = "fused") -> Iterator[dict[str, float]]:
    """train_step, which adds its loss to the log."""
    watch, learner = Stopwatch(), make(width=1 / 16, norm=norm)
    images = torch.randn(2, 3, 32, 32).half().contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.zeros(2, dtype=torch.int64))
    learner.forward = watch.timed("forward", learner.forward)  # type: ignore[assignment]
    for owner, name, part in (
        (learner.task, "loss", "loss"),
        (learner.guard, "judge", "guard"),
        (learner.loss_scale, "step", OPTIMIZER),
        (learner.optimizer, "zero_grad", "zero_grad"),
        (learner.average, "blend", "average"),
    ):
        object.__setattr__(owner, name, watch.timed(part, getattr(owner, name)))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(torch.autograd, "backward", watch.timed("backward", torch.autograd.backward)),
    ):
        log = RunLog(Path(folder), learner.world, (), num_steps=1, steps_per_epoch=1)
        learner.log_loss = watch.timed("logging", log.add)  # type: ignore[method-assign]
        while True:
            watch.seconds.clear()
            with watch.part("the rest"):
                trainer.train_step(learner, [batch])
            del watch.seconds[OPTIMIZER]  # of a sixteenth of the channels
            yield dict(watch.seconds)


def optimizer_turns() -> Iterator[dict[str, float]]:
    """The optimizer's step and the loss scale's, of the whole network: with gradients that all moved, and with the same again."""
    learner, kept = make(width=1.0), []

    def seconds() -> float:
        start = time.thread_time()
        learner.loss_scale.step(learner.optimizer)
        return time.thread_time() - start

    while True:
        for p in learner.model.parameters():
            p.grad = torch.empty_like(p)
            kept.append(p.grad)  # so that the next are elsewhere; nobody writes to them, so they take no memory
        yield {MOVED: seconds(), OPTIMIZER: seconds()}


# ------------------------------------------------------------------------------------------------------- their network and images


def make(width: float, norm: Norm = "fused") -> Learner:
    """ResNet-50-D in FP16, with mixup, a loss scale and an average, on the CPU.

    The operators of a sixteenth of the channels take no time to speak of.
    """
    config = TrainConfig(
        recipe="bench",
        epochs=200,
        precision="fp16",
        global_batch_size=2,
        ema_decay=0.9999,
        model=ModelConfig(name="resnet50d", width=width, norm=norm),
        loss=LossConfig(smoothing=0.1, mixup_alpha=0.2),
    )
    world = World.alone(CPU)
    model = place(build_model(config.model, IMAGENET_CLASSES), world, "fp16")
    shards = Shards(num_images=IMAGENET_IMAGES, batch_size=2, world_size=1, source="ImageNet")
    learner = make_learner(find_task(config.task), config, world, shards, model)
    learner.average = WeightAverage(model, config.ema_decay, learner.optimizer)
    return learner


def jpeg() -> bytes:
    """A file of about 110 KB, as ImageNet's are: noise, which takes many bytes a pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=92)
    return file.getvalue()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, the network takes its kernels on the CPU too, and a convolution gives memory of the right shape, channels-last."""

    def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
        sides = (
            (side + 2 * pad - reach * (kernel - 1) - 1) // step + 1
            for side, kernel, step, pad, reach in zip(
                x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        )
        return x.new_empty((x.shape[0], weight.shape[0], *sides)).contiguous(memory_format=torch.channels_last)

    def backward(grad, x, weight, sizes, *options):  # type: ignore[no-untyped-def]
        *mask, _ = options[-1]
        return *(
            torch.empty_like(like) if wanted else None for like, wanted in zip((x, weight), mask, strict=True)
        ), None

    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", convolution, "CPU")
    library.impl("convolution_backward", backward, "CPU")
    try:
        with (
            mock.patch.object(BatchNormAct, "_has_kernel", lambda layer, x: layer.norm == "fused"),
            mock.patch.object(WeightAverage, "_launches", return_value=True),
            # where CUDA has not begun, the call is noted with the stack
            mock.patch.object(torch.cuda, "manual_seed_all", return_value=None),
        ):
            yield
    finally:
        library._destroy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, help="encoded images that the loader hands over")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--norm", choices=get_args(Norm), default="fused", help="as --model.norm")
    given = parser.parse_args()
    found = host_ms(given.batch_size, given.turns, given.norm)
    print(f"| host, ms a step, loader's batch {given.batch_size} | |\n|---|---|")
    for part, ms in found.items():
        print(f"| {part} | {ms:.2f} |")
    print(f"| a step | {sum(ms for part, ms in found.items() if part != MOVED):.2f} |")


if __name__ == "__main__":
    main()
