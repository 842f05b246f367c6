"""Images a second of the training step on images that lie on the device, beside timm's model with torch's loss and optimizer.

No loader. Ours is the trainer's own train_step. Each contestant is a process of its own, on several GPUs one a GPU, as its
user would run it: a setting of fasttricks.train for its process (memory that stays with it) does not reach the others, except
the one that is named for it. They wait for their turn, so one computes at a time. At a turn's end each gives back the GPU's
memory that its allocator caches, nearly all that a step takes, so five of them fit a card that one of them fits. Weights,
momenta, images and the CUDA context stay.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fasttricks.config import LossConfig, ModelConfig, Precision, TrainConfig, model_info, replace_fields
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place, wrap
from fasttricks.learning.precision import image_dtype, make_autocast
from fasttricks.learning.step_graph import WARM_UP, StepGraph, Streams, cuda_graph, on_all_ranks, relaunch
from fasttricks.models import build_model, norm_of, use_norm
from fasttricks.models.norm import Norm
from fasttricks.planning.footprint import footprint
from fasttricks.planning.planner import IMAGENET_CLASSES, IMAGENET_IMAGES
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World, join_world, keep_freed_memory
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step

SMOOTHING, LR = 0.1, 0.01
GEMM_SIDES = (1024, 2048, 3072)
GEMM_SECONDS = 5.0
"""Length of a turn of matrix products: about that of a step of 16 images on two cores."""
PAPER_NETWORKS = ("resnet50b", "resnet50d", "inception_v3", "mobilenet_v1")
"""Those of the paper that timm has too."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """The network, and its training."""

    model: str = "resnet50d"
    precision: Precision = "fp32"
    batch_size: int = 16
    """Images of a step over all ranks."""
    image_size: int = 224
    device: Literal["cpu", "cuda"] = "cpu"
    ranks: int = 1
    """Processes, on CUDA each with a GPU of its own."""
    compiled: bool = False
    """Measure torch.compile too, of both: takes minutes to compile."""
    deterministic: Literal["on", "off"] = "off"
    """As of the trainer, for both on a GPU: off, timm's own choice, lets cuDNN time its algorithms."""

    @property
    def title(self) -> str:
        """For the head of a table."""
        where = f"{self.ranks} GPU(s)" if self.device == "cuda" else f"{self.ranks} process(es)"
        return f"Step, {self.model}, {self.precision}, batch {self.batch_size}, {self.image_size} pixels, {where}"

    @property
    def config(self) -> TrainConfig:
        """As the trainer would have it."""
        return TrainConfig(
            recipe="bench",
            epochs=200,
            deterministic=self.deterministic,
            precision=self.precision,
            global_batch_size=self.batch_size,
            model=ModelConfig(name=self.model),
            loss=LossConfig(smoothing=SMOOTHING),
        )

    @property
    def shards(self) -> Shards:
        """ImageNet over the ranks."""
        size = self.config.micro_batch_size(self.ranks)
        return Shards(num_images=IMAGENET_IMAGES, batch_size=size, world_size=self.ranks, source="ImageNet")


class ContestantError(RuntimeError):
    """A contestant's process ended."""


@contextmanager
def contestants(case: StepCase) -> Iterator[dict[str, Callable[[], float]]]:
    """Name -> a few training steps, returning images a second; the processes end with the context."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(processes_of("bench.step", name, case)) for name in names_of(case)}


def names_of(case: StepCase) -> list[str]:
    """The contestants of `case`. malloc's setting means nothing on a GPU."""
    left_out = {KEPT} if case.device == "cuda" else set()
    return [name for name in CONTESTANTS if name not in left_out and (case.compiled or "torch.compile" not in name)]


class Case(Protocol):
    """A dataclass of plain values, which a contestant's process is told."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def ranks(self) -> int:
        """Processes."""


@contextmanager
def processes_of(module: str, name: str, case: Case) -> Iterator[Callable[[], float]]:
    """One contestant of `module`: a process a rank, each of which does a turn for a line of its standard input."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", module, name, json.dumps(dataclasses.asdict(case))]
    rendezvous = {
        "WORLD_SIZE": case.ranks,
        "LOCAL_WORLD_SIZE": case.ranks,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }
    with ExitStack() as stack:
        ranks = []
        for rank in range(case.ranks):
            environment = {**rendezvous, "RANK": rank, "LOCAL_RANK": rank} if case.ranks > 1 else {}
            started = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **{key: str(value) for key, value in environment.items()}},
            )
            ranks.append(stack.enter_context(started))

        def measure() -> float:
            for process in ranks:
                print(file=process.stdin, flush=True)
            answers = [process.stdout.readline() for process in ranks]  # type: ignore[union-attr]
            if not all(answers):
                codes = [process.wait() for process in ranks]
                raise ContestantError(f"{name}: its process(es) ended with exit code {codes}; the error is above")
            return float(answers[0])

        try:
            yield measure
        finally:
            for process in ranks:
                process.stdin.close()  # type: ignore[union-attr]


def main(name: str, case: StepCase) -> None:
    """A process of one contestant: a turn for each line of standard input."""
    with join_world(case.device) as world:
        torch.manual_seed(0)
        ask_for_one_order(world.device, on=case.deterministic == "on", compiled="torch.compile" in name)
        size, side = case.shards.batch_size, case.image_size
        images = torch.randn(size, 3, side, side, device=world.device)
        labels = torch.randint(0, IMAGENET_CLASSES, (size,), device=world.device)
        step = MAKERS[name](case, world, images, labels)
        repeats = 10 if case.device == "cuda" else 1
        for _ in sys.stdin:
            print(repeats * case.batch_size / turn(step, world, repeats), flush=True)
        del step
        gc.collect()  # no graph is left with collectives, whose group would not end


def turn(step: Callable[[], None], world: World, repeats: int) -> float:
    """The seconds of `repeats` steps. On a GPU one before does not count: it fetches the memory, which the end gives back."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        step()
    _wait(world.device)
    world.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _wait(world.device)
    seconds = time.perf_counter() - start
    if on_gpu:
        torch.cuda.empty_cache()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fasttricks(
    case: StepCase,
    world: World,
    images: Tensor,
    labels: Tensor,
    *,
    compiled: bool = False,
    graphed: bool = False,
    norm: Norm = "auto",
) -> Callable[[], None]:
    keep_freed_memory()
    config = replace_fields(case.config, {"compile": "default" if compiled else "off", "cuda_graph": graphed})
    model = place(build_model(config.model, IMAGENET_CLASSES), world, config.precision)
    use_norm(model, norm if norm != "auto" else norm_of(config))
    streams = Streams.on(world.device) if graphed and world.device.type == "cuda" else Streams()
    with streams.on_step():
        forward = wrap(model, config, world, print)
    learner = make_learner(find_task(config.task), config, world, case.shards, model, forward=forward)
    images = images.to(image_dtype(config.precision, world.device)).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, labels)

    def step() -> None:
        train_step(learner, [batch])

    return _replayed(learner, step, streams) if graphed else step


def _replayed(learner: Learner, step: Callable[[], None], streams: Streams) -> Callable[[], None]:
    """`step` by a CUDA graph, which the first turns record; on a CPU, which has none, it is launched on the graph's tensors."""
    world = learner.world
    if world.device.type != "cuda":
        learner.graph = StepGraph(relaunch)
        return step
    learner.graph = StepGraph(on_all_ranks(cuda_graph, world), streams)

    def on_its_stream() -> None:
        with streams.on_step():
            step()

    for _ in range(WARM_UP + 1):
        on_its_stream()
    return on_its_stream


def _timm(
    case: StepCase,
    world: World,
    images: Tensor,
    labels: Tensor,
    *,
    layout: torch.memory_format,
    compiled: bool = False,
    keep: bool = False,
) -> Callable[[], None]:
    import timm

    if keep:
        keep_freed_memory()
    model: nn.Module = timm.create_model(model_info(case.model).timm, num_classes=IMAGENET_CLASSES)
    model = model.to(world.device, memory_format=layout)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    forward = torch.compile(model) if compiled else model
    if world.size > 1:
        forward = DistributedDataParallel(forward)
    half = case.precision == "fp16"
    autocast = (
        partial(torch.autocast, case.device, torch.float16) if half else make_autocast(case.precision, world.device)
    )
    scaler = torch.amp.GradScaler(case.device, enabled=half)

    def step() -> None:
        with autocast():
            loss = functional.cross_entropy(forward(images), labels, label_smoothing=SMOOTHING)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


KEPT = "timm, channels-last, freed memory kept"
CONTESTANTS: Mapping[str, Callable[[StepCase, World, Tensor, Tensor], Callable[[], None]]] = {
    "fasttricks": _fasttricks,
    "timm, channels-last": partial(_timm, layout=torch.channels_last),
    KEPT: partial(_timm, layout=torch.channels_last, keep=True),
    "timm, default layout": partial(_timm, layout=torch.contiguous_format),
    "fasttricks, torch.compile": partial(_fasttricks, compiled=True),
    "timm, channels-last, torch.compile": partial(_timm, layout=torch.channels_last, compiled=True),
}


FUSED, GRAPHED = "fasttricks, fused batch norm", "fasttricks, fused batch norm, CUDA graph"
MAKERS = {**CONTESTANTS, FUSED: partial(_fasttricks, norm="fused"), GRAPHED: partial(_fasttricks, graphed=True)}
"""Also ours, launched with the fused batch norm and replayed. A graph keeps its memory between turns, so it is none of the
CONTESTANTS, who share a card."""


def flops_per_image(case: StepCase) -> float:
    """FLOPs of the convolutions and matrix products of a step, a multiplication and an addition being two."""
    return footprint(case.config, case.shards, IMAGENET_CLASSES).flops / case.shards.batch_size


def matrix_product(case: StepCase) -> Callable[[], float]:
    """The FLOP/s of float32 matrix products of the fastest of several sizes, as images a second: a step's roof.

    The first turn finds that size; the others last as long as a step of many images does, so that a disturbance of the one
    disturbs the other. (The fastest of many short moments would be no roof that a step could reach.)
    """
    device, flops = torch.device(case.device), flops_per_image(case)
    keep_freed_memory()

    def rate(side: int, seconds: float) -> float:
        a, b, out = (torch.randn(side, side, device=device) for _ in range(3))
        torch.mm(a, b, out=out)
        _wait(device)
        done, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            torch.mm(a, b, out=out)
            _wait(device)
            done += 1
        return done * 2 * side**3 / spent / flops

    best: list[int] = []

    def measure() -> float:
        if not best:
            best.append(max(GEMM_SIDES, key=lambda side: rate(side, 1.0)))
        return rate(best[0], GEMM_SECONDS)

    return measure


if __name__ == "__main__":
    main(sys.argv[1], StepCase(**json.loads(sys.argv[2])))
